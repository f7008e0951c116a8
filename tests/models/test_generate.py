"""Generation against transformers' in torch, against itself with other settings, and in the shell."""

import io
import json
import math
import shutil
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import jlora
from jlora.cli.generate import LOST, pieces
from jlora.cli.main import main
from jlora.hf.load import save_model
from jlora.hf.peft import save_peft
from jlora.models.bert import Bert, BertConfig
from jlora.models.decoder import Decoder, DecoderConfig, Rope
from jlora.models.generate import Sampling, generate, stream, warp
from jlora.models.gpt2 import Gpt2, Gpt2Config
from jlora.models.layers import Origin

SPECIAL = {"<s>": 256, "</s>": 257}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
SIZES = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "rope": Rope(theta=500.0),
    "norm_eps": 1e-6,
}
STORIES = Path(__file__).parents[3] / "shared/data/stories260K"
LENGTHS = (3, 20, 9)
NEW = 24


@pytest.fixture(autouse=True)
def precise():
    with jax.default_matmul_precision("highest"):
        yield


def random_params(model: nn.Module) -> dict:
    """Weights large enough that logits spread: at the usual initial size bugs hide."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]

    def draw(path: tuple, like: jax.ShapeDtypeStruct) -> jax.Array:
        middle, spread = {"scale": (1, 0.2), "embedding": (0, 1.0)}.get(path[-1].key, (0, 0.3))
        return jnp.asarray(middle + spread * rng.standard_normal(like.shape), like.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and a first one that begins every text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: n for n, letter in enumerate(letters)} | SPECIAL, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", SPECIAL["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny random Llama in Hugging Face form, with a tokenizer of bytes."""
    model = Decoder(DecoderConfig(**SIZES), origin=Origin("tiny", json.dumps(CONFIG)))
    folder = tmp_path_factory.mktemp("llama")
    params = random_params(model)
    # Bytes from 94 on are parts of letters; few of them make a text.
    params["lm_head"]["kernel"] = params["lm_head"]["kernel"].at[:, 94:].multiply(0.3)
    save_model(folder, model, params, byte_tokenizer())
    return folder


@pytest.fixture(scope="module")
def llama(folder):
    return jlora.load_model(folder)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def wrapped(llama):
    """The model's parameters with an adapter that matters."""
    params = jlora.wrap(llama.params, rank=3, alpha=6, targets=llama.model.lora_targets)
    adapters, base = jlora.split(params)
    rng = np.random.default_rng(5)
    drawn = jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), leaf.dtype), adapters)
    return jlora.join(drawn, base)


def padded(rows: list[list[int]], side: str, pad: int = 77) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one length with their mask."""
    most = max(map(len, rows))
    ids, mask = np.full((len(rows), most), pad), np.zeros((len(rows), most), int)
    for n, row in enumerate(rows):
        place = slice(most - len(row), most) if side == "left" else slice(len(row))
        ids[n, place], mask[n, place] = row, 1
    return ids, mask


def test_greedy_tokens_are_those_of_transformers_for_prompts_of_any_length_and_padding(folder, llama, prompts):
    torch = pytest.importorskip("torch", reason="torch is the oracle and is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle and is not installed")
    oracle = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids, mask = padded(prompts, "left")

    def expected(**settings) -> np.ndarray:
        with torch.no_grad():
            actual = oracle.generate(
                torch.tensor(ids),
                attention_mask=torch.tensor(mask),
                generation_config=transformers.GenerationConfig(
                    max_new_tokens=NEW, do_sample=False, pad_token_id=0, **settings
                ),
            )
        new = actual[:, ids.shape[1] :].numpy()
        return np.pad(new, ((0, 0), (0, NEW - new.shape[1])))

    whole = expected(eos_token_id=None)
    assert len(np.unique(whole)) > NEW
    # One of these ends the first row, the other the last; the middle one may run on.
    stops = [int(whole[0, 5]), int(whole[2, 9])]
    stopped = expected(eos_token_id=stops)
    assert (stopped != whole).any()
    right = padded(prompts, "right")
    for given, given_mask in ((prompts, None), (ids, mask), right, map(jnp.asarray, right)):
        options = {"max_new_tokens": NEW, "attention_mask": given_mask}
        actual = generate(llama.model, llama.params, given, **options)
        assert (actual.shape, actual.dtype) == ((3, NEW), jnp.int32)
        np.testing.assert_array_equal(actual, whole)
        np.testing.assert_array_equal(generate(llama.model, llama.params, given, **options, stop_tokens=stops), stopped)


def test_a_wrapped_tree_a_merged_one_and_scanned_layers_give_the_same_tokens(folder, llama, wrapped, prompts):
    options = {"max_new_tokens": NEW}
    actual = generate(llama.model, wrapped, prompts, **options)
    assert (actual != generate(llama.model, llama.params, prompts, **options)).mean() > 0.5
    np.testing.assert_array_equal(actual, generate(llama.model, jlora.merge(wrapped), prompts, **options))
    scanned = jlora.load_model(folder, scan=True)
    params = jlora.wrap(
        scanned.params, rank=3, alpha=6, targets=scanned.model.lora_targets, layout=scanned.model.lora_layout
    )

    def stacked(path: tuple, leaf: jax.Array) -> jax.Array:
        names = [part.key for part in path]
        if names[0] != "layers":
            return leaf
        layers = [wrapped[f"layers_{n}"] for n in range(SIZES["num_layers"])]
        for name in names[1:]:
            layers = [layer[name] for layer in layers]
        return jnp.stack(layers)

    params = jax.tree_util.tree_map_with_path(stacked, params)
    np.testing.assert_array_equal(actual, generate(scanned.model, params, prompts, **options))


def test_one_trace_serves_every_prompt_of_a_bucket_and_every_setting(llama):
    traces = []

    class Counting(Decoder):
        def hidden(self, *args, **kwargs):
            traces.append(1)
            return super().hidden(*args, **kwargs)

    model = Counting(llama.model.config)

    def run(length: int, **options) -> None:
        rows = [list(range(1, length + 1)), [4]]
        generate(model, llama.params, rows, **{"max_new_tokens": 5, **options}).block_until_ready()

    drawn = {"temperature": 0.7, "top_k": 5, "top_p": 0.9}
    run(3)
    run(3, **drawn)
    first = len(traces)
    assert first > 0
    for length in (1, 2, 11, 16):
        run(length, max_new_tokens=length, stop_tokens=[7] * (length % 8), pad_token=length)
    for change in ({"temperature": 1.3}, {"top_k": 9}, {"top_p": 0.2}, {"key": jax.random.key(4)}, {"top_k": None}):
        run(4, **drawn | change)
    # An equal model, made anew, is the same model.
    generate(Counting(llama.model.config), llama.params, [[1], [2]], max_new_tokens=2)
    assert len(traces) == first
    run(17)
    assert len(traces) > first


@pytest.mark.parametrize("sampled", [False, True])
def test_streamed_tokens_are_those_generated(llama, prompts, sampled):
    options = {"max_new_tokens": NEW, "pad_token": 99}
    options |= {"temperature": 0.9, "top_p": 0.9, "key": jax.random.key(3)} if sampled else {}
    whole = generate(llama.model, llama.params, prompts, **options)
    np.testing.assert_array_equal(whole, np.stack(list(stream(llama.model, llama.params, prompts, **options)), axis=1))
    # Once every row has stopped there is nothing left to come.
    options["stop_tokens"] = np.unique(whole[:, 7]).tolist()
    stopped = np.asarray(generate(llama.model, llama.params, prompts, **options))
    steps = np.stack(list(stream(llama.model, llama.params, prompts, **options)), axis=1)
    assert steps.shape[1] <= 8
    np.testing.assert_array_equal(stopped[:, : steps.shape[1]], steps)
    assert (stopped[:, steps.shape[1] :] == 99).all()


def test_a_rows_draws_depend_neither_on_the_other_rows_nor_on_the_number_of_tokens(llama, prompts):
    options = {"temperature": 1.5, "key": jax.random.key(8)}
    same = generate(llama.model, llama.params, [prompts[1]] * 3, max_new_tokens=NEW, **options)
    other = generate(llama.model, llama.params, [prompts[1], prompts[0], prompts[2]], max_new_tokens=17, **options)
    np.testing.assert_array_equal(same[0, :17], other[0])
    assert (same[0] != same[1]).mean() > 0.5
    options["key"] = jax.random.key(9)
    assert (same != generate(llama.model, llama.params, [prompts[1]] * 3, max_new_tokens=NEW, **options)).mean() > 0.5


def settings(temperature: float, top_k: int, top_p: float) -> Sampling:
    unused = jnp.zeros((), jnp.int32)
    return Sampling(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(1 - top_p), unused, unused, unused)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_what_is_drawn_from_is_what_transformers_warpers_leave(temperature):
    torch = pytest.importorskip("torch", reason="torch is the oracle and is not installed")
    from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 2 * jax.random.normal(jax.random.key(0), (6, 50))
    for top_k, top_p in ((50, 1.0), (7, 1.0), (1, 1.0), (500, 0.8), (50, 1e-9), (9, 0.5), (20, 0.95)):
        scores = torch.tensor(np.asarray(logits))
        for warper in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)):
            scores = warper(None, scores)
        actual = jax.nn.softmax(warp(logits, settings(temperature, top_k, top_p), cut=True), axis=-1)
        np.testing.assert_array_equal(actual > 0, scores.softmax(-1).numpy() > 0)
        np.testing.assert_allclose(actual, scores.softmax(-1).numpy(), atol=1e-6)


def test_tokens_that_tie_with_the_last_one_kept_stay():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.1, 0.2, 0.2]]))
    for top_k, top_p, kept in ((2, 1.0, [1, 3, 4]), (5, 0.5, [1, 3, 4]), (1, 1.0, [1]), (2, 0.4, [1])):
        assert jnp.isfinite(warp(logits, settings(1.0, top_k, top_p), cut=True)[0]).nonzero()[0].tolist() == kept


def test_frequencies_of_draws_follow_the_filtered_softmax(llama):
    rows, prompt, (temperature, top_k, top_p) = 2048, [3, 1, 4], (2.0, 12, 0.9)
    logits = jax.jit(llama.model.apply)({"params": llama.params}, jnp.array([prompt]))[0, -1]
    scores = np.sort(np.asarray(logits, np.float64) / temperature)[::-1][:top_k]
    chances = np.exp(scores - scores[0])
    chances /= chances.sum()
    kept = int((np.cumsum(chances) < top_p).sum()) + 1
    chances = chances[:kept] / chances[:kept].sum()
    assert 4 < kept < top_k
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    tokens = np.asarray(generate(llama.model, llama.params, [prompt] * rows, max_new_tokens=1, **options))[:, 0]
    best = np.argsort(-np.asarray(logits))[:kept]
    assert set(tokens.tolist()) <= set(best.tolist())
    counts = (tokens[:, None] == best).sum(axis=0)
    chi_square = ((counts - rows * chances) ** 2 / (rows * chances)).sum()
    assert chi_square < (kept - 1) + 4 * math.sqrt(2 * (kept - 1))


def test_the_lowest_temperature_is_greedy_and_so_is_one_token_to_draw_from(llama, prompts):
    greedy = generate(llama.model, llama.params, prompts, max_new_tokens=NEW)
    for options in ({"temperature": 1e-50}, {"temperature": 5.0, "top_k": 1}, {"temperature": 5.0, "top_p": 1e-9}):
        np.testing.assert_array_equal(
            greedy, generate(llama.model, llama.params, prompts, max_new_tokens=NEW, **options)
        )


def test_learned_positions_can_be_used_to_the_last_and_no_further():
    model = Gpt2(Gpt2Config(vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, num_positions=22))
    params = random_params(model)
    rows = [[5, 3, 9, 1] * 3, [7, 2]]
    actual = generate(model, params, rows, max_new_tokens=10)
    ids, mask = padded([row + new for row, new in zip(rows, actual.tolist(), strict=True)], "right", 0)
    best = jax.jit(model.apply)({"params": params}, ids, mask).argmax(axis=-1)
    for row, new, likeliest in zip(rows, actual, best, strict=True):
        np.testing.assert_array_equal(new, likeliest[len(row) - 1 :][:10])
    with pytest.raises(ValueError, match="prompt 0 has 12 tokens, plus 11 new ones, but the model has 22 positions"):
        generate(model, params, rows, max_new_tokens=11)


def test_everything_that_can_not_be_used_is_in_one_error(llama):
    with pytest.raises(ValueError) as error:
        stream(
            llama.model,
            llama.params,
            [[1, 258, -1], [], [5, 0.5]],
            max_new_tokens=0,
            temperature=-0.1,
            top_k=0,
            top_p=1.5,
            stop_tokens=[2, 300],
        )
    assert str(error.value) == (
        "generate: 8 arguments can't be used.\n"
        "  prompt 1 is empty\n"
        "  max_new_tokens is 0  expected: a whole number from 1\n"
        "  temperature is -0.1  expected: a number from 0\n"
        "  top_k is 0  expected: a whole number from 1\n"
        "  top_p is 1.5  expected: a number above 0, to 1\n"
        "  prompt 0 has 258, -1, the vocabulary 0 to 257\n"
        "  prompt 2 has 0.5, the vocabulary 0 to 257\n"
        "  stop_tokens has 300, the vocabulary 0 to 257\n"
        "Fix: correct what is listed."
    )
    for ids, mask, words in (
        ([], None, "there is no prompt"),
        ([1, 2], None, "two axes"),
        ([[1, 2]], [[1]], "of the same sizes"),
        ([[1, 2, 3]], [[1, 0, 1]], "prompt 0 has padding between its tokens"),
        ([[1, 2, 3]], [[0, 0, 0]], "prompt 0 is empty"),
        (np.ones((2, 2, 2), int), None, "two axes"),
    ):
        with pytest.raises(ValueError, match=words):
            generate(llama.model, llama.params, ids, attention_mask=mask, max_new_tokens=2)
    for value in (math.nan, math.inf, "warm"):
        with pytest.raises(ValueError, match="temperature is"):
            generate(llama.model, llama.params, [[1]], max_new_tokens=2, temperature=value)
    bert = Bert(BertConfig(vocab_size=8))
    with pytest.raises(ValueError, match="Bert has no cache: only a decoder can generate"):
        generate(bert, {}, [[1]], max_new_tokens=2)


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is not here")
def test_stories260k_tells_the_story_of_its_page_and_is_as_surprised_as_torch_by_another():
    loaded = jlora.load_model(STORIES / "hf")
    page = (STORIES / "stories260K.md").read_text()
    sample = page.split("-t 0.0\n")[1].split("\n```")[0]
    tokens = generate(loaded.model, loaded.params, loaded.tokenizer([""])["input_ids"], max_new_tokens=256)
    assert loaded.tokenizer.decode(np.asarray(tokens[0])) == sample

    torch = pytest.importorskip("torch", reason="torch is the oracle and is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle and is not installed")
    ids = np.array([loaded.tokenizer(page.split("-s 133742\n")[1].split("\n```")[0])["input_ids"]])
    logits = jax.jit(loaded.model.apply)({"params": loaded.params}, ids)
    chances = np.asarray(jax.nn.log_softmax(logits[0, :-1]))[np.arange(ids.shape[1] - 1), ids[0, 1:]]
    oracle = transformers.LlamaForCausalLM.from_pretrained(STORIES / "hf").eval()
    with torch.no_grad():
        expected = float(oracle(torch.tensor(ids), labels=torch.tensor(ids)).loss.exp())
    assert ids.shape[1] > 200
    assert float(np.exp(-chances.mean())) == pytest.approx(expected, rel=5e-6)


@pytest.mark.parametrize(
    "options, line",
    [
        ({"pad_token": "x"}, "pad_token is 'x'  expected: a token id from 0 to 257"),
        ({"pad_token": -5}, "pad_token is -5  expected: a token id from 0 to 257"),
        ({"pad_token": 258}, "pad_token is 258  expected: a token id from 0 to 257"),
        ({"pad_token": None}, "pad_token is None  expected: a token id from 0 to 257"),
        ({"stop_tokens": "x"}, "stop_tokens has 'x', the vocabulary 0 to 257"),
        ({"stop_tokens": [-1]}, "stop_tokens has -1, the vocabulary 0 to 257"),
        ({"stop_tokens": None}, "stop_tokens has None, the vocabulary 0 to 257"),
        ({"stop_tokens": [[1], [2, 3]]}, "stop_tokens has [1], [2, 3], the vocabulary 0 to 257"),
        ({"key": 7}, "key is 7  expected: jax.random.key(seed)"),
        ({"input_ids": ["a"]}, "input_ids and attention_mask must have two axes: (batch, time)"),
        ({"input_ids": [["a"]]}, "prompt 0 has 'a', the vocabulary 0 to 257"),
        ({"input_ids": None}, "input_ids and attention_mask must have two axes: (batch, time)"),
        ({"input_ids": [[2**70]]}, f"prompt 0 has {2**70}, the vocabulary 0 to 257"),
        ({"attention_mask": "x"}, "input_ids and attention_mask must have two axes"),
        ({"max_new_tokens": "x"}, "max_new_tokens is 'x'  expected: a whole number from 1"),
        ({"params": None}, "params is a NoneType  expected: the tree of parameters that load_model returns"),
        ({"params": {}}, "params has no 'embed_tokens/embedding'"),
    ],
)
@pytest.mark.parametrize("function", [generate, stream])
def test_an_argument_of_a_wrong_kind_is_one_error(llama, function, options, line):
    arguments = {"params": llama.params, "input_ids": [[1, 2]], "max_new_tokens": 2} | options
    with pytest.raises(ValueError) as error:
        function(llama.model, **arguments)
    first, second, *_, last = str(error.value).splitlines()
    assert first.startswith("generate: ") and second.strip().startswith(line) and last == "Fix: correct what is listed."


def test_parameters_of_another_model_are_an_error(llama):
    wide = Decoder(DecoderConfig(**SIZES | {"hidden_size": 64}))
    with pytest.raises(ValueError) as error:
        generate(wide, llama.params, [[1, 2]], max_new_tokens=2)
    lines = str(error.value).splitlines()
    assert "params has 'embed_tokens/embedding' with the shape (258, 32), the model (258, 64)" in lines[1]
    assert len(lines) == 6 and lines[4].endswith("more parameters that do not fit")
    shapes = jax.eval_shape(lambda: llama.params)
    with pytest.raises(ValueError, match="params has 'embed_tokens/embedding' without values"):
        generate(llama.model, shapes, [[1, 2]], max_new_tokens=2)
    scanned = Decoder(DecoderConfig(**SIZES, scan=True))
    with pytest.raises(ValueError, match="params has no 'layers/"):
        generate(scanned, llama.params, [[1, 2]], max_new_tokens=2)


def test_characters_of_several_tokens_are_given_whole():
    tokenizer = byte_tokenizer()
    text = "naïve 日本語, 🙂!"
    prompt, new = tokenizer("a ")["input_ids"], tokenizer(text)["input_ids"][1:]
    given = list(pieces(tokenizer, prompt, new))
    assert len(new) == len(text.encode())
    assert given[0] == "a " and "".join(given[1:]) == text
    assert not any(LOST in piece for piece in given)
    # What never becomes a character is not swallowed either.
    assert "".join(pieces(tokenizer, prompt, new[:-2])) == f"a naïve 日本語, {LOST}"


class Recorder(io.StringIO):
    """A standard output that remembers what a reader could see each time it was flushed."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def flush(self) -> None:
        self.seen.append(self.getvalue())


@pytest.fixture
def shell(monkeypatch):
    """Runs `jlora generate`, and gives what it wrote."""

    def run(*args: object) -> Recorder:
        recorder = Recorder()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", recorder)
            assert main(["generate", *map(str, args)]) == 0
        return recorder

    return run


def continued(loaded, params, prompt: str, **options) -> str:
    """A prompt with the text that `generate` adds to it."""
    row = loaded.tokenizer(prompt)["input_ids"]
    options = {"max_new_tokens": 12, "stop_tokens": [SPECIAL["</s>"]]} | options
    tokens = np.asarray(generate(loaded.model, params, [row], **options))[0].tolist()
    return loaded.tokenizer.decode(row + tokens, skip_special_tokens=True)


def test_the_shell_prints_the_text_of_generate_as_it_grows(folder, llama, wrapped, shell, tmp_path, monkeypatch):
    short = ("--max-new-tokens", 12)
    shown = shell(folder, "hello", *short)
    assert shown.getvalue() == continued(llama, llama.params, "hello") + "\n"
    assert shown.seen[0] == "hello" and len(set(shown.seen)) > 4

    options = {"temperature": 1.2, "top_k": 30, "top_p": 0.9}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    keys = [jax.random.fold_in(jax.random.key(7), n) for n in range(2)]
    texts = [continued(llama, llama.params, text, key=key, **options) for text, key in zip("ab", keys, strict=True)]
    assert shell(folder, "a", "b", *short, *flags, "--seed", 7).getvalue() == "\n\n".join(texts) + "\n"

    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    assert shell(folder, *short).getvalue() == continued(llama, llama.params, "two\nlines") + "\n"

    expected = continued(llama, wrapped, "hello") + "\n"
    assert expected != shown.getvalue()
    jlora.save_adapter(tmp_path / "own", wrapped)
    save_peft(tmp_path / "peft", llama.model, wrapped)
    for adapter, *more in ((tmp_path / "own",), (tmp_path / "peft",), (tmp_path / "own", "--merge")):
        assert shell(folder, "hello", *short, "--adapter", adapter, *more).getvalue() == expected


def test_a_text_ends_where_the_generation_config_says_or_else_the_config(folder, llama, shell, tmp_path):
    row = llama.tokenizer("hello")["input_ids"]
    tokens = np.asarray(generate(llama.model, llama.params, [row], max_new_tokens=12))[0].tolist()
    early, late = (next(token for token in tokens[n:] if token not in tokens[:n]) for n in (2, 5))
    moved = shutil.copytree(folder, tmp_path / "moved")
    (moved / "config.json").write_text(json.dumps(CONFIG | {"eos_token_id": late}))
    for stop in (late, early):
        text = llama.tokenizer.decode(row + tokens[: tokens.index(stop) + 1], skip_special_tokens=True)
        assert shell(moved, "hello", "--max-new-tokens", 12).getvalue() == text + "\n"
        (moved / "generation_config.json").write_text(json.dumps({"eos_token_id": [early, SPECIAL["</s>"]]}))


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def test_a_chat_shows_the_reply_alone(folder, llama, shell, tmp_path):
    shutil.copytree(folder, tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text(TEMPLATE)
    prompt = "[user] hi\n>"
    row = llama.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    tokens = np.asarray(generate(llama.model, llama.params, [row], max_new_tokens=12, stop_tokens=SPECIAL["</s>"]))
    reply = llama.tokenizer.decode(row + tokens[0].tolist(), skip_special_tokens=True).removeprefix(prompt)
    assert shell(tmp_path / "chat", "hi", "--chat", "--max-new-tokens", 12).getvalue() == reply + "\n"


def test_mistakes_in_the_shell_are_reported_without_a_traceback(folder, tmp_path, capsys):
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=lambda *_: ["tokenizer.json", "tokenizer_config.json"])
    for args, words in (
        (
            (folder, "a", "--temperature=-1", "--top-p=0", "--merge"),
            ("temperature is -1.0", "top_p is 0.0", "--merge"),
        ),
        ((folder, "a", "--adapter", tmp_path), ("holds no adapter", "adapter_config.json (PEFT)")),
        ((folder, "a", "--chat"), ("no chat template",)),
        ((bare, "a"), ("has no tokenizer",)),
        ((tmp_path / "none", "a"), ("is no local folder",)),
    ):
        capsys.readouterr()
        assert main(["generate", *map(str, args)]) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and "Traceback" not in shown.err and "\nFix: " in shown.err
        assert all(part in shown.err for part in words), shown.err
