"""A run's folder: what is in it, whether it can be begun or gone on with, and how it is loaded again.

::

    config.toml           the job
    labels.json           its classes, with what each says
    tokenizer/            the tokenizer and chat template it was trained with
    adapter/              the best adapter so far, and the leaves trained in full
    checkpoints/          the newest states, to go on from
    metrics.jsonl         losses and evaluations
    result.json           what it came to: a run that has it is finished
    files.json            digests of the small files
    run.lock              locked by the process that writes the run; it stays when the run has ended
    learning_curve.png, spectrum.png, README.md, events/
"""

import fcntl
import functools
import json
import os
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora.errors import (
    JloraBlockingIOError,
    JloraFileExistsError,
    JloraFileNotFoundError,
    JloraNotADirectoryError,
    JloraOSError,
    JloraPermissionError,
    JloraValueError,
    count,
)
from jlora.hf.load import LoadedModel, initialise, load_model
from jlora.hf.tokenizer import save_tokenizer, use_tokenizer
from jlora.runs import config as configs
from jlora.runs.config import Config
from jlora.tasks.tasks import TASKS, Task
from jlora.training.checkpoint import DIGESTS, check_name, find_damage, restore_adapter, save_adapter, write_digests
from jlora.training.sharding import make_mesh, place, shardings
from jlora.tree.paths import Tree, map_with_path
from jlora.tree.splitting import attach, extract, join, split
from jlora.tree.targets import Rule, Targets
from jlora.tree.wrapping import uniform, wrap

ADAPTER, CONFIG, LABELS, CHECKPOINTS = "adapter", "config.toml", "labels.json", "checkpoints"
METRICS, RESULT, CURVE, CARD, EVENTS = "metrics.jsonl", "result.json", "learning_curve.png", "README.md", "events"
SPECTRUM, TOKENIZER, LOCK = "spectrum.png", "tokenizer", "run.lock"
FILES = (CONFIG, DIGESTS, ADAPTER, LABELS, TOKENIZER, CHECKPOINTS, METRICS, RESULT, CURVE, SPECTRUM, CARD, EVENTS)

INITIALIZERS = {
    "uniform": uniform,
    # PEFT's "gaussian": standard deviation 1 / rank.
    "normal": lambda key, shape, dtype: jax.nn.initializers.normal(1 / shape[-1])(key, shape, dtype),
    "orthogonal": jax.nn.initializers.orthogonal(3**-0.5),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A saved run, loaded onto its base.

    Attributes:
        task: what it learnt, on the model it was loaded for.
        params: the wrapped tree.
        answers: what each class says; empty where none were given.
        config: the job as it was run.
    """

    task: Task
    params: Tree
    answers: Mapping[str, str]
    config: Config


def load_base(config: Config, labels: Sequence[str]) -> LoadedModel:
    """The base model with the task's head, new where it has to be; a seed makes the same head each time.

    Raises:
        ValueError: no such model, no tokenizer beside it, it reads fewer tokens than the config asks for, or it can't
            learn the task.
    """
    loaded = load_model(
        config.model.name,
        dtype=config.model.dtype,
        compute_dtype=config.model.compute_dtype,
        scan=config.model.scan,
        remat=config.model.remat,
        head=TASKS[config.data.task].head,
        pooling=config.model.pooling,
        revision=config.model.revision,
        labels=labels or None,
        untie=config.model.untie,
        vocab_size=config.model.vocab_size,
        key=jax.random.key(config.optimisation.seed),
    )
    if loaded.tokenizer is None:
        fix = "add the tokenizer's files to the model's folder."
        raise JloraValueError("train", f"{config.model.name} has no tokenizer.", [], fix)
    if TASKS[config.data.task].head == "causal_lm" and not getattr(loaded.model.config, "causal", True):
        problem = f"{config.model.name} attends in both directions: it sees the token that it should predict."
        raise JloraValueError("train", problem, [], "use a causal model, or train another task.")
    most = loaded.config.max_position_embeddings
    if config.data.max_length > most:
        problem = f"data.max_length is {config.data.max_length}, the model reads {most} tokens."
        raise JloraValueError("train", problem, [], f"set max_length to {most} or less.")
    return loaded


def make_task(config: Config, loaded: LoadedModel, labels: Sequence[str] = (), mesh: Mesh | None = None) -> Task:
    """The task of a job on its model."""
    sizes = {"batch_size": config.optimisation.batch_size, "max_length": config.data.max_length}
    return TASKS[config.data.task](loaded, labels, mesh, **sizes)


def with_seed(loaded: LoadedModel, seed: int) -> LoadedModel:
    """The same base with the new head that `load_base` would have made of another seed; all else is shared."""
    made = initialise(loaded.model, loaded.new, jax.random.key(seed))

    def draw(path: str, leaf: Any) -> Any:
        return made[path].astype(leaf.dtype) if path in made else leaf

    return replace(loaded, params=map_with_path(draw, loaded.params))


def wrap_base(config: Config, loaded: LoadedModel) -> Tree:
    """The base's parameters with a new adapter, as the config says.

    Raises:
        ValueError: a rank, alpha or target that the model has no place for.
    """
    adapter = config.adapter
    pattern = loaded.model.lora_targets if adapter.targets is None else adapter.targets
    by_kernel: dict[str | tuple[str, ...], int | Rule] = dict(adapter.ranks.items())
    targets: Targets = by_kernel | {pattern: adapter.rank} if adapter.ranks else pattern
    return wrap(
        loaded.params,
        adapter.rank,
        alpha=adapter.alpha,
        targets=targets,
        layout=loaded.model.lora_layout,
        key=jax.random.fold_in(jax.random.key(config.optimisation.seed), 1),
        rslora=adapter.rslora,
        init=INITIALIZERS[adapter.init],
        cap_rank=adapter.cap_rank,
    )


def read_mesh(config: Config) -> Mesh | None:
    """The devices that the config names, None for one.

    Raises:
        ValueError: no mesh, more devices than there are, or rows that can't be shared by them; several processes, and
            no mesh of all their devices.
    """
    processes = jax.process_count()
    if config.run.mesh is None and processes == 1:
        return None
    if config.run.mesh is None:
        problem = f"{processes} processes have no mesh to train on."
        fix = f'set run.mesh, as in "data={jax.device_count()}".'
        raise JloraValueError("train", problem, [], fix)
    try:
        shape = {axis.strip(): int(size) for axis, size in (part.split("=") for part in config.run.mesh.split(","))}
    except ValueError:
        fix = 'write it as in "data=4,model=2".'
        raise JloraValueError("train", f"run.mesh = {config.run.mesh!r} is no mesh.", [], fix) from None
    wrong = [f"{axis!r}" for axis in shape if axis not in ("data", "model")]
    if wrong:
        raise JloraValueError("train", "run.mesh has unknown axes.", wrong, "its axes are data and model.")
    mesh = make_mesh(shape)
    if processes > 1 and mesh.size < jax.device_count():
        problem = f"run.mesh = {config.run.mesh!r} leaves devices of {processes} processes idle."
        raise JloraValueError("train", problem, [], f"make it one of all {jax.device_count()}.")
    size, accumulate, parts = config.optimisation.batch_size, config.optimisation.accumulate, shape.get("data", 1)
    if size % (accumulate * parts) or parts % processes:
        wrong = [f"batch_size={size}, accumulate={accumulate}, data={parts}, processes: {processes}"]
        fix = "make batch_size a multiple of accumulate * data, and data one of the processes."
        raise JloraValueError("train", "the rows can't be shared by the mesh.", wrong, fix)
    return mesh


def place_base(loaded: LoadedModel, mesh: Mesh | None) -> LoadedModel:
    """The base where its copies on the mesh leave it room: in the host's memory; without a mesh as it is."""
    return loaded if mesh is None else replace(loaded, params=jax.tree.map(np.asarray, loaded.params))


def place_params(params: Tree, model: Any, mesh: Mesh | None) -> Tree:
    """Parameters on the devices, cut as the model says."""
    return params if mesh is None else place(params, shardings(params, mesh, model.sharding_rules))


def check_writable(who: str, folder: Path, flag: str, needed: int = 0) -> None:
    """Finds out whether a folder can be made, or written to.

    Args:
        who: asks.
        folder: that is to be written.
        flag: what names it.
        needed: bytes that will be written.

    Raises:
        NotADirectoryError: the path goes through a file.
        PermissionError: the folder can't be written to.
        OSError: the disk is too full.
        ValueError: Orbax can't use a folder of this name.
    """
    check_name(who, folder)
    fix = f"choose another {flag}."
    parent = next(place for place in (folder, *folder.parents) if place.exists())
    if not parent.is_dir():
        raise JloraNotADirectoryError(who, f"{parent} is a file, not a folder.", [], fix)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise JloraPermissionError(who, f"{parent} can't be written to.", [], fix)
    free = shutil.disk_usage(parent).free
    if free < needed:
        problem = f"{parent} has {free:,} bytes left, the run needs about {needed:,}."
        raise JloraOSError(who, problem, [], "free disk space, or " + fix)


def check_folder(config: Config, needed: int = 0) -> bool:
    """Finds out before training whether a run can be written.

    Args:
        config: the job.
        needed: bytes that will be written.

    Returns:
        Whether an unfinished run of the same job is there, to go on with.

    Raises:
        FileExistsError: another run is there.
        NotADirectoryError: the path goes through a file.
        PermissionError: the folder can't be written to.
        OSError: the disk is too full.
        ValueError: Orbax can't use a folder of this name, or files of the unfinished run are damaged.
    """
    folder = config.output.folder
    check_writable("train", folder, "--output.folder", needed)
    there = [str(folder / name) for name in FILES if (folder / name).exists()]
    if not there or config.output.overwrite:
        return False
    if (folder / RESULT).exists() or not (folder / CONFIG).exists():
        fix = "choose another --output.folder, or pass --output.overwrite."
        raise JloraFileExistsError("train", f"{folder} holds a run already.", there, fix)
    check_files("resume", folder)
    differ = differences(configs.read(folder / CONFIG), config)
    if differ:
        fix = "go on with the same settings, choose another --output.folder, or pass --output.overwrite."
        raise JloraFileExistsError("train", f"{folder} holds an unfinished run of another job.", differ, fix)
    return True


def check_files(who: str, folder: Path) -> None:
    """Checks the small files of a run against their digests; its history and its result may be missing.

    Raises:
        ValueError: files were changed after they were written, or are missing; all of them are listed.
    """
    damage = {
        name: how for name, how in find_damage(folder).items() if how == "changed" or name not in (METRICS, RESULT)
    }
    if damage:
        problem = f"{count(len(damage), 'file')} of the run {folder} damaged or missing."
        fix = "put the files back as they were, or begin anew with --output.overwrite."
        raise JloraValueError(who, problem, [f"{name!r}  {how}" for name, how in damage.items()], fix)


def check_best(folder: Path, task: Task) -> None:
    """Checks that the best adapter of an unfinished run can be read, which the end of the run needs.

    Raises:
        ValueError: it is missing, damaged, or of another base.
    """
    try:
        restore_adapter(folder / ADAPTER, task.loaded.params, model=task.loaded.model)
    except ValueError as error:
        problem = "the best adapter so far can't be read, and the run can't end without it."
        fix = f"put {folder / ADAPTER} back as it was, or begin anew with --output.overwrite."
        raise JloraValueError("resume", problem, str(error).splitlines()[:-1], fix) from error


class FolderLock:
    """The lock of a folder that one run at a time writes to.

    It is a lock on a file, which the kernel releases when the process ends, however it ends. The file stays: if it were
    removed, two processes could lock two files of the same name. Of several processes of one run the first holds it.

    Args:
        who: the command, for the error.
        folder: the folder.
    """

    def __init__(self, who: str, folder: Path):
        self.who, self.folder = who, folder
        self._file: int | None = None

    def __enter__(self) -> "FolderLock":
        """Locks the folder if it was locked before; a folder that is new stays as it is until `acquire`."""
        on_first_process(self.who, lambda: self._lock() if (self.folder / LOCK).exists() else None)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def acquire(self) -> None:
        """Locks the folder, and makes it where it is missing.

        Raises:
            BlockingIOError: another process has locked it.
        """
        on_first_process(self.who, self._lock)

    def _lock(self) -> None:
        if self._file is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 1000).decode("utf-8", "replace").strip() or "another process"
            os.close(file)
            fix = f"wait until it has ended, or choose another folder than {self.folder}."
            raise JloraBlockingIOError(self.who, f"{holder} is writing to {self.folder}.", [], fix) from None
        except OSError:
            # A file system without locks: its runs are not protected from each other.
            pass
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._file = file


def on_first_process(who: str, action: Callable[[], None]) -> None:
    """Runs an action in the first process of a run; where it fails, all of them raise.

    Raises:
        OSError: it failed in the first process, and this is another one.
    """
    error: Exception | None = None
    if jax.process_index() == 0:
        try:
            action()
        except Exception as caught:
            error = caught
    failed = error is not None
    if jax.process_count() > 1:
        failed = bool(multihost_utils.process_allgather(np.int32(failed)).max())
    if error is not None:
        raise error
    if failed:
        raise JloraOSError(who, "the first process of the run failed.", [], "read what it printed.")


def differences(before: Config, now: Config) -> list[str]:
    """The settings in which two jobs differ; those that change nothing of a run do not count."""

    def lines(config: Config) -> list[str]:
        output = replace(config.output, folder=Path("."), overwrite=False, tensorboard=False)
        run = replace(config.run, mesh=None, keep=1, save_every=None)
        optimisation = replace(config.optimisation, max_skipped=1)
        data = replace(config.data, questions=())
        return configs.to_toml(
            replace(config, data=data, optimisation=optimisation, run=run, output=output)
        ).splitlines()

    old, new = lines(before), lines(now)
    return [f"was {line}" for line in old if line not in new] + [f"now {line}" for line in new if line not in old]


def begin_run(
    config: Config,
    labels: Sequence[str],
    answers: Mapping[str, str],
    *,
    tokenizer: Any = None,
    resume: bool = False,
) -> None:
    """Writes all of a run that is known before training, and clears the folder of an earlier one.

    Args:
        config: the job.
        labels: its classes.
        answers: what each of them says; empty where none were given.
        tokenizer: what the run's texts are tokenized with; None to leave it with the base.
        resume: the run was begun before, and is gone on with.

    Raises:
        ValueError: the classes are no longer those the run was begun with.
    """
    folder = config.output.folder
    entries = [{"label": label} | ({"answer": answers[label]} if answers else {}) for label in labels]
    text = json.dumps(entries, indent=1, ensure_ascii=False) + "\n"
    if resume and (folder / LABELS).exists() and (folder / LABELS).read_text(encoding="utf-8") != text:
        problem = f"the classes or answers of the data are not those of {folder / LABELS}."
        fix = "put the data back, or begin anew with --output.overwrite."
        raise JloraValueError("resume", problem, [], fix)
    folder.mkdir(parents=True, exist_ok=True)
    # The config comes and goes first: a folder that has it is a run, and all else is known again from the same job.
    for name in () if resume else FILES:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if not resume:
        write_whole(folder / CONFIG, configs.to_toml(config))
    write_whole(folder / LABELS, text)
    if tokenizer is not None and not (folder / TOKENIZER).exists():
        save_tokenizer(folder / TOKENIZER, tokenizer)
    write_digests(folder, files_of_job(folder))


def files_of_job(folder: Path) -> list[str]:
    """The files of a run that are written before it trains, and stay as they are."""
    tokenizer = (path for path in (folder / TOKENIZER).rglob("*") if path.is_file())
    return [CONFIG, LABELS, *sorted(path.relative_to(folder).as_posix() for path in tokenizer)]


def write_whole(path: Path, text: str) -> None:
    """A file that is there in full or not at all."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def write_result(folder: Path, text: str) -> None:
    """Writes the result of a run, which finishes it, and the digests of its small files."""
    write_whole(folder / RESULT, text)
    history = [METRICS] if (folder / METRICS).exists() else []
    write_digests(folder, [*files_of_job(folder), *history, RESULT])


def save_best(folder: Path, params: Tree, task: Task) -> None:
    """Writes the adapter and the head of a run, over what was there."""
    if task.mesh is not None:
        params = gather(params, task)
    if jax.process_index() == 0:
        try:
            save_adapter(folder / ADAPTER, params, train=task.trained, model=task.loaded.model)
        except OSError as error:
            problem = f"{folder / ADAPTER} can't be written to; what was saved before is there."
            fix = "free disk space, then rerun the same command to resume."
            reason = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)
            raise JloraOSError("train", problem, [reason], fix) from error


def gather(params: Tree, task: Task) -> Tree:
    """The same tree with what trains on every device, over the host's copy of the base: one process can write it."""
    assert task.mesh is not None
    adapters = on_every(split(params, task.trained)[0], NamedSharding(task.mesh, PartitionSpec()))
    return join(adapters, split(attach(extract(params), task.loaded.params), task.trained)[1])


@functools.partial(jax.jit, static_argnums=1)
def on_every(tree: Tree, where: NamedSharding) -> Tree:
    """A tree with a copy on every device."""
    return jax.lax.with_sharding_constraint(tree, where)


def load_run(folder: str | Path, *, model: str | None = None, mesh: Mesh | None = None) -> Run:
    """Loads a run: its base model with its adapter and head.

    Args:
        folder: what a training run wrote.
        model: folder or hub name of the base, if it was moved.
        mesh: the devices; None for one.

    Raises:
        FileNotFoundError: no run with an adapter is there.
        ValueError: files of it are damaged, or the base is not the one it was trained on.
    """
    folder = Path(folder)
    missing = [str(folder / name) for name in (CONFIG, LABELS, ADAPTER) if not (folder / name).exists()]
    if missing:
        fix = "pass the folder that `jlora train` wrote."
        raise JloraFileNotFoundError("load_run", f"{folder} holds no run.", missing, fix)
    check_files("load_run", folder)
    config = configs.read(folder / CONFIG)
    if model is not None:
        config = configs.with_model(config, model)
    labels, answers = read_labels(folder / LABELS)
    loaded = use_tokenizer(place_base(load_base(config, labels), mesh), folder / TOKENIZER)
    params = restore_adapter(folder / ADAPTER, loaded.params, model=loaded.model)
    params = place_params(params, loaded.model, mesh)
    task = make_task(config, loaded, labels, mesh)
    return Run(task=task, params=params, answers=answers, config=config)


def read_labels(path: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """The labels of a run's labels.json, in the order of the logits, and what each of them says.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        labels = tuple(str(entry["label"]) for entry in entries)
        return labels, {entry["label"]: str(entry["answer"]) for entry in entries if "answer" in entry}
    except (ValueError, TypeError, KeyError) as error:
        problem = f"{path} is damaged: {error!r}."
        raise JloraValueError("load_run", problem, [], "copy the run's folder again, or train again.") from None


def bytes_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
