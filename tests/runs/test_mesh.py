"""Runs on several devices and in several processes come to what one device comes to."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_job
from tiny_job import change, lines

STEPS, STOP = 18, 7
# One process with 8 devices runs the job on one of them, on a mesh, and begun on one mesh and ended on another.
ON_MESHES = f"""
import signal, sys
from jlora.cli.main import main
from jlora.runs.engine import History, Step

job, out = sys.argv[1:]
add = History.add

def run(name, *mesh):
    return main(["train", job, "--output.folder", f"{{out}}/{{name}}", *mesh])

def stop(history, event):
    add(history, event)
    if isinstance(event, Step) and event.step == {STOP}:
        signal.raise_signal(signal.SIGTERM)

assert run("one") == 0
assert run("mesh", "--run.mesh", "data=4,model=2") == 0
History.add = stop
assert run("moved", "--run.mesh", "data=4,model=2") == 143
History.add = add
assert run("moved", "--run.mesh", "data=2") == 0
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mesh")
    toml = tiny_job.make_other_job(folder / "job", tiny_job.make_llama(folder / "model"), "instruction")
    change(toml, "epochs = 6", f"steps = {STEPS}\naccumulate = 2")
    change(toml, "log_every = 3", "log_every = 1")
    # What the order of a sum changes may not grow over the steps.
    change(toml, "learning_rate = 0.02", "learning_rate = 0.002")
    return toml


@pytest.fixture(scope="module")
def found(job, cache):
    """The folder of runs of the one job."""
    command = [sys.executable, "-c", ON_MESHES, str(job), str(job.parent)]
    ended = subprocess.run(command, env=tiny_job.environment(cache, 8), capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return job.parent


def same_losses(run: Path, one: Path) -> None:
    """Every loss of a run is that of one device, to 1e-5."""
    there, expected = lines(run), lines(one)
    assert [(line["event"], line["step"]) for line in there] == [(line["event"], line["step"]) for line in expected]
    for line, other in zip(there, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-5), line["step"]
    assert expected[0]["loss"] - expected[-1]["loss"] > 0.1


def layout(run: Path) -> tuple:
    """What the newest checkpoint is made of: its items, its leaves with shape and dtype, and its notes' names."""
    folder = run / "checkpoints" / str(STEPS)
    leaves = ocp.StandardCheckpointer().metadata(folder.absolute() / "state").item_metadata
    flat = {path: (leaf.shape, np.dtype(leaf.dtype)) for path, leaf in ocp.tree.to_flat_dict(leaves.tree).items()}
    notes = json.loads((folder / "notes" / "metadata").read_text())
    return sorted(os.listdir(folder)), flat, sorted(notes), notes["data"]


@pytest.mark.parametrize("name", ["mesh", "moved"])
def test_a_mesh_of_eight_devices_and_a_change_of_mesh_leave_losses_and_checkpoints_as_they_are(name, found):
    same_losses(found / name, found / "one")
    assert layout(found / name) == layout(found / "one")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_have_the_losses_and_the_checkpoints_of_one(found, job, cache):
    run, port = job.parent / "two", free_port()
    processes = []
    for own in range(2):
        address = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(own)}
        env = tiny_job.environment(cache, 1, **address)
        processes.append(tiny_job.start("train", job, "--run.mesh", "data=2", "--output.folder", run, env=env))
    said = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    same_losses(run, found / "one")
    assert layout(run) == layout(found / "one")
    # One of the two speaks.
    assert sum("Written to" in words for words in said) == 1
