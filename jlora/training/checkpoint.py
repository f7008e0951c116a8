"""Adapter checkpoints: arrays in an Orbax folder, and a small JSON file that describes them.

::

    folder/adapter.json       format, targets with rank and alpha, digests, base fingerprint, library versions
    folder/arrays-<unique>/   Orbax: all _lora_ leaves, and the leaves trained in full
    folder/adapter.saving     exists during a save: the arrays that it writes and replaces

A save writes a new folder of arrays, then renames a new adapter.json over the old one, then removes the old arrays.
If the save is killed at any moment, adapter.json names complete arrays, and adapter.saving names the arrays that the
next save has to remove. No other file in the folder is ever removed.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from jlora.errors import JloraError, JloraOSError, JloraTypeError, JloraValueError, count, name_file
from jlora.tree import layouts
from jlora.tree.layouts import AFFIXES, A
from jlora.tree.paths import Tree, TreePath, box, edit, flatten, join_path, read_arrays, unbox
from jlora.tree.splitting import split
from jlora.tree.targets import Pattern
from jlora.tree.wrapping import is_adapter_leaf, is_wrapped, read_layouts

FORMAT, VERSION = "jlora-adapter", 1
METADATA, SAVING, DIGESTS = "adapter.json", "adapter.saving", "files.json"
ARRAYS = re.compile(r"arrays-[0-9a-f]{32}")
ENTRIES = {"arrays": str, "train": list} | dict.fromkeys(("targets", "leaves", "files", "base", "libraries"), dict)
LIBRARIES = ("jlora", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
SAMPLES = 64  # number of values of each base leaf in its digest
SHOWN = 20  # the largest number of differing leaves that an error lists
# Fields of a module that don't change its outputs, or only their rounding.
NO_SETTINGS = ("parent", "name", "origin", "dtype", "param_dtype", "scan", "remat", "initializer_range")
READS = 100  # attempts to read an adapter while another process replaces it
# Names that etils treats as a bucket in the cloud: "/gs/..." and any "gs:/".
CLOUDS = ("gs", "s3", "az", "hf")


def save_adapter(folder: str | os.PathLike[str], params: Tree, *, train: Pattern = (), model: Any = None) -> None:
    """Saves the adapters of a wrapped tree, and the leaves trained in full.

    Overwrites an earlier save in `folder`, and no other files. If the process is killed at any moment, the last
    complete save can still be restored. Only one process at a time may save into a folder; others may restore from it
    at the same time.

    Args:
        folder: created if it doesn't exist.
        params: a wrapped tree.
        train: leaves trained in full in addition to the adapters, as in `split`.
        model: the module that reads the tree, or another dataclass; its settings are saved, and `restore_adapter`
            compares them.

    Raises:
        ValueError: the tree has no adapter, a name in `train` matches nothing, `folder` is not writable, or Orbax can't
            read a folder of its name.
        OSError: writing fails, for example because the disk is full; the earlier save is intact.
    """
    targets = read_layouts("save_adapter", params)
    leaves = flatten(params)
    adapters, _ = split(params, train)
    full = [path for path in flatten(adapters) if not is_adapter_leaf(path)]
    arrays = {path: np.asarray(leaf) for path, leaf in leaves.items() if is_adapter_leaf(path) or path in full}
    base = {path: leaf for path, leaf in leaves.items() if not is_adapter_leaf(path)}
    keys = _stored_keys(arrays)
    target = Path(folder).absolute()
    check_name("save_adapter", target)
    _check_writable(target)
    name = f"arrays-{uuid.uuid4().hex}"
    replaced = _read_array_folders(target / METADATA) | _read_array_folders(target / SAVING)
    fix = "free disk space, and save again."
    with writing("save_adapter", f"'{target}' can't be written to; the earlier save is intact.", fix):
        _replace(target / SAVING, json.dumps({"arrays": [*sorted(replaced), name]}))
        with _checkpointer() as checkpointer:
            checkpointer.save(target / name, _nest({keys[path]: array for path, array in arrays.items()}))
        _sync(target / name)
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "model": describe_model(model),
            "arrays": name,
            "targets": {path: _target(path, arrays) for path in targets},
            "train": full,
            "leaves": {path: _described(array) | {"sha256": digest_array(array)} for path, array in arrays.items()},
            "files": file_digests(target / name),
            "base": _fingerprint(base, full),
            "libraries": {library: _version(library) for library in LIBRARIES},
        }
        _replace(target / METADATA, json.dumps(metadata | {"sha256": digest_json(metadata)}, indent=1))
    for old in replaced:
        _remove_arrays(target, old)
    (target / SAVING).unlink(missing_ok=True)


def restore_adapter(folder: str | os.PathLike[str], base_params: Tree, *, model: Any = None) -> Tree:
    """Adds a saved adapter, and the leaves trained in full with it, to the base that it was trained on.

    Args:
        folder: the folder passed to `save_adapter`.
        base_params: the tree before `wrap`; leaves trained in full may have other values, but not another shape or
            dtype.
        model: the module that will read the tree; it must have the settings that the adapter was trained with.

    Returns:
        The wrapped tree that was saved, in the containers and boxes of the base. Each restored leaf is sharded like its
        kernel.

    Raises:
        ValueError: there is no checkpoint, or it is damaged, modified or of a newer format; the base is already wrapped
            or not the one that the adapter was trained on (the leaves or settings that differ are listed); or Orbax
            can't read a folder of this name.

    Examples:
        >>> base = {"kernel": jnp.ones((4, 4))}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     jlora.save_adapter(folder, jlora.wrap(base, rank=2))
        ...     params = jlora.restore_adapter(folder, base)
        >>> sorted(params)
        ['kernel', 'kernel_lora_a', 'kernel_lora_b', 'kernel_lora_scaling']
    """
    base = read_arrays("restore_adapter", base_params, "base_params")
    if is_wrapped(base):
        raise _refuse("base_params is already wrapped.", "pass the tree before wrap, or jlora.unwrap(params).")

    def check(metadata: Mapping[str, Any]) -> None:
        _check_base(base, metadata)
        check_model("restore_adapter", metadata.get("model"), model)

    metadata, arrays = read_adapter(folder, check)

    def change(path: TreePath, nodes: dict[Any, Any]) -> dict[Any, Any]:
        out: dict[Any, Any] = {}
        for name, node in nodes.items():
            where, kernel = join_path(path, name), unbox(node)
            out[name] = node
            if where in arrays:
                placed = place(arrays[where], kernel, tuple(range(kernel.ndim)))
                out[name] = jax.tree.unflatten(jax.tree.structure(node), [placed])
            if where in metadata["targets"]:
                trio = [arrays[where + affix] for affix in AFFIXES]
                layout = layouts.read_layout(kernel.shape, *(leaf.shape for leaf in trio))
                assert layout is not None, "digests hold, so the shapes fit as they did when saved"
                for affix, leaf, axes in zip(AFFIXES, trio, layouts.pair_axes(layout), strict=True):
                    out[f"{name}{affix}"] = box(node, place(leaf, kernel, axes), axes)
        return out

    return edit(base_params, change)


def read_adapter(
    folder: str | os.PathLike[str], check: Callable[[Mapping[str, Any]], None] = lambda metadata: None
) -> tuple[dict[str, Any], dict[TreePath, np.ndarray]]:
    """The metadata and the arrays of a saved adapter, both of one save.

    Args:
        folder: the folder passed to `save_adapter`.
        check: called with the metadata before the arrays are read; raises an error if the adapter can't be used.

    Raises:
        ValueError: there is no checkpoint, or it is damaged, modified or of a newer format.
    """
    source = Path(folder).absolute()
    check_name("restore_adapter", source, write=False)
    metadata = read_metadata(source)
    for _ in range(READS):
        check(metadata)
        try:
            return metadata, _read_arrays(source, metadata)
        except ValueError:
            # A save that ended in the meantime has removed these arrays, and adapter.json names new ones.
            newer = read_metadata(source)
            if newer["arrays"] == metadata["arrays"]:
                raise
            metadata = newer
    problem = f"'{source}' was saved again during each of {READS} attempts to read it."
    raise _refuse(problem, "restore it while no process saves into it.")


def describe_model(model: Any) -> dict[str, Any] | None:
    """The settings, as JSON, that a model's outputs depend on in addition to its parameters; None for no model.

    Args:
        model: a Flax module or another dataclass. Its dtypes, its compilation settings and its origin are left out.

    Raises:
        TypeError: the model is not a dataclass.
    """
    if model is None:
        return None
    if not dataclasses.is_dataclass(model) or isinstance(model, type):
        fix = "pass the module, or leave model out."
        raise JloraTypeError("save_adapter", f"model is a {type(model).__name__}, not a module.", [], fix)
    return json.loads(json.dumps(_settings(model), default=repr))


def _settings(model: Any) -> dict[str, Any]:
    values = {item.name: getattr(model, item.name, None) for item in dataclasses.fields(model)}
    nested = {name: _settings(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}
    return {name: value for name, value in nested.items() if name not in NO_SETTINGS}


def check_model(who: str, saved: Mapping[str, Any] | None, model: Any) -> None:
    """Checks that a model has the settings that were saved; settings that only one of them has are ignored.

    Args:
        who: the caller, for the error.
        saved: the result of `describe_model` at the save; None if no settings were saved.
        model: the current model; None if it is not known.

    Raises:
        ValueError: settings differ; all are listed.
    """
    now = describe_model(model)
    wrong = list(_changes(saved, now)) if saved and now else []
    if wrong:
        differ = count(len(wrong), "setting differs", "settings differ")
        problem = f"this is not the model the adapter was trained on: {differ}."
        fix = "restore the config.json that the model had, or train again."
        raise JloraValueError(who, problem, wrong, fix)


def _changes(saved: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name in saved:
        if name in now and saved[name] != now[name]:
            if isinstance(saved[name], Mapping) and isinstance(now[name], Mapping):
                yield from _changes(saved[name], now[name], f"{prefix}{name}.")
            else:
                yield f"{prefix}{name} is {json.dumps(now[name])}, was {json.dumps(saved[name])}"


def check_name(who: str, folder: str | os.PathLike[str], *, write: bool = True) -> None:
    """Checks that Orbax reads and writes exactly the folder of this name.

    TensorStore converts a backslash to a slash, etils treats some names as buckets in the cloud, and Orbax searches for
    the files that it has written with a glob pattern.

    Args:
        who: the caller, for the error.
        folder: path of the folder, which need not exist.
        write: whether the folder will be written to; a name with a glob pattern can be read.

    Raises:
        ValueError: parts of the path can't be used; all are listed.
    """
    parts = Path(folder).absolute().parts
    wrong = []
    for n, part in enumerate(parts):
        if "\\" in part:
            wrong.append(f"{part!r}  has a backslash")
        if part.endswith("gs:") or (n == 1 and part in CLOUDS):
            wrong.append(f"{part!r}  is read as the address of a bucket")
        if write and re.search(r"[*?[\]]", part):
            wrong.append(f"{part!r}  is a glob pattern")
        if re.search("[\ud800-\udfff]", part):
            wrong.append(f"{part!r}  is not UTF-8")
    if wrong:
        problem = f"Orbax can't use the path {os.fspath(folder)!r}."
        raise JloraValueError(who, problem, wrong, "rename the folder, or choose another.")


@contextlib.contextmanager
def writing(who: str, problem: str, fix: str) -> Iterator[None]:
    """Converts the errors that libraries raise when a write fails to one error.

    Raises:
        OSError: a file can't be written.
    """
    try:
        yield
    # TensorStore raises a ValueError for an error of the file system.
    except (OSError, ValueError) as error:
        if isinstance(error, JloraError):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise JloraOSError(who, problem, [reason], fix) from error


def _checkpointer() -> ocp.Checkpointer:
    # Only one of several processes saves an adapter, so Orbax must not wait for the others.
    process = jax.process_index()
    options = ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _target(stem: TreePath, arrays: Mapping[TreePath, np.ndarray]) -> dict[str, Any]:
    rank = arrays[stem + A].shape[-1]
    scaling = arrays[stem + layouts.SCALING].astype(np.float64)
    return {"rank": rank, "alpha": (scaling * rank).tolist(), "scaling": scaling.tolist()}


def _described(leaf: Any) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def file_digests(folder: Path) -> dict[str, str]:
    """A digest of every file under a folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): _sha256(file.read_bytes()) for file in files}


def file_digest(file: Path) -> str | None:
    """A digest of a file, None if it can't be read."""
    try:
        return _sha256(file.read_bytes()) if file.is_file() else None
    except OSError:
        return None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def digest_array(array: np.ndarray) -> str:
    """A digest of an array's dtype, shape and values."""
    return _sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes())


def _fingerprint(base: Mapping[TreePath, Any], full: list[TreePath]) -> dict[TreePath, dict[str, Any]]:
    """Shape, dtype and a digest of sampled values of every leaf; no digest for leaves trained in full."""
    values = {path: None if path in full else _sample(leaf) for path, leaf in base.items()}
    return {path: _described(leaf) | {"values": values[path]} for path, leaf in base.items()}


def _sample(leaf: Any) -> str | None:
    """A digest of evenly spaced values of a leaf; None for scalars and PRNG keys, which may change in training."""
    if leaf.ndim == 0 or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return None
    positions = np.linspace(0, max(leaf.size - 1, 0), min(leaf.size, SAMPLES)).astype(np.int64)
    index = np.unravel_index(positions, leaf.shape)
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding):  # on a mesh with explicit axes, JAX needs the sharding of the result
        return digest_array(np.asarray(leaf.at[index].get(out_sharding=NamedSharding(sharding.mesh, PartitionSpec()))))
    return digest_array(np.asarray(leaf[index]))


def write_digests(folder: Path, names: Iterable[str]) -> None:
    """Adds the digests of files in a folder to its files.json.

    Digests that exist are not replaced, so that damage to a file after its digest was written is still detected.
    """
    before = _read_digests(folder) or {}
    new = {name: _sha256((folder / name).read_bytes()) for name in names if name not in before}
    content = {"files": before | new}
    temporary = folder / f"{DIGESTS}.tmp"
    temporary.write_text(json.dumps(content | {"sha256": digest_json(content)}, indent=1))
    temporary.replace(folder / DIGESTS)


def find_damage(folder: Path) -> dict[str, str]:
    """The files of a folder that differ from their digests in its files.json, each "changed" or "missing".

    The result is empty if all files are intact, or if the folder has no files.json, as in earlier versions of jlora.
    """
    if not (folder / DIGESTS).exists():
        return {}
    digests = _read_digests(folder)
    if digests is None:
        return {DIGESTS: "changed"}
    current = {name: file_digest(folder / name) for name in digests}
    return {name: "changed" if current[name] else "missing" for name in digests if current[name] != digests[name]}


def _read_digests(folder: Path) -> dict[str, str] | None:
    """The digests in a folder's files.json, by file; None if files.json is missing or damaged."""
    try:
        content = json.loads((folder / DIGESTS).read_bytes())
        seal = content.pop("sha256")
        is_intact = seal == digest_json(content)
        return dict(content["files"]) if is_intact else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None


def _version(library: str) -> str | None:
    try:
        return packages.version(library)
    except packages.PackageNotFoundError:  # jlora may run from a source tree, without being installed
        return None


def digest_json(metadata: Mapping[str, Any]) -> str:
    """A digest of a JSON object that doesn't depend on the order of its keys."""
    return _sha256(json.dumps(metadata, sort_keys=True).encode())


def _stored_keys(paths: Iterable[TreePath]) -> dict[TreePath, TreePath]:
    """The path under which Orbax stores each array: the path in the tree, unless Orbax would confuse two arrays.

    Orbax joins the names in a path with dots, so it confuses "a.b" with "a" -> "b". It can't store "a" beside "a/b".
    If a tree has such paths, all its paths are converted to single names without dots and slashes.
    """
    keys = {path: path for path in paths}
    names = {path.replace("/", ".") for path in keys}
    if len(names) == len(keys) and not any(parent in keys for path in keys for parent in _parents(path)):
        return keys
    return {path: path.replace("%", "%25").replace(".", "%2E").replace("/", "%2F") for path in keys}


def _parents(path: TreePath) -> list[TreePath]:
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts))]


def _nest(flat: Mapping[TreePath, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        problem = f"can't write to the folder '{folder}': {error.strerror}."
        raise JloraValueError("save_adapter", problem, [], "pass a folder you may write to.") from error


def _read_array_folders(file: Path) -> set[str]:
    """The folders of arrays that a file of an earlier save names; empty if the file is missing or damaged."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return set()
    names = content.get("arrays") if isinstance(content, dict) else None
    names = names if isinstance(names, list) else [names]
    return {name for name in names if isinstance(name, str) and ARRAYS.fullmatch(name)}


def _remove_arrays(folder: Path, name: str) -> None:
    """Removes a folder of arrays, complete or partial. The target of a link is never removed."""
    for path in (folder / name, *folder.glob(f"{name}.orbax-checkpoint-tmp*")):
        if not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Waits until all files of a folder are on the disk, so that a later rename can't reach the disk before them."""
    for path in (*folder.rglob("*"), folder, folder.parent):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(file: Path, text: str) -> None:
    new = file.with_suffix(".tmp")
    with new.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(new, file)
    _sync(file.parent)


def _refuse(problem: str, fix: str, offenders: Iterable[str] = ()) -> ValueError:
    return JloraValueError("restore_adapter", problem, offenders, fix)


def read_metadata(folder: Path) -> dict[str, Any]:
    file = folder / METADATA
    if not file.is_file():
        raise _refuse(f"'{folder}' holds no {METADATA}.", "pass the folder given to jlora.save_adapter.")
    again = "restore the file, or save the adapter again."
    try:
        with name_file(file):
            metadata = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _refuse(f"'{file}' is damaged: {error}.", again) from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise _refuse(f"'{file}' is not of the format {FORMAT!r}.", again)
    version = metadata.get("version")
    if version != VERSION:
        problem = f"'{file}' has format version {version}; this jlora reads version {VERSION}."
        raise _refuse(problem, "upgrade jlora, or save the adapter again.")
    if metadata.pop("sha256", None) != digest_json(metadata):
        raise _refuse(f"'{file}' was changed after it was written.", again)
    wrong = [repr(name) for name, kind in ENTRIES.items() if not isinstance(metadata.get(name), kind)]
    if wrong:
        raise _refuse(f"'{file}' has {count(len(wrong), 'entry', 'entries')} missing or of a wrong type.", again, wrong)
    _check_paths(folder, metadata)
    return metadata


def _check_paths(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Checks that metadata names no file outside its folder, since anyone can write metadata with a valid digest.

    Raises:
        ValueError: a path is absolute, contains "..", or is a link to a target outside the folder; all are listed.
    """
    name, files = metadata["arrays"], metadata["files"]
    wrong = []
    if not ARRAYS.fullmatch(name):
        wrong.append(f"arrays: {name!r}")
    elif not _is_inside(folder, folder / name):
        wrong.append(f"{name!r}  is a link to {os.path.realpath(folder / name)!r}")
    else:
        for file in files:
            path = folder / name / file
            if Path(file).is_absolute() or ".." in Path(file).parts:
                wrong.append(f"files: {file!r}")
            elif not _is_inside(folder, path):
                wrong.append(f"{file!r}  is a link to {os.path.realpath(path)!r}")
    if wrong:
        problem = f"'{folder / METADATA}' names {count(len(wrong), 'path')} outside its folder."
        raise _refuse(problem, "don't use this adapter; get it again from the person who trained it.", wrong)


def _is_inside(folder: Path, path: Path) -> bool:
    """Whether the target of a path is inside a folder, or in the blobs of the hub's cache, whose files are links."""
    roots = [folder, *(parent.parents[1] / "blobs" for parent in (folder, *folder.parents) if _is_snapshot(parent))]
    target = Path(os.path.realpath(path))
    return any(target.is_relative_to(os.path.realpath(root)) for root in roots)


def _is_snapshot(folder: Path) -> bool:
    """Whether a folder is a snapshot in the cache of the Hugging Face hub."""
    return folder.parent.name == "snapshots" and (folder.parents[1] / "blobs").is_dir()


def _check_base(base: Mapping[TreePath, Any], metadata: Mapping[str, Any]) -> None:
    saved, current = metadata["base"], _fingerprint(base, metadata["train"])
    wrong = [
        f"{path!r}  {difference}"
        for path in {**saved, **current}
        if (difference := _describe_difference(saved.get(path), current.get(path)))
    ]
    if wrong:
        differ = count(len(wrong), "leaf differs", "leaves differ")
        more = [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        problem = f"this is not the base the adapter was trained on: {differ}."
        fix = "pass the base the adapter was trained on, with the same weights and dtype."
        if saved.keys() > current.keys() and len(wrong) == len(saved.keys() - current.keys()):
            fix = "add these leaves to base_params: jlora.unwrap of the tree that was saved has them."
        raise _refuse(problem, fix, wrong[:SHOWN] + more)


def _describe_difference(saved: Mapping[str, Any] | None, current: Mapping[str, Any] | None) -> str | None:
    if saved is None or current is None:
        return "only in this base" if saved is None else "missing in this base"
    changed = [part for part in ("shape", "dtype") if current[part] != saved[part]]
    parts = [f"{part} {current[part]}, was {saved[part]}" for part in changed]
    if not parts and current["values"] != saved["values"]:
        parts = ["other values"]
    return "; ".join(parts) or None


def _read_arrays(folder: Path, metadata: Mapping[str, Any]) -> dict[TreePath, np.ndarray]:
    folder, again = folder / metadata["arrays"], "restore the files, or save the adapter again."
    digests = {name: file_digest(folder / name) for name in metadata["files"]}
    damaged = [
        f"{name!r}  {'changed' if digests[name] else 'missing'}"
        for name, digest in metadata["files"].items()
        if digests[name] != digest
    ]
    if damaged:
        raise _refuse(
            f"{count(len(damaged), 'file is', 'files are')} damaged or missing in '{folder}'.", again, damaged
        )
    leaves = metadata["leaves"]
    keys = _stored_keys(leaves)
    # The arrays are restored as NumPy arrays, because their sharding follows the base, not the saved one.
    restore_args = _nest({key: ocp.RestoreArgs(restore_type=np.ndarray) for key in keys.values()})
    try:
        with _checkpointer() as checkpointer:
            stored = flatten(checkpointer.restore(folder, restore_args=restore_args))
            arrays = {path: stored[key] for path, key in keys.items()}
    except Exception as error:  # Orbax, TensorStore and others raise errors of different kinds
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise _refuse(f"the arrays in '{folder}' can't be read.", again, [reason]) from error
    wrong = [repr(path) for path, leaf in leaves.items() if digest_array(arrays[path]) != leaf["sha256"]]
    if wrong:
        raise _refuse(f"{count(len(wrong), 'array')} in '{folder}' changed after the save.", again, wrong)
    return arrays


def place(leaf: np.ndarray, kernel: Any, axes: tuple[int | None, ...]) -> jax.Array:
    """Shards a leaf like its kernel; `axes` are the axes of the kernel that the leaf's axes correspond to."""
    if not getattr(kernel, "committed", False):
        return jnp.asarray(leaf)
    sharding = kernel.sharding
    if isinstance(sharding, NamedSharding):
        names = (*sharding.spec, *(None for _ in range(kernel.ndim)))
        spec = PartitionSpec(*(None if axis is None else names[axis] for axis in axes))
        sharding = NamedSharding(sharding.mesh, spec)
    return jax.device_put(leaf, sharding)
