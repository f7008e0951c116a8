"""The commands in real shells: closed pipes, full disks, closed streams, locales without UTF-8."""

import _thread
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny_job

import jlora
from jlora.cli import streams
from jlora.cli.main import main
from jlora.cli.streams import Terminal, decode_arguments, describe_error, json_line, prepare_streams, read_input

ROOT = Path(__file__).parents[2]
quick = tiny_job.quick


def shell(command: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a line of bash in which `$JLORA` is the command."""
    env = os.environ | {"JLORA": f"{sys.executable} -m jlora", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(["bash", "-c", command], capture_output=True, env=env, timeout=120)


def test_the_version_is_that_of_the_package():
    found = shell("$JLORA --version")
    assert (found.returncode, found.stdout) == (0, f"jlora {jlora.__version__}\n".encode())
    assert isinstance(jlora.__version__, str) and jlora.__version__[0].isdigit()


def test_a_closed_pipe_is_a_clean_exit_and_a_full_disk_one_message():
    script = (
        "$JLORA train --help | true; echo ${PIPESTATUS[0]}; $JLORA --version >/dev/full; echo $?; "
        "$JLORA --version >&-; echo $?"
    )
    found = shell(script)
    assert found.stdout.split() == [b"0", b"2", b"0"]
    assert found.stderr.startswith(b"jlora: No space left on device.\nFix: ") and found.stderr.count(b"\n") == 2


def broken() -> io.TextIOWrapper:
    """A stream whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return io.TextIOWrapper(os.fdopen(writer, "wb"), encoding="utf-8", write_through=True)


def test_a_run_goes_on_when_nobody_reads_what_it_prints(monkeypatch):
    with broken() as stream:
        monkeypatch.setattr("sys.stdout", stream)
        console = Terminal()
        console.print("one")
        console.print("two")
        # What others print goes nowhere too.
        print("three", flush=True)
    assert console.quiet


def test_a_command_whose_reader_has_gone_ends_with_0(monkeypatch, capsys):
    with broken() as stream:
        monkeypatch.setattr("sys.stdout", stream)
        assert main(["advise", "--task", "causal_lm", "--examples", "100"]) == 0
    assert capsys.readouterr().err == ""


def test_a_locale_without_utf8_loses_no_character(monkeypatch):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", errors="strict")
    monkeypatch.setattr("sys.stdout", stream)
    streams.prepare_streams()
    print("ü", flush=True)
    print(json_line({"text": "ü😀"}), flush=True)
    first, second = raw.getvalue().decode("ascii").splitlines()
    assert first == "\\xfc" and json.loads(second) == {"text": "ü😀"}
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert json_line("ü") == '"ü"'


def test_texts_of_the_command_line_are_utf8_whatever_the_locale():
    kept = "ü".encode().decode("ascii", "surrogateescape")
    code = "import sys; from jlora.cli.streams import decode_arguments as d; print(ascii(d('x', sys.argv[1:])))"
    found = shell(f'{sys.executable} -c "{code}" ü "$(printf %b a)"', LC_ALL="C", PYTHONUTF8="0")
    assert found.stdout == b"['\\xfc', 'a']\n", found.stderr
    assert decode_arguments("x", ["ü", kept]) == ["ü", "ü"]
    with pytest.raises(ValueError, match=r"x: the command line is not UTF-8\.\n  text 2: 'a\\udcff'\nFix: "):
        decode_arguments("x", ["ü", "a\udcff"])


def test_the_standard_input_is_utf8_whatever_the_locale(monkeypatch):
    def give(content: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))

    give("\ufeffü\r\nb".encode())
    assert read_input("x") == "ü\nb"
    give(b"ab\xff")
    with pytest.raises(ValueError, match=r"x: the standard input is not UTF-8: byte 2\.\nFix: "):
        read_input("x")
    monkeypatch.setattr("sys.stdin", None)
    assert read_input("x") == ""


def test_what_the_system_or_the_locale_refuses_is_one_message_with_a_fix(tmp_path):
    def raised(act) -> str:
        with pytest.raises((OSError, UnicodeError)) as caught:
            act()
        return str(describe_error(caught.value))

    gone = tmp_path / "gone"
    assert raised(gone.read_text) == (
        f"jlora: {gone}: No such file or directory.\nFix: check the path, its permissions and the disk's free space."
    )
    assert raised(lambda: "ü".encode("ascii")).startswith(
        "jlora: the locale's encoding ascii can't express '\\xfc'.\n  '\\xfc'\nFix: set PYTHONUTF8=1"
    )
    assert raised(lambda: b"a\xff".decode()).startswith("jlora: bytes that are not utf-8: b'\\xff'.\nFix: ")


def test_only_pythons_threads_write_errors(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    prepare_streams()
    prepare_streams()
    ended = threading.Event()

    def write_from_outside() -> None:
        print("Traceback", file=sys.stderr)
        ended.set()

    # A thread that the module threading does not know, as those of a library in C++.
    _thread.start_new_thread(write_from_outside, ())
    assert ended.wait(60)
    thread = threading.Thread(target=lambda: print("from a thread", file=sys.stderr))
    thread.start()
    thread.join()
    print("from the main thread", file=sys.stderr)
    assert stream.getvalue() == "from a thread\nfrom the main thread\n"
