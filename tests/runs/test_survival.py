"""Runs that are killed, stopped, or out of room go on, and come to the bits of a run that never was."""

import itertools
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_job
from tiny_job import change, lines

from jlora.cli.main import main
from jlora.runs import engine as fit
from jlora.runs import folder as runs

KILLS = 20
ROWS = 72  # one to a step: a run stops in the middle of an epoch, wherever it does
STEPS = 2 * ROWS
FLAGS = ("--run.save-every", "2", "--run.evaluate-every", "24", "--output.log-every", "3")
# A process that has imported all there is, and has no backend yet: what it forks need not import it again.
NURSERY = """
import json, os, sys
import grain, orbax.checkpoint, transformers
import jlora.cli.train
from jlora.cli.main import main
for line in sys.stdin:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 1)
        os.dup2(write, 2)
        code = main(json.loads(line))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    os.close(write)
    print(child, flush=True)
    with open(read) as said:
        words = said.read()
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), words]), flush=True)
"""
quick = tiny_job.quick


class Nursery:
    """Runs the command in one forked process after the other."""

    def __init__(self, environment: dict[str, str]):
        self.environment = environment
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", NURSERY], env=environment, **pipes)

    def start(self, *argv: object) -> int:
        """The number of a process that runs a command."""
        self.process.stdin.write(json.dumps(list(map(str, argv))) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self) -> tuple[int, str]:
        """How it ended, and what it said."""
        code, said = json.loads(self.process.stdout.readline())
        return code, said


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    found = Nursery(tiny_job.environment(tmp_path_factory.mktemp("cache")))
    yield found
    found.process.communicate()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_job.make_model(tmp_path_factory.mktemp("base") / "model")


def make_job(folder: Path, model: Path) -> Path:
    toml = tiny_job.make_job(folder / "job", model)
    change(toml, "batch_size = 8", "batch_size = 1")
    change(toml, "epochs = 5", "epochs = 2")
    return toml


@pytest.fixture(scope="module")
def undisturbed(model, nursery, tmp_path_factory):
    """The folder of a run that nothing happened to."""
    toml = make_job(tmp_path_factory.mktemp("undisturbed"), model)
    nursery.start("train", toml, *FLAGS)
    code, said = nursery.end()
    assert code == 0, said
    return toml.parent / "run"


def until(true: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


def newest(run: Path) -> int:
    """The step of the newest checkpoint, 0 where there is none."""
    folder = run / "checkpoints"
    return (
        max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=0) if folder.is_dir() else 0
    )


def newest_state(run: Path, step: int | None = None) -> dict:
    """What a checkpoint holds of the state, by default the newest."""
    return ocp.StandardCheckpointer().restore((run / "checkpoints" / str(step or newest(run)) / "state").absolute())


def same(run: Path, other: Path) -> None:
    """All that a run came to is what another did, to the bit, but for seconds and memory."""
    assert (run / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    assert newest(run) == newest(other) == STEPS
    notes, expected = (folder / "checkpoints" / str(STEPS) / "notes/metadata" for folder in (run, other))
    assert json.loads(notes.read_text()) == json.loads(expected.read_text())
    same_leaves(newest_state(run), newest_state(other))
    same_leaves(runs.load_run(run).params, runs.load_run(other).params)
    result, expected = (json.loads((folder / "result.json").read_text()) for folder in (run, other))
    for name in ("seconds", "peak_memory_bytes", "adapter_bytes"):
        del result[name], expected[name]
    assert result == expected


def same_leaves(one: object, other: object) -> None:
    leaves, others = (jax.tree_util.tree_leaves_with_path(tree) for tree in (one, other))
    assert len(leaves) == len(others) > 10
    for (path, leaf), (place, expected) in zip(leaves, others, strict=True):
        assert (path, leaf.dtype) == (place, expected.dtype)
        assert np.asarray(leaf).tobytes() == np.asarray(expected).tobytes(), path


def test_a_run_killed_20_times_ends_in_the_bits_of_one_that_never_was(model, nursery, undisturbed, tmp_path):
    toml = make_job(tmp_path, model)
    run, draw, begun = toml.parent / "run", random.Random(0), []
    for n in range(KILLS):
        before = newest(run)
        begun.append(before)
        process = nursery.start("train", toml, *FLAGS)
        if n % 5 == 2:
            # Whatever it is at: reading, compiling, restoring, or training again.
            time.sleep(draw.uniform(0, 3))
        else:
            on = before + draw.choice([2, 4])
            until(lambda on=on: newest(run) >= on)
            time.sleep(draw.uniform(0, 0.03))
        os.kill(process, signal.SIGKILL)
        code, said = nursery.end()
        assert code == -signal.SIGKILL, said
    assert len(set(begun)) >= KILLS * 4 // 5
    assert newest(run) % ROWS
    nursery.start("train", toml, *FLAGS)
    code, said = nursery.end()
    assert code == 0, said
    same(run, undisturbed)
    assert sorted(os.listdir(run / "checkpoints")) == sorted(os.listdir(undisturbed / "checkpoints"))


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_in_the_middle_of_an_epoch_and_the_run_goes_on(
    number, code, model, nursery, undisturbed, tmp_path
):
    toml = make_job(tmp_path, model)
    run, flags = toml.parent / "run", FLAGS[2:]
    process = tiny_job.start("train", toml, *flags, env=nursery.environment)
    until(lambda: (run / "metrics.jsonl").exists() or process.poll() is not None)
    process.send_signal(number)
    said, _ = process.communicate()
    assert process.returncode == code, said
    assert "Traceback" not in said
    (step,) = re.findall(r"jlora: stopped after step (\d+); the same command goes on from there\.", said)
    assert newest(run) == int(step) < ROWS
    nursery.start("train", toml, *flags)
    ended, said = nursery.end()
    assert ended == 0, said
    assert f"Going on after step {step}." in said
    same(run, undisturbed)


@pytest.mark.parametrize("save_every", [2, 1000])
def test_a_disk_that_fills_up_is_one_error_and_loses_nothing(save_every, model, nursery, undisturbed, tmp_path):
    toml = make_job(tmp_path, model)
    run, flags = toml.parent / "run", (*FLAGS[2:], "--run.save-every", save_every, "--output.tensorboard")
    process = nursery.start("train", toml, *flags)
    until(lambda: newest(run) >= 24)
    # From here on no file grows, as if there were no block left.
    resource.prlimit(process, resource.RLIMIT_FSIZE, (0, 0))
    code, said = nursery.end()
    assert code == 2, said
    assert "Traceback" not in said
    assert re.search(r"can't be written.*\n  .*\nFix: free disk space, then rerun the same command to resume", said)
    nursery.start("train", toml, *flags)
    code, said = nursery.end()
    assert code == 0, said
    assert re.search(r"Going on after step (\d+)", said)
    same(run, undisturbed)


def test_steps_that_are_not_finite_are_left_out_and_too_many_stop_the_run_in_the_last_good_state(
    model, tmp_path, monkeypatch, capsys
):
    put, bad, calls = fit.Job.put, set(), itertools.count()

    def damaged(job, batch):
        # The first batch is only looked at.
        spoilt = {"weights": batch["weights"] * math.nan} if next(calls) in bad else {}
        return put(job, batch | spoilt)

    monkeypatch.setattr(fit.Job, "put", damaged)
    toml = tiny_job.make_job(tmp_path / "job", model)
    run, flags = toml.parent / "run", ("--run.save-every", "4", "--optimisation.epochs", "2")
    bad.add(5)
    assert main(["train", str(toml), *flags, "--output.folder", str(tmp_path / "one")]) == 0
    steps = [line for line in lines(tmp_path / "one") if line["event"] == "step"]
    assert [line["skipped"] for line in steps] == [0, 0, *[1] * (len(steps) - 2)]
    assert all(line["loss"] > 0 for line in steps)
    capsys.readouterr()
    bad.update(range(5, 99))
    calls = itertools.count()
    assert main(["train", str(toml), *flags, "--optimisation.max-skipped", "3"]) == 2
    said = capsys.readouterr().err
    assert "train: 4 steps of 8 had a loss or gradient that is not finite.\nFix: lower learning_rate" in said
    good, kept = newest_state(run, 4), newest_state(run, 8)
    for name in ("adapters", "opt_state"):
        same_leaves(kept[name], good[name])
    assert (int(kept["step"]), int(kept["skipped"])) == (8, 4)
    # Mended, it goes on.
    bad.clear()
    assert main(["train", str(toml), *flags, "--optimisation.max-skipped", "9"]) == 0
    assert "Going on after step 8." in capsys.readouterr().out
    assert lines(run)[-1]["step"] == 18
