"""Checkpoints of a run: the newest whole one is restored, bit for bit, and damage is reported."""

import shutil

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from jlora.training.run_state import RunCheckpoints, _to_arrays
from jlora.training.step import TrainState
from jlora.tree.splitting import split
from jlora.tree.wrapping import wrap

STEPS = (2, 4, 6)


def state_at(step: int) -> TrainState:
    """A state whose every array differs from those of other steps."""
    adapters, _ = split(wrap({"dense": {"kernel": np.ones((64, 32), np.float32)}}, rank=4))
    state = TrainState.create(adapters, optax.adam(0.1), jax.random.key(step))
    draw = np.random.default_rng(step)
    values = jax.tree.map(
        lambda leaf: np.asarray(draw.normal(size=leaf.shape), leaf.dtype), (adapters, state.opt_state)
    )
    return state.replace(step=np.int32(step), adapters=values[0], opt_state=values[1], skipped=np.int32(0))


def leaves(state: TrainState) -> dict[str, bytes]:
    pairs = jax.tree_util.tree_leaves_with_path(_to_arrays(state))
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in pairs}


def restore(folder):
    checkpoints = RunCheckpoints(folder)
    try:
        return checkpoints.restore(TrainState.create(state_at(0).adapters, optax.adam(0.1), jax.random.key(0)))
    finally:
        checkpoints.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of three checkpoints, of which two are kept."""
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoints = RunCheckpoints(folder)
    for step in STEPS:
        checkpoints.save(step, state_at(step), {"written": step, "best": (0.5, -float("inf")), "losses": []})
    checkpoints.close()
    return folder


def test_the_newest_state_is_restored_bit_for_bit_with_its_notes(saved):
    state, notes, damaged = restore(saved)
    assert leaves(state) == leaves(state_at(6))
    assert notes == {"written": 6, "best": [0.5, -float("inf")], "losses": []}
    assert damaged == []


def damages(whole: bytes):
    """A file's content in every damaged form: a byte flipped, cut, emptied, and gone."""
    for place in sorted({0, len(whole) // 2, len(whole) - 1}):
        yield f"byte {place} flipped", bytes([*whole[:place], whole[place] ^ 4, *whole[place + 1 :]])
    yield from (("cut", whole[: len(whole) // 2]), ("emptied", b""), ("deleted", None))


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_restored(saved, tmp_path, capfd):
    seen = {"detected": 0, "harmless": 0}
    files = sorted(path.relative_to(saved) for path in (saved / "6").rglob("*") if path.is_file())
    cases = [(file, *form) for file in files for form in damages((saved / file).read_bytes())]
    for file, how, content in cases:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(saved, tmp_path / "run")
        (tmp_path / "run" / file).unlink()
        if content is not None:
            (tmp_path / "run" / file).write_bytes(content)
        state, notes, damaged = restore(tmp_path / "run")
        step = int(state.step)
        assert leaves(state) == leaves(state_at(step)), f"{file}, {how}: values that were never saved"
        assert notes["written"] == step
        if step == 6:
            # Orbax writes these two last, and reads neither; without the digests the files are still whole.
            harmless = {"commit_success.txt", "_CHECKPOINT_METADATA"} | ({"files.json"} if content is None else set())
            assert str(file.relative_to("6")) in harmless, f"{file}, {how}: not reported"
            seen["harmless"] += 1
        else:
            assert step == 4
            assert len(damaged) == 1 and damaged[0].startswith("step 6: "), f"{file}, {how}: not reported"
            assert not (tmp_path / "run" / "6").exists()
            seen["detected"] += 1
    assert seen["detected"] > 4 * seen["harmless"] > 0
    assert "Traceback" not in "".join(capfd.readouterr())


def test_where_no_checkpoint_is_whole_all_reasons_are_given(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    for step in (4, 6):
        file = tmp_path / "run" / str(step) / "notes" / "metadata"
        file.write_text(file.read_text().replace(f'"written": {step}', f'"written": {step + 1}'))
    words = [rf"step {step}: 1 file damaged or missing: notes/metadata\n" for step in (6, 4)]
    with pytest.raises(ValueError, match=rf"no checkpoint in .* can be read\.\n  {words[0]}  {words[1]}Fix: "):
        restore(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["4", "6"]


def test_a_checkpoint_of_an_earlier_version_without_digests_is_restored(tmp_path):
    with ocp.CheckpointManager(tmp_path) as manager:
        items = {"state": ocp.args.StandardSave(_to_arrays(state_at(3))), "notes": ocp.args.JsonSave({"written": 3})}
        manager.save(3, args=ocp.args.Composite(**items))
    state, notes, damaged = restore(tmp_path)
    assert leaves(state) == leaves(state_at(3))
    assert (notes, damaged) == ({"written": 3}, [])


def test_a_folder_name_that_orbax_cannot_use_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint: Orbax can't use the path .*\n  'a\[1\]'  is a glob pattern"):
        RunCheckpoints(tmp_path / "a[1]")
    assert not list(tmp_path.iterdir())
