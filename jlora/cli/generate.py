"""`jlora generate`: a language model's text, as it comes."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from jlora.cli.streams import decode_arguments, read_input
from jlora.data.batches import prompt_ids
from jlora.data.readers import Chat, Message
from jlora.errors import JloraValueError
from jlora.hf.chat import stop_tokens
from jlora.hf.load import LoadedModel, load_model
from jlora.hf.peft import load_peft
from jlora.hf.peft_files import advise
from jlora.hf.tokenizer import use_tokenizer
from jlora.models.generate import stream, unusable_seed, unusable_settings
from jlora.runs.folder import ADAPTER, TOKENIZER
from jlora.training.checkpoint import restore_adapter
from jlora.tree.paths import Tree
from jlora.tree.wrapping import merge

LOST = "\N{REPLACEMENT CHARACTER}"


def generate(
    name: str,
    prompts: Sequence[str],
    *,
    adapter: Path | None,
    merged: bool,
    dtype: str,
    chat: bool,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    untie: bool = False,
    vocab_size: int | None = None,
) -> None:
    """Prints every prompt with its continuation, or with `chat` the replies alone; a blank line between two.

    Args:
        name: folder or hub name of the model.
        prompts: texts to continue; empty for one, the whole standard input.
        adapter: a folder of jlora's or of PEFT's, or a run's.
        merged: fold the adapter into the base first.
        dtype: of parameters and computation.
        chat: each prompt is a message, put into the tokenizer's chat template.
        max_new_tokens: tokens to add to each, at most.
        temperature: 0 takes the likeliest token each time.
        top_k: draw from the k likeliest tokens only.
        top_p: then from the fewest that reach this probability.
        seed: of what is drawn.
        untie: give a tied output head its own copy of the input embedding.
        vocab_size: number of tokens to resize the embedding and the output head to.

    Raises:
        ValueError: a model that can't be loaded or can't generate, an adapter that does not fit, settings out of range.
        OSError: a file is missing or can't be read.
    """
    wrong = unusable_settings(max_new_tokens, temperature, top_k, top_p) + unusable_seed(seed)
    wrong += ["--merge has nothing to fold  expected: --adapter FOLDER too"] if merged and adapter is None else []
    if wrong:
        fix = 'ask as in: jlora generate MODEL "Once upon a time" --temperature 0.8.'
        raise JloraValueError("generate", "nothing can be generated.", wrong, fix)
    texts = decode_arguments("generate", prompts) or [read_input("generate").removesuffix("\n")]
    loaded = load_model(name, dtype=dtype, untie=untie, vocab_size=vocab_size)
    if adapter is not None:
        # The tokenizer that the adapter was trained with lies in its folder, or in that of the run around it.
        loaded = use_tokenizer(use_tokenizer(loaded, adapter), adapter / TOKENIZER)
    if loaded.tokenizer is None:
        fix = "add the tokenizer's files to the model's folder."
        raise JloraValueError("generate", f"{name} has no tokenizer.", [], fix)
    rows = [tokenise(loaded.tokenizer, text, chat=chat) for text in texts]
    stops = stop_tokens(loaded, chat=chat)
    params = loaded.params if adapter is None else load_adapter(adapter, loaded)
    params = merge(params) if merged else params
    # All are checked before the first is answered.
    answers = [
        stream(
            loaded.model,
            params,
            [row],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_tokens=stops,
            key=jax.random.fold_in(jax.random.key(seed), n),
        )
        for n, row in enumerate(rows)
    ]
    for n, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        tokens: Iterable[int] = (int(token[0]) for token in answer)
        # A reply is shown without the token that ends it, whether the tokenizer calls that special or not.
        tokens = itertools.takewhile(lambda token: token not in stops, tokens) if chat else tokens
        grown = pieces(loaded.tokenizer, row, tokens)
        prompt = next(grown)
        print("\n" if n else "", end="" if chat else prompt, flush=True)
        for piece in grown:
            print(piece, end="", flush=True)
        print()


def tokenise(tokenizer: Any, text: str, *, chat: bool) -> list[int]:
    """A prompt's token ids.

    Raises:
        ValueError: a chat is asked for, and the tokenizer has no template.
    """
    if not chat:
        return list(tokenizer(text)["input_ids"])
    if not tokenizer.chat_template:
        fix = "leave --chat out, or take a model that was trained to chat."
        raise JloraValueError("generate", "the tokenizer has no chat template.", [], fix)
    return prompt_ids(tokenizer, Chat((Message(role="user", content=text),)))


def load_adapter(folder: Path, loaded: LoadedModel) -> Tree:
    """The base with an adapter from a folder of either kind, or from a run's.

    Raises:
        ValueError: no adapter there, or one that does not fit.
    """
    folder = folder / ADAPTER if (folder / ADAPTER / "adapter.json").is_file() else folder
    if (folder / "adapter.json").is_file():
        return restore_adapter(folder, loaded.params, model=loaded.model)
    if (folder / "adapter_config.json").is_file():
        return load_peft(folder, loaded.model, loaded.params)
    if advice := advise(folder):
        problem, fix = advice
        raise JloraValueError("generate", problem, [], fix)
    offenders = ["neither adapter.json (jlora) nor adapter_config.json (PEFT) is there"]
    fix = "name the folder that `jlora train`, save_adapter or save_peft wrote."
    raise JloraValueError("generate", f"{folder} holds no adapter.", offenders, fix)


def pieces(tokenizer: Any, prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """The prompt's text, then what each token adds to it.

    A character's bytes may be spread over several tokens. Until the last has come they decode to replacement
    characters, so such an end is held back.
    """
    ids = list(prompt)
    text = decode(tokenizer, ids)
    given = len(text)
    yield text
    for token in tokens:
        ids.append(token)
        text = decode(tokenizer, ids)
        yield text.rstrip(LOST)[given:]
        given = max(given, len(text.rstrip(LOST)))
    yield text[given:]


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    # A clean-up would take back spaces that have been printed.
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
