"""Chats as text: the tokenizer's template, rendered within limits, and the tokens that end an answer."""

import atexit
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jlora.errors import JloraValueError
from jlora.hf.load import LoadedModel

WORKER = Path(__file__).with_name("chat_worker.py")
MARKER = "jlora0answer"


class ChatError(ValueError):
    """A chat that can't be written as text; the message is the reason alone."""


class TemplateRenderer:
    """Renders chat templates in a separate process, which is started by the first request.

    Args:
        seconds: processor time of one chat.
        bytes: memory of the process beyond what its modules use.
        characters: length of the text of one chat.
    """

    def __init__(self, *, seconds: int = 10, bytes: int = 1 << 30, characters: int = 1 << 24):
        self.limits = {"seconds": seconds, "bytes": bytes, "characters": characters}
        self.process: subprocess.Popen[str] | None = None
        self.lock = threading.Lock()

    def render(self, request: Mapping[str, Any]) -> str:
        """The text of one chat.

        Args:
            request: the arguments of transformers' `render_jinja_template`, for one conversation.

        Raises:
            ChatError: the template can't write this chat.
            ValueError: the template can't be used at all: it is damaged, refused, or exceeds a limit.
        """
        # Values that JSON does not have become the placeholders that transformers puts there.
        line = json.dumps(request, default=lambda value: f"<{type(value).__name__}>")
        with self.lock:
            answer = self.exchange(line)
            if not answer:
                reason = self.reason_of_end()
                self.close()
                raise template_error(reason)
        kind, content = next(iter(json.loads(answer).items()))
        if kind == "text":
            return content
        if kind == "chat":
            raise ChatError(f"the chat template {content}")
        reasons = {
            "memory": f"it needs more than {self.limits['bytes'] >> 20:,} MiB of memory for one chat",
            "length": f"it writes more than {self.limits['characters']:,} characters for one chat",
        }
        raise template_error(reasons.get(kind, content))

    def exchange(self, line: str) -> str:
        """The process's reply, empty where it has ended."""
        if self.process is None:
            self.start()
        process = self.process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return ""
        return process.stdout.readline()

    def start(self) -> None:
        """Starts the process; a separate session keeps Ctrl-C from it."""
        self.process = subprocess.Popen(
            # Its own folder must not be searched for modules: files there are named as jlora names them.
            [sys.executable, "-P", str(WORKER)],
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="ascii",
            start_new_session=True,
        )
        assert self.process.stdin is not None
        # Sent together with the first request.
        self.process.stdin.write(json.dumps(self.limits | {"path": sys.path}) + "\n")

    def reason_of_end(self) -> str:
        """Why the process ended before it replied."""
        assert self.process is not None
        if self.process.wait() == -signal.SIGPROF:
            return f"it needs more than {self.limits['seconds']} seconds for one chat"
        return f"the process that renders it ended with code {self.process.returncode}"

    def close(self) -> None:
        """Ends the process; the next request starts another."""
        process, self.process = self.process, None
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        process.kill()
        process.wait()
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def template_error(reason: str) -> ValueError:
    """The error of a template that can't be used."""
    fix = "correct the template (chat_template.jinja or tokenizer_config.json), or take another model's tokenizer."
    return JloraValueError("chat template", "the tokenizer's chat template can't be used.", [reason], fix)


@functools.cache
def shared_renderer() -> TemplateRenderer:
    """The renderer of this process."""
    renderer = TemplateRenderer()
    atexit.register(renderer.close)
    return renderer


def render_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool,
    renderer: TemplateRenderer | None = None,
) -> str:
    """A chat as the tokenizer's template writes it: what transformers' `apply_chat_template` gives, within limits.

    Args:
        tokenizer: of transformers, with a chat template.
        messages: the chat.
        tools: JSON schemas of the functions that the chat may call.
        add_generation_prompt: end where the next answer begins.
        renderer: what renders it; None for the renderer of this process.

    Raises:
        ChatError: the template can't write this chat.
        ValueError: the template can't be used at all, or there are several and none is the default.
    """
    try:
        template = tokenizer.get_chat_template(None, tools)
    except ValueError as error:
        raise template_error(next(iter(str(error).splitlines()), "none is the default")) from None
    request = {
        **tokenizer.special_tokens_map,
        # As transformers does: templates tell a missing key from text, and None from neither.
        "conversations": [[{key: v for key, v in message.items() if v is not None} for message in messages]],
        "tools": None if tools is None else list(tools),
        "chat_template": template,
        "add_generation_prompt": add_generation_prompt,
    }
    return (renderer or shared_renderer()).render(request)


def answer_ending(tokenizer: Any) -> str | None:
    """What the template writes after an answer; None where it can't write a question and an answer."""
    messages = [{"role": "user", "content": MARKER}, {"role": "assistant", "content": MARKER}]
    try:
        text = render_chat(tokenizer, messages, add_generation_prompt=False)
    except ChatError:
        return None
    return text.rpartition(MARKER)[2] if MARKER in text else None


def end_of_turn(tokenizer: Any) -> int | None:
    """The token that ends an answer: the first special or added one after it, or without a template the tokenizer's.

    None where an answer has no such end.
    """
    if not tokenizer.chat_template:
        return tokenizer.eos_token_id
    ending = answer_ending(tokenizer)
    if not ending:
        return None
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = tokenizer(ending, add_special_tokens=False, verbose=False)["input_ids"]
    return next((token for token in ids if token in special), None)


def stop_tokens(loaded: LoadedModel, *, chat: bool) -> list[int]:
    """The tokens that end a generated text, ascending.

    They are the generation config's (the config's where it names none), the tokenizer's end-of-sequence token, and in a
    chat the token that ends an answer.

    Args:
        loaded: the model with its tokenizer.
        chat: the text is an answer.
    """
    stored = json.loads(loaded.model.origin.generation or "{}").get("eos_token_id")
    stored = getattr(loaded.config, "eos_token_id", None) if stored is None else stored
    tokens = {*([stored] if isinstance(stored, int) else stored or []), loaded.tokenizer.eos_token_id}
    tokens |= {end_of_turn(loaded.tokenizer)} if chat else set()
    # A token without a row in the vocabulary can't be generated.
    return sorted(token for token in tokens - {None} if token < loaded.config.vocab_size)


def chat_generation(loaded: LoadedModel) -> str:
    """A generation_config.json, as text, that ends a text where a chat's answer ends.

    It is the checkpoint's own with all of `stop_tokens`. A checkpoint without one gets its config's special tokens,
    which transformers reads in its place.
    """
    own = loaded.model.origin.generation
    special = {name: getattr(loaded.config, name, None) for name in ("bos_token_id", "pad_token_id")}
    content = {name: token for name, token in special.items() if token is not None} if own is None else json.loads(own)
    stops = stop_tokens(loaded, chat=True)
    content |= {"eos_token_id": stops[0] if len(stops) == 1 else stops} if stops else {}
    return json.dumps(content, indent=2) + "\n"


def describe_format(tokenizer: Any) -> str | None:
    """What a user has to know of how chats are written before training on them; None for the common case."""
    if not tokenizer.chat_template:
        return (
            "The tokenizer has no chat template: a chat is written as its question, a line break, its answer and "
            f"{tokenizer.eos_token!r}."
        )
    if answer_ending(tokenizer) is None or end_of_turn(tokenizer) is not None:
        return None
    token = "a token of the vocabulary" if tokenizer.eos_token is None else repr(tokenizer.eos_token)
    return (
        "Warning: the chat template writes no token that ends an answer, so the model does not learn where to stop. "
        f"Let the template write {token} after each answer."
    )
