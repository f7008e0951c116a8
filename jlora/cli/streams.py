"""Standard input and output as they are in real shells: closed pipes, full disks, locales without UTF-8."""

import contextlib
import io
import json
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from jlora.errors import JloraError, JloraOSError, JloraValueError

UTF8 = "set PYTHONUTF8=1, or a UTF-8 locale such as LC_ALL=C.UTF-8."


class Terminal(Console):
    """A console that falls silent when its pipe is closed: a training run goes on, for its files are its result."""

    def on_broken_pipe(self) -> None:
        """Discards what is printed from now on."""
        self.quiet = True
        discard_output()


class PythonThreadsOnly:
    """A stream that drops what threads outside Python's own list write.

    When a checkpoint fails, TensorStore's threads print a traceback ("Event loop is closed") for every write that is
    still pending. The failure itself is raised in a Python thread, and printed once.

    Args:
        stream: where all other threads write.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Writes a text, or drops it."""
        own = threading.get_ident()
        if any(thread.ident == own for thread in threading.enumerate()):
            return self.stream.write(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def prepare_streams() -> None:
    """Prepares the standard streams of a command.

    A character that the locale can't express is written as its escape, and only Python's threads write errors.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A stream that became a pipe after Python opened it as a file can't be reconfigured; it prints as before.
            with contextlib.suppress(OSError):
                stream.reconfigure(errors="backslashreplace")
    if sys.stderr is not None and not isinstance(sys.stderr, PythonThreadsOnly):
        sys.stderr = PythonThreadsOnly(sys.stderr)


def flush_output() -> None:
    """Writes what is buffered.

    Raises:
        BrokenPipeError: nobody reads any more.
        OSError: the output can't be written, as on a full disk.
    """
    if sys.stdout is not None:
        sys.stdout.flush()


def discard_output() -> None:
    """Sends the standard output nowhere, so that the interpreter's last flush can't fail."""
    try:
        descriptor = sys.stdout.fileno()
    except (AttributeError, io.UnsupportedOperation):
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def report(text: str) -> None:
    """Prints a message to the standard error; one that nobody can read is dropped."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        return
    finally:
        try:
            flush_output()
        except OSError:
            discard_output()


def json_line(value: Any) -> str:
    """A value as one line of JSON, in ASCII where the standard output is not UTF-8."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "")
    return json.dumps(value, ensure_ascii=encoding != "utf8")


def read_input(who: str) -> str:
    """The standard input as UTF-8, whatever the locale; empty where it is closed.

    Raises:
        ValueError: it is not UTF-8.
    """
    if sys.stdin is None:
        return ""
    buffer = getattr(sys.stdin, "buffer", None)
    if buffer is None:
        return sys.stdin.read()
    try:
        return buffer.read().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        problem = f"the standard input is not UTF-8: byte {error.start}."
        raise JloraValueError(who, problem, [], "convert it, as with iconv -t utf-8.") from None


def decode_arguments(who: str, texts: Sequence[str]) -> list[str]:
    """Texts of the command line as UTF-8, whatever the locale.

    Raises:
        ValueError: some are not UTF-8.
    """
    decoded, wrong = [], []
    for n, text in enumerate(texts, 1):
        try:
            # Python keeps bytes that the locale can't read as lone surrogates.
            decoded.append(os.fsencode(text).decode("utf-8") if not is_unicode(text) else text)
        except UnicodeError:
            wrong.append(f"text {n}: {text!a}")
    if wrong:
        raise JloraValueError(who, "the command line is not UTF-8.", wrong, UTF8)
    return decoded


def is_unicode(text: str) -> bool:
    """Whether a string holds no lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def describe_error(error: OSError | UnicodeError) -> JloraError:
    """The error in jlora's form, for what the system or the locale refuses where the code at hand has none."""
    if isinstance(error, UnicodeEncodeError):
        characters = ascii(error.object[error.start : error.end])
        problem = f"the locale's encoding {error.encoding} can't express {characters}."
        return JloraValueError("jlora", problem, [ascii(error.object)[:200]], UTF8)
    if isinstance(error, UnicodeDecodeError):
        problem = f"bytes that are not {error.encoding}: {error.object[error.start : error.end]!r}."
        return JloraValueError("jlora", problem, [], "fetch the file again, or convert it to UTF-8.")
    if isinstance(error, UnicodeError):
        return JloraValueError("jlora", f"{error}.", [], UTF8)
    reason = error.strerror or str(error) or type(error).__name__
    name = "" if error.filename is None else f"{error.filename}: "
    return JloraOSError("jlora", f"{name}{reason}.", [], "check the path, its permissions and the disk's free space.")
