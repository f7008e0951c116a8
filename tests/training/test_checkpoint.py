"""Adapter checkpoints: a save is restored completely or not at all, and only on the base of the adapter."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import core, nnx

from jlora.training import checkpoint
from jlora.training.checkpoint import restore_adapter, save_adapter
from jlora.training.step import TrainState, make_train_step
from jlora.transform.adapt import adapt
from jlora.tree.paths import flatten, map_with_path
from jlora.tree.splitting import join, split
from jlora.tree.wrapping import unwrap, wrap

CONTAINERS = {"dict": dict, "FrozenDict": core.freeze, "State": nnx.State}


def base_params(kind="dict", seed=0):
    draw = lambda *shape: jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))
    params = {
        "dense": {"kernel": draw(12, 10), "bias": draw(10)},
        "attention": {
            **{name: {"kernel": draw(10, 2, 5)} for name in ("query", "key", "value")},
            "out": {"kernel": draw(2, 5, 10)},
        },
        "layers": {"kernel": draw(3, 10, 10)},
        "head": {"kernel": draw(10, 4).astype(jnp.bfloat16), "bias": draw(4)},
        "count": jnp.asarray(3),
    }
    return CONTAINERS[kind](params)


def wrapped(base):
    targets = {("dense", "layers"): 2, ("query", "out"): 3}
    params = wrap(base, alpha=5, targets=targets, layout={"layers/kernel": "sio"})
    draw = lambda path, leaf: jnp.asarray(np.random.default_rng(len(path)).normal(size=leaf.shape), leaf.dtype)
    return map_with_path(lambda path, leaf: draw(path, leaf) if path.endswith("_lora_b") else leaf, params)


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for path, leaf in flatten(want).items():
        other = flatten(got)[path]
        assert other.dtype == leaf.dtype and np.asarray(other).tobytes() == np.asarray(leaf).tobytes(), path


@pytest.fixture
def saved(tmp_path):
    base = base_params()
    params = wrapped(base)
    save_adapter(tmp_path / "run" / "adapter", params)
    return tmp_path / "run" / "adapter", base, params


def arrays_of(folder):
    [found] = folder.glob("arrays-*")
    return found


@pytest.mark.parametrize("kind", CONTAINERS)
def test_what_is_saved_is_restored_bit_for_bit_in_the_bases_containers(kind, tmp_path):
    base = base_params(kind)
    params = wrapped(base)
    params = map_with_path(lambda path, leaf: leaf + 1 if path.startswith("head") else leaf, params)
    save_adapter(str(tmp_path), params, train=["head"])
    restored = restore_adapter(str(tmp_path), base)
    assert isinstance(restored, type(base))
    same(restored, params)


def test_an_nnx_models_state_with_its_dropout_generator_is_restored(tmp_path):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.dense, self.dropout = nnx.Linear(6, 4, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.dense(x))

    model = Model(nnx.Rngs(0))
    params = wrap(nnx.state(model), rank=2)
    save_adapter(tmp_path, params)
    model(jnp.ones((1, 6)))  # moves the generator's count on
    restored = restore_adapter(tmp_path, nnx.state(model))
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    assert bool((restored["dense"]["kernel_lora_a"][...] == params["dense"]["kernel_lora_a"][...]).all())


def test_only_adapters_and_fully_trained_leaves_are_stored(tmp_path):
    save_adapter(tmp_path, wrapped(base_params()), train=["head"])
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        stored = flatten(checkpointer.metadata(arrays_of(tmp_path)).item_metadata.tree)
    kernels = ("dense", "attention/query", "attention/out", "layers")
    lora = {f"{kernel}/kernel_lora_{leaf}" for kernel in kernels for leaf in ("a", "b", "scaling")}
    assert set(stored) == lora | {"head/kernel", "head/bias"}
    metadata = json.loads((tmp_path / "adapter.json").read_text())
    assert metadata["targets"]["dense/kernel"] == {"rank": 2, "alpha": 5.0, "scaling": 2.5}
    assert metadata["targets"]["layers/kernel"]["scaling"] == [2.5] * 3
    assert metadata["train"] == ["head/kernel", "head/bias"]
    assert metadata["libraries"]["jax"] == jax.__version__


def test_a_rank_8_adapter_of_a_22m_parameter_encoder_is_under_2_mb(tmp_path):
    sides = {"query": (384, 384), "key": (384, 384), "value": (384, 384), "out": (384, 384)}
    sides |= {"up": (384, 1536), "down": (1536, 384)}
    layer = lambda: {name: {"kernel": np.zeros(shape, np.float32)} for name, shape in sides.items()}
    params = wrap({f"layer_{n}": layer() for n in range(6)}, rank=8)
    draw = np.random.default_rng(0).standard_normal
    save_adapter(tmp_path, jax.tree.map(lambda leaf: draw(leaf.shape, np.float32) if 8 in leaf.shape else leaf, params))
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 2e6


def network(params, x):
    x = jnp.tanh(x @ params["dense"]["kernel"] + params["dense"]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def test_saved_restored_and_continued_equals_never_stopped(tmp_path):
    base = base_params()
    tx = optax.sgd(0.1)
    forward = adapt(network)
    loss = lambda params, x, key: jnp.mean((forward(params, x) - jax.random.normal(key, (8, 4))) ** 2)
    step = make_train_step(loss, tx)
    rows = jax.random.normal(jax.random.key(1), (8, 12))

    def run(state, frozen, steps):
        for _ in range(steps):
            state, _ = step(state, frozen, rows)
        return state

    adapters, frozen = split(wrapped(base), ["head"])
    straight = run(TrainState.create(adapters, tx, jax.random.key(2)), frozen, 6)
    state = run(TrainState.create(adapters, tx, jax.random.key(2)), frozen, 3)
    save_adapter(tmp_path, join(state.adapters, frozen), train=["head"])
    adapters, restored_frozen = split(restore_adapter(tmp_path, base), ["head"])
    continued = run(state.replace(adapters=adapters), restored_frozen, 3)
    same(continued.adapters, straight.adapters)
    assert step._cache_size() == 1


def test_saving_again_leaves_the_new_one_alone_and_other_files_where_they_are(saved):
    folder, base, params = saved
    others = ["arrays-of-mine", "arrays-0.orbax-checkpoint-tmp", f"arrays-{'0' * 32}"]
    for name in others:
        (folder / name).mkdir()
        (folder / name / "notes.txt").write_text("mine")
    (folder / "arrays-list.txt").write_text("mine")
    newer = jax.tree.map(lambda leaf: leaf * 1, params)
    newer["dense"]["kernel_lora_b"] += 1
    save_adapter(folder, newer)
    same(restore_adapter(folder, base), newer)
    saved_arrays = json.loads((folder / "adapter.json").read_text())["arrays"]
    assert {p.name for p in folder.iterdir()} == {"adapter.json", saved_arrays, "arrays-list.txt", *others}
    assert all((folder / name / "notes.txt").read_text() == "mine" for name in others)


@pytest.mark.parametrize("stage", ["arrays", "sync", "metadata", "rename"])
def test_a_save_that_fails_at_any_stage_leaves_the_last_good_one(stage, saved, monkeypatch):
    folder, base, params = saved
    where, name = {
        "arrays": (checkpoint.ocp.PyTreeCheckpointHandler, "finalize"),
        "sync": (os, "fsync"),
        "metadata": (checkpoint, "_replace"),
        "rename": (os, "replace"),
    }[stage]

    whole = getattr(where, name)

    def fail(*args, **kwargs):
        # The note of what is being saved is written before the arrays, and fails in a test of its own.
        if stage != "arrays" and len(list(folder.glob("arrays-*"))) == 1:
            return whole(*args, **kwargs)
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(where, name, fail)
        with pytest.raises(OSError, match="disk full"):
            save_adapter(folder, jax.tree.map(lambda leaf: leaf * 2, params))
    same(restore_adapter(folder, base), params)
    save_adapter(folder, params)
    assert len(list(folder.iterdir())) == 2, "the next save clears away what the failed one left"


def test_a_save_that_fails_before_its_arrays_leaves_the_last_good_one(saved, monkeypatch):
    folder, base, params = saved

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            save_adapter(folder, params)
    same(restore_adapter(folder, base), params)
    assert len(list(folder.glob("arrays-*"))) == 1


def test_a_link_that_the_record_names_is_kept_and_so_is_what_it_leads_to(saved, tmp_path):
    folder, base, params = saved
    elsewhere = tmp_path / "elsewhere"
    arrays = arrays_of(folder)
    arrays.rename(elsewhere)
    arrays.symlink_to(elsewhere)
    save_adapter(folder, params)
    assert len(list(elsewhere.iterdir())) > 1
    same(restore_adapter(folder, base), params)


OUTSIDE = {
    "absolute": lambda folder: rewrite(folder, lambda m: m.update(arrays="/")),
    "climbs": lambda folder: rewrite(folder, lambda m: m.update(arrays="../adapter")),
    "nested": lambda folder: rewrite(folder, lambda m: m.update(arrays=f"{m['arrays']}/..")),
    "a file climbs": lambda folder: rewrite(folder, lambda m: m["files"].update({"../../secret": "0"})),
    "a file is absolute": lambda folder: rewrite(folder, lambda m: m["files"].update({"/etc/hostname": "0"})),
    "a linked folder": lambda folder: link(arrays_of(folder), folder.parent / "elsewhere"),
    "a linked file": lambda folder: link(arrays_of(folder) / "_METADATA", folder.parent / "elsewhere"),
}


def link(path, elsewhere):
    """Moves a file or folder, and leaves a link to it."""
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("how", OUTSIDE)
def test_a_record_that_leads_outside_its_folder_is_refused_before_anything_is_read(how, saved, monkeypatch):
    folder, base, params = saved
    (folder.parent / "secret").write_text("mine")
    OUTSIDE[how](folder)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "file_digest", lambda file: pytest.fail(f"{file} was read"))
        with pytest.raises(ValueError, match=r"names 1 path outside its folder\.\n  .*\nFix: don't use this adapter"):
            restore_adapter(folder, base)
    # A save over it removes nothing of what the record named.
    save_adapter(folder, params)
    assert (folder.parent / "secret").read_text() == "mine"
    if how.startswith("a linked"):
        assert (folder.parent / "elsewhere").exists()


def test_an_adapter_in_the_cache_of_the_hub_whose_files_are_links_is_restored(saved, tmp_path):
    folder, base, params = saved
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for n, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        shutil.copy(file, blobs / str(n))
        place = snapshot / file.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(blobs / str(n), place.parent))
    same(restore_adapter(snapshot, base), params)


@pytest.mark.parametrize(
    "name", ["a[v1]", "a*", "a?b", "a\\b", "gs:", "gs:/x", "a\udcff", "é中 #%20|~$'\"", "a:b", "s3:"]
)
def test_a_folder_of_any_name_restores_what_was_saved_or_is_refused_before_it_is_written(name, saved, tmp_path):
    folder, base, params = saved
    try:
        save_adapter(tmp_path / name / "adapter", params)
    except ValueError as error:
        assert re.match(r"save_adapter: Orbax can't use the path .*\n  .*\nFix: rename the folder", str(error))
        assert os.listdir(tmp_path) == ["run"]
        # A folder renamed afterwards is read back, or refused in the same words.
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copytree(folder, tmp_path / name)
        try:
            same(restore_adapter(tmp_path / name, base), params)
        except ValueError as error:
            assert re.match(r"restore_adapter: Orbax can't use the path .*\n  .*\nFix: rename", str(error))
            assert not set("*?[") & set(name)
    else:
        same(restore_adapter(tmp_path / name / "adapter", base), params)
        assert not set("*?[\\") & set(name)


SAVER = """
import itertools, sys
import jax, numpy as np
from jlora.tree.wrapping import wrap
from jlora.training.checkpoint import save_adapter

base = {"dense": {"kernel": np.ones((64, 32), np.float32)}}
params = wrap(base, rank=4)
for n in itertools.count(1):
    new = {name: np.full(leaf.shape, n, np.float32) for name, leaf in params["dense"].items()}
    save_adapter(sys.argv[1], {"dense": new | base["dense"]})
    print(n, flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment_the_last_good_save_can_be_restored(tmp_path):
    base = {"dense": {"kernel": np.ones((64, 32), np.float32)}}
    for seed in range(3):
        saver = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        saver.stdout.readline()
        time.sleep(random.Random(seed).uniform(0, 0.6))
        saver.send_signal(signal.SIGKILL)
        rest, _ = saver.communicate()
        reported = max([1, *map(int, rest.split())])
        leaves = flatten(restore_adapter(tmp_path, base))
        values = {float(value) for path, leaf in leaves.items() if "_lora_" in path for value in np.ravel(leaf)}
        assert values in ({reported}, {reported + 1}), "one complete save, the last one reported or the next one"


def test_a_reader_beside_a_process_that_saves_gets_one_whole_adapter_after_the_other(tmp_path):
    base = {"dense": {"kernel": np.ones((64, 32), np.float32)}}
    saver = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        saver.stdout.readline()
        read = []
        while len(read) < 200 and (len(read) < 20 or len(set(read)) < 5):
            leaves = flatten(restore_adapter(tmp_path, base))
            (value,) = {float(value) for path, leaf in leaves.items() if "_lora_" in path for value in np.ravel(leaf)}
            read.append(value)
    finally:
        saver.kill()
        saver.communicate()
    assert read == sorted(read)
    assert len(set(read)) >= 5, "the saver went on meanwhile"


def test_a_reader_whose_arrays_vanish_reads_the_newer_record(saved, monkeypatch):
    folder, base, params = saved
    newer = map_with_path(lambda path, leaf: leaf * 2 if path.endswith("_lora_b") else leaf, params)
    read, saves = checkpoint.read_metadata, iter([params, newer])

    def overtaken(source):
        metadata = read(source)
        following = next(saves, None)
        if following is not None:
            save_adapter(folder, following)
        return metadata

    monkeypatch.setattr(checkpoint, "read_metadata", overtaken)
    same(restore_adapter(folder, base), newer)


def test_every_flipped_byte_and_every_cut_or_missing_file_is_noticed(saved):
    folder, base, params = saved
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        whole = file.read_bytes()
        flipped = [bytes([*whole[:n], whole[n] ^ 8, *whole[n + 1 :]]) for n in (0, len(whole) // 2, len(whole) - 1)]
        for content in (*flipped, whole[: len(whole) // 2], b"", None):
            file.unlink()
            if content is not None:
                file.write_bytes(content)
            with pytest.raises(ValueError, match=r"^restore_adapter: (.|\n)*\nFix: "):
                restore_adapter(folder, base)
            file.write_bytes(whole)
    same(restore_adapter(folder, base), params)


def rewrite(folder, change, seal=True):
    file = folder / "adapter.json"
    metadata = json.loads(file.read_text())
    metadata.pop("sha256")
    before = checkpoint.digest_json(metadata)
    change(metadata)
    file.write_text(json.dumps(metadata | {"sha256": checkpoint.digest_json(metadata) if seal else before}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: shutil.rmtree(f), "holds no adapter.json"),
        (lambda f: (f / "adapter.json").unlink(), "holds no adapter.json"),
        (lambda f: (f / "adapter.json").write_text('{"format'), "adapter.json' is damaged"),
        (lambda f: (f / "adapter.json").write_text("[]"), "not of the format 'jlora-adapter'"),
        (lambda f: rewrite(f, lambda m: m.update(version=2)), "format version 2; this jlora reads version 1"),
        (
            lambda f: rewrite(f, lambda m: m["targets"]["dense/kernel"].update(alpha=9), seal=False),
            "changed after it was written",
        ),
        (lambda f: shutil.rmtree(arrays_of(f)), "_METADATA'  missing"),
        (lambda f: (arrays_of(f) / "_METADATA").write_text("{}"), "'_METADATA'  changed"),
        (
            lambda f: rewrite(f, lambda m: m["leaves"]["dense/kernel_lora_a"].update(sha256="0")),
            "1 array in",
        ),
    ],
)
def test_a_missing_or_modified_checkpoint_is_an_error(damage, words, saved):
    folder, base, _ = saved
    damage(folder)
    with pytest.raises(ValueError, match=r"^restore_adapter: ") as error:
        restore_adapter(folder, base)
    assert words in str(error.value) and "\nFix: " in str(error.value)


def test_another_base_is_an_error_that_lists_what_differs(saved):
    folder, base, _ = saved
    other = jax.tree.map(lambda leaf: leaf, base)
    other["dense"] = {"kernel": jnp.ones((12, 9)), "bias": base["dense"]["bias"] + 1}
    other["head"] = {"kernel": base["head"]["kernel"].astype(jnp.float32), "scale": jnp.ones(4)}
    other["count"] = jnp.asarray(4)
    with pytest.raises(ValueError, match="not the base the adapter was trained on: 5 leaves differ") as error:
        restore_adapter(folder, other)
    assert str(error.value).splitlines()[1:] == [
        "  'dense/kernel'  shape [12, 9], was [12, 10]",
        "  'dense/bias'  other values",
        "  'head/kernel'  dtype float32, was bfloat16",
        "  'head/bias'  missing in this base",
        "  'head/scale'  only in this base",
        "Fix: pass the base the adapter was trained on, with the same weights and dtype.",
    ]


@dataclasses.dataclass(frozen=True)
class Settings:
    eps: float = 1e-5
    windows: tuple = (3, None)
    dtype: object = jnp.float32
    scan: bool = False


@dataclasses.dataclass(frozen=True)
class Model:
    config: Settings = Settings()
    head: str | None = None


def test_settings_of_the_model_that_differ_are_listed_and_its_dtype_is_not_one(tmp_path):
    base = base_params()
    params = wrapped(base)
    save_adapter(tmp_path, params, model=Model())
    for model in (None, Model(), Model(Settings(dtype=jnp.bfloat16, scan=True))):
        same(restore_adapter(tmp_path, base, model=model), params)
    with pytest.raises(
        ValueError, match="restore_adapter: this is not the model the adapter was trained on: 3"
    ) as error:
        restore_adapter(tmp_path, base, model=Model(Settings(eps=0.1, windows=(3, 4)), head="labels"))
    assert str(error.value).splitlines()[1:] == [
        "  config.eps is 0.1, was 1e-05",
        "  config.windows is [3, 4], was [3, null]",
        '  head is "labels", was null',
        "Fix: restore the config.json that the model had, or train again.",
    ]
    with pytest.raises(TypeError, match=r"model is a dict, not a module\.\nFix: pass the module"):
        save_adapter(tmp_path, params, model={"eps": 1})
    # An adapter saved without its model, or by an earlier version, says nothing of it.
    save_adapter(tmp_path, params)
    same(restore_adapter(tmp_path, base, model=Model(Settings(eps=0.1))), params)


def test_a_fully_trained_leaf_may_have_other_values_in_the_base_but_no_other_shape(tmp_path):
    params = wrapped(base_params())
    save_adapter(tmp_path, params, train=["head"])
    other = base_params()
    other["head"] = jax.tree.map(jnp.zeros_like, other["head"])
    same(restore_adapter(tmp_path, other), params)
    other["head"]["bias"] = jnp.zeros(7)
    with pytest.raises(ValueError, match=r"'head/bias'  shape \[7\], was \[4\]"):
        restore_adapter(tmp_path, other)


def test_leaves_that_the_base_lacks_are_those_of_the_unwrapped_tree(saved):
    folder, base, params = saved
    with pytest.raises(ValueError) as error:
        restore_adapter(folder, {name: node for name, node in base.items() if name not in ("attention", "count")})
    assert "5 leaves differ" in str(error.value) and "'count'  missing in this base" in str(error.value)
    assert str(error.value).endswith(
        "Fix: add these leaves to base_params: jlora.unwrap of the tree that was saved has them."
    )
    same(restore_adapter(folder, unwrap(params)), params)


DRAW = lambda n: jnp.arange(12, dtype=jnp.float32).reshape(4, 3) + 100 * n
ALIKE = {
    "a leaf and a path through it": {"k": {"kernel": DRAW(1)}, "a": DRAW(2), "a/b": DRAW(3)},
    "a dot and a level": {"a.b": {"kernel": DRAW(1)}, "a": {"b": {"kernel": DRAW(2)}, "b.kernel": DRAW(3)}},
    "dots alone": {"a.b": {"kernel": DRAW(1)}, "a.b.kernel": DRAW(2), "a%2Eb": {"kernel": DRAW(3)}},
    "an escape": {"a.b": {"kernel": DRAW(1)}, "a": {"b": {"kernel": DRAW(2)}}, "a%2Eb": {"kernel": DRAW(3)}},
}


@pytest.mark.parametrize("base", ALIKE.values(), ids=ALIKE)
def test_arrays_whose_paths_look_alike_are_kept_apart(base, tmp_path):
    params = wrap(base, 2, targets=".*kernel")
    save_adapter(tmp_path / "adapter", params, train=".*")
    same(restore_adapter(tmp_path / "adapter", jax.tree.map(jnp.zeros_like, base)), params)


def test_a_wrapped_base_and_a_tree_without_adapters_are_errors(saved, tmp_path):
    folder, base, params = saved
    with pytest.raises(ValueError, match="restore_adapter: base_params is already wrapped"):
        restore_adapter(folder, params)
    with pytest.raises(ValueError, match="save_adapter: the tree has no adapter"):
        save_adapter(tmp_path / "none", base)
    with pytest.raises(ValueError, match="'hed'  nearest: 'head"):
        save_adapter(tmp_path / "none", params, train=["hed"])
    assert not (tmp_path / "none").exists()


def test_a_folder_that_is_not_writable_is_reported_before_anything_is_written(saved, tmp_path):
    _, _, params = saved
    file = tmp_path / "file"
    file.write_text("mine")
    for folder in (file, file / "below"):
        with pytest.raises(ValueError, match="save_adapter: can't write to the folder"):
            save_adapter(folder, params)
    assert file.read_text() == "mine"
    if sys.platform == "linux":
        with pytest.raises(ValueError, match="save_adapter: can't write to the folder '/proc/adapter'"):
            save_adapter("/proc/adapter", params)


SHARDED = textwrap.dedent("""
    import sys
    import jax, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from jlora.tree.wrapping import wrap
    from jlora.training.checkpoint import restore_adapter, save_adapter

    mesh = jax.make_mesh((2, 2), ("x", "y"))
    kernel = np.arange(64.0, dtype=np.float32).reshape(8, 8)
    base = {"dense": {"kernel": jax.device_put(kernel, NamedSharding(mesh, P("x", "y")))}}
    save_adapter(sys.argv[1], wrap({"dense": {"kernel": kernel}}, rank=2))
    restored = restore_adapter(sys.argv[1], base)["dense"]
    for name, spec in {"a": P("x", None), "b": P(None, "y"), "scaling": P()}.items():
        leaf = restored[f"kernel_lora_{name}"]
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim), (name, leaf.sharding)
""")


def test_restored_adapters_are_sharded_as_their_kernels_are(tmp_path):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", SHARDED, str(tmp_path)]
    subprocess.run(command, env=os.environ | flags, check=True)
