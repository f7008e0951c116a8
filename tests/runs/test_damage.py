"""Folders with one damaged file: every command ends in one clear error or in its usual result, never in a traceback.

A new kind of folder is a `Case` more: an undamaged folder, the commands that read it, and the files that have a digest.
"""

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import pytest
import tiny_job

from jlora.cli.main import DONE, MISTAKE, main

QUESTION = "problem with my courier"
REPORTED = re.compile(r"A damaged checkpoint was deleted: step \d+")
pytestmark = pytest.mark.slow
quick = tiny_job.quick


@dataclass(frozen=True)
class Command:
    """A command that reads a folder.

    Attributes:
        arguments: its arguments, from the folder and a path where it may write.
        result: what is compared with the undamaged folder's, from the folder, that path and what was printed.
    """

    arguments: Callable[[Path, Path], list[str]]
    result: Callable[[Path, Path, str], Any] = lambda folder, out, printed: printed


@dataclass(frozen=True)
class Case:
    """A folder, and what reads it.

    Attributes:
        folder: an undamaged one.
        commands: those that read it, by name.
        files: the files to damage, relative to the folder.
        has_digest: whether a file has a digest, so that no change of it may go unseen.
        forms: the forms of damage.
    """

    folder: Path
    commands: dict[str, Command]
    files: list[str]
    has_digest: Callable[[str], bool]
    forms: tuple[str, ...] = ("flipped", "truncated", "emptied", "deleted")


def damage(file: Path, form: str) -> None:
    """Damages a file in one form."""
    content = bytearray(file.read_bytes())
    if form == "deleted":
        file.unlink()
    elif form == "flipped" and content:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[: len(content) // 2] if form == "truncated" else b"")


def run_commands(case: Case, folder: Path, out: Path, capture: Any) -> Iterator[tuple[str, int, str, Any]]:
    """Runs every command on a folder: its name, exit code, all that it printed, and its result."""
    for name, command in case.commands.items():
        shutil.rmtree(out, ignore_errors=True)
        capture.readouterr()
        code = main(command.arguments(folder, out))
        printed, errors = capture.readouterr()
        yield name, code, printed + errors, command.result(folder, out, printed) if code == DONE else None


def examine(case: Case, scratch: Path, capture: Any) -> Counter[str]:
    """Damages each file of a folder in each form, and counts what the commands made of it.

    Detected: a command ended with one error, or reported the damage. Unseen: none did, and a result differs. Harmless:
    all results are those of the undamaged folder.
    """
    folder, out, counts, unseen = scratch / "folder", scratch / "out", Counter(), []
    shutil.copytree(case.folder, folder)
    expected = {}
    for name, code, printed, result in run_commands(case, folder, out, capture):
        assert code == DONE, f"{name} of the undamaged folder: {printed}"
        expected[name] = result
    for file, form in [(file, form) for file in case.files for form in case.forms]:
        shutil.rmtree(folder)
        shutil.copytree(case.folder, folder)
        damage(folder / file, form)
        seen, differs = False, False
        for name, code, printed, result in run_commands(case, folder, out, capture):
            where = f"{name}, {file} {form}: {printed}"
            assert "Traceback" not in printed, where
            assert code in (DONE, MISTAKE), where
            assert code == DONE or "\nFix: " in printed, where
            seen |= code == MISTAKE or REPORTED.search(printed) is not None
            differs |= code == DONE and result != expected[name]
        outcome = "detected" if seen else "unseen" if differs else "harmless"
        counts[outcome] += 1
        if outcome == "unseen":
            unseen.append(f"{file} {form}")
    shutil.rmtree(folder)
    with capture.disabled():
        print(f"\n{case.folder.name}: " + ", ".join(f"{counts[name]} {name}" for name in OUTCOMES), *unseen)
    assert not [where for where in unseen if case.has_digest(where.split()[0])]
    return counts


OUTCOMES = ("detected", "harmless", "unseen")


def files_in(folder: Path, *but: str) -> list[str]:
    """The files of a folder, without those under the names given."""
    files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return [file for file in files if not file.startswith(but)]


def digest_of(out: Path) -> dict[str, str]:
    """A digest of every file that a command wrote."""
    return {file: hashlib.sha256((out / file).read_bytes()).hexdigest() for file in files_in(out)}


def inspected(folder: Path, out: Path, printed: str) -> Any:
    return json.loads(printed)


def merged(folder: Path, out: Path, printed: str) -> Any:
    return digest_of(out)


def trained(folder: Path, out: Path, printed: str) -> Any:
    """The history of a run without notes of damage, and the arrays of its adapter."""
    adapter = json.loads((folder / "adapter" / "adapter.json").read_text())
    return [line for line in tiny_job.lines(folder) if line["event"] != "damage"], adapter["leaves"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The TOML file of a job that has been run."""
    folder = tmp_path_factory.mktemp("damage")
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))
    toml = tiny_job.make_other_job(folder / "job", tiny_job.make_model(folder / "model"), "token_classification")
    assert main(["train", str(toml), "--optimisation.epochs", "2"]) == DONE
    yield toml
    jax.config.update("jax_compilation_cache_dir", before)


PREDICT = Command(lambda folder, out: ["predict", str(folder), QUESTION, "--json"])
INSPECT = Command(lambda folder, out: ["inspect", str(folder), "--json"], inspected)


def test_a_run_folder_with_one_damaged_file(job, tmp_path, capsys):
    merge = Command(lambda folder, out: ["merge", str(folder), "--out", str(out)], merged)
    run = job.parent / "run"
    digests = {"config.toml", "labels.json", "metrics.jsonl", "result.json", "files.json"}
    case = Case(
        folder=run,
        commands={"predict": PREDICT, "inspect": INSPECT, "merge": merge},
        # What reads the checkpoints is a run that resumes.
        files=files_in(run, "checkpoints"),
        has_digest=lambda file: file in digests or file.startswith("adapter/"),
    )
    counts = examine(case, tmp_path, capsys)
    assert counts["detected"] > counts["harmless"] and counts["unseen"] == 0


def test_an_adapter_folder_with_one_damaged_file(job, tmp_path, capsys):
    model = str(job.parent.parent / "model")
    merge = Command(lambda folder, out: ["merge", str(folder), "--out", str(out), "--model", model], merged)
    adapter = job.parent / "run" / "adapter"
    commands = {"inspect": INSPECT, "merge": merge}
    case = Case(folder=adapter, commands=commands, files=files_in(adapter), has_digest=lambda file: True)
    counts = examine(case, tmp_path, capsys)
    assert counts["detected"] == sum(counts.values())


def test_a_run_that_resumes_with_one_damaged_file(job, tmp_path, capsys):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(job.parent / "run", unfinished)
    (unfinished / "result.json").unlink()
    newest = max((path for path in (unfinished / "checkpoints").iterdir()), key=lambda path: int(path.name))
    (data,) = (newest / "state" / "d").iterdir()
    checkpoint = [newest / "notes" / "metadata", newest / "state" / "manifest.ocdbt", data, newest / "files.json"]
    small = [file for file in files_in(unfinished, "checkpoints", "adapter/arrays") if not file.endswith("png")]
    command = Command(
        lambda folder, out: ["train", str(job), "--optimisation.epochs", "2", "--output.folder", str(folder)], trained
    )
    case = Case(
        folder=unfinished,
        commands={"train": command},
        files=small + [path.relative_to(unfinished).as_posix() for path in checkpoint],
        has_digest=lambda file: True,
        forms=("flipped", "deleted"),
    )
    counts = examine(case, tmp_path / "scratch", capsys)
    assert counts["detected"] > counts["harmless"] and counts["unseen"] == 0
