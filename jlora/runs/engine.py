"""The training loop of every task: steps, evaluations, checkpoints, and going on where a run was stopped.

A run's history is a file of JSON lines without clock times. A checkpoint notes how long it was, and a resumed run cuts
it there: however often a run is killed, its files end up as if it never had been.
"""

import contextlib
import functools
import hashlib
import inspect
import json
import math
import os
import zlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora.data.batches import Row, buckets, pad, training_batches
from jlora.errors import JloraValueError, count, nearest
from jlora.runs.config import Config, Optimisation
from jlora.tasks.tasks import Scores, Task, pad_token
from jlora.training.checkpoint import check_model, describe_model, writing
from jlora.training.run_state import RunCheckpoints
from jlora.training.sharding import place_rows
from jlora.training.step import TrainState, make_train_step
from jlora.tree.layouts import A, B
from jlora.tree.paths import Tree, map_with_path
from jlora.tree.splitting import join, split

ANEW = "begin anew with --output.overwrite."


class Step(NamedTuple):
    """Training went on by some steps.

    Attributes:
        step: steps taken so far.
        steps: steps there are in all.
        epoch: the epoch it is in, from 1.
        tokens: tokens read since the event before.
        targets: tokens or texts learnt from since then.
        loss: their mean cross entropy; steps that were skipped do not count.
        learning_rate: the rate of A at this step.
        grad_norm: global norm of the last gradient, before clipping.
        skipped: steps left out so far because loss or gradient was not finite.
    """

    step: int
    steps: int
    epoch: int
    tokens: int
    targets: int
    loss: float
    learning_rate: float
    grad_norm: float
    skipped: int


class Evaluation(NamedTuple):
    """The model was evaluated on the validation data.

    Attributes:
        step: steps taken so far.
        epoch: epochs begun.
        loss: mean cross entropy over the validation data.
        metrics: what else the task measures, by name.
        best: whether none before was better.
        params: the wrapped tree now; None where the event was read back from a file.
    """

    step: int
    epoch: int
    loss: float
    metrics: dict[str, float]
    best: bool
    params: Tree

    def value(self, measure: str) -> float:
        """Returns the loss for "loss", or else the metric of that name."""
        return self.loss if measure == "loss" else self.metrics[measure]


class Snapshot(NamedTuple):
    """The adapter of a run without validation data, where a run with them would be evaluated.

    Attributes:
        step: steps taken so far.
        params: the wrapped tree now.
    """

    step: int
    params: Tree


class StepMemory(NamedTuple):
    """The memory use of the step, which was compiled for the largest batch.

    Attributes:
        argument_bytes: bytes of parameters, optimizer state and batch.
        temporary_bytes: bytes that the step needs in addition, as counted by the compiler.
    """

    argument_bytes: int
    temporary_bytes: int


class Resumption(NamedTuple):
    """A run resumes from a checkpoint.

    Attributes:
        step: steps taken before the checkpoint.
        past: steps and evaluations before the checkpoint.
        damaged: newer checkpoints that were damaged and deleted, each with the reason.
    """

    step: int
    past: list[Step | Evaluation]
    damaged: list[str]


class Damage(NamedTuple):
    """Damaged checkpoints were deleted, and the run resumed from an older one.

    Attributes:
        step: the step that the run resumed from.
        damaged: the deleted checkpoints, each with the reason.
    """

    step: int
    damaged: list[str]


class Interrupted(Exception):
    """A signal stopped the run after a checkpoint was saved; rerun the same command to resume.

    Args:
        step: steps taken.
        signal: the number of the signal.
        overwrite: whether the same command would start again from the beginning.
    """

    def __init__(self, step: int, signal: int, overwrite: bool = False):
        command = "the same command without output.overwrite" if overwrite else "the same command"
        super().__init__(f"stopped after step {step}; {command} goes on from there.")
        self.step, self.signal = step, signal


class History:
    """A run's steps and evaluations as JSON lines.

    Args:
        path: the file.
        write: whether this process writes it; on several hosts one does.
    """

    def __init__(self, path: Path, write: bool = True):
        self.path, self._write = path, write

    @property
    def position(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def digest(self, position: int) -> str | None:
        """A digest of the bytes before a position; None where there are none."""
        return hashlib.sha256(self._read(position)).hexdigest() if position else None

    def _read(self, position: int) -> bytes:
        return self.path.read_bytes()[:position] if position else b""

    def add(self, event: Step | Evaluation | Damage) -> None:
        """Writes an event down, at once; a number that is not finite as null, since JSON has no word for it.

        Raises:
            OSError: it can't be written.
        """
        if self._write:
            values = {name: value for name, value in event._asdict().items() if name != "params"}
            with can_be_written(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"event": type(event).__name__.lower()} | nulled(values)) + "\n")
                # A checkpoint notes how long the file is: it must not reach the disk first.
                file.flush()
                os.fsync(file.fileno())

    def rewind(self, position: int, digest: str | None = None) -> list[Step | Evaluation]:
        """Cuts what came after a position, and reads the steps and evaluations that are left.

        Args:
            position: bytes to keep.
            digest: of these bytes; None where it is not known.

        Raises:
            ValueError: the file is shorter, or its bytes are others.
        """
        if self.position < position:
            problem = f"{self.path} has {self.position} bytes, and had {position} at the last checkpoint."
            raise JloraValueError("resume", problem, [], f"put it back, or {ANEW}")
        if digest is not None and self.digest(position) != digest:
            problem = f"{self.path} was changed after it was written."
            raise JloraValueError("resume", problem, [], f"put it back, or {ANEW}")
        if self._write and self.position:
            with open(self.path, "r+b") as file:
                file.truncate(position)
        events = [json.loads(line) for line in self._read(position).decode("utf-8").splitlines()]
        return [_event(event) for event in events if event["event"] != Damage.__name__.lower()]


def can_be_written(path: Path) -> contextlib.AbstractContextManager[None]:
    """Inside it, what the disk refuses is an error that says how the run goes on."""
    fix = "free disk space, then rerun the same command to resume."
    return writing("train", f"{path} can't be written to; what was saved before is there.", fix)


def nulled(value: Any) -> Any:
    """The same value with None for each number that is not finite: JSON has no word for it."""
    if isinstance(value, dict):
        return {name: nulled(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _event(values: dict[str, Any]) -> Step | Evaluation:
    values = {name: math.nan if value is None else value for name, value in values.items()}
    if values.pop("event") == "step":
        return Step(**values)
    metrics = {name: math.nan if value is None else value for name, value in values.pop("metrics").items()}
    return Evaluation(**values, metrics=metrics, params=None)


@dataclass
class Progress:
    """What of a run is neither in its state nor in its data.

    Attributes:
        best: (metric, -loss) of the best evaluation so far; None before the first.
        since: evaluations since then.
        losses: (loss, targets, tokens) of the steps since the last event.
    """

    best: tuple[float, ...] | None = None
    since: int = 0
    losses: list[tuple[Any, int, int]] = field(default_factory=list)

    def notes(self) -> dict[str, Any]:
        """As JSON keeps it."""
        losses = [(float(loss), targets, tokens) for loss, targets, tokens in self.losses]
        # JSON's own numbers have no infinities; Python's reader takes these.
        return {"best": self.best, "since": self.since, "losses": losses}

    @classmethod
    def read(cls, notes: dict[str, Any]) -> "Progress":
        """What `notes` gave."""
        best = None if notes["best"] is None else tuple(notes["best"])
        return cls(best, notes["since"], [tuple(loss) for loss in notes["losses"]])


def schedule(options: Optimisation, steps: int) -> optax.Schedule:
    """The learning rate of A by step: up from 0 over the warm-up, then on as the config says."""
    peak, warm = options.learning_rate, round(options.warmup * steps)
    after = {
        "linear": lambda rest: optax.linear_schedule(peak, 0.0, rest),
        "cosine": lambda rest: optax.cosine_decay_schedule(peak, rest),
        "constant": lambda rest: optax.constant_schedule(peak),
    }[options.schedule](max(steps - warm, 1))
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warm, 1)), after], [warm])


def make_optimizer(options: Optimisation, steps: int, adapters: Tree) -> optax.GradientTransformation:
    """The named optimizer of optax, with separate learning rates for B and for the head.

    Raises:
        ValueError: optax has none of that name, or it takes no weight decay.

    Source: LoRA+, Hayou et al. 2024, arXiv:2402.12354, for B's rate.
    """

    def ratio(path: str, _: Any) -> float:
        return 1.0 if path.endswith(A) else options.b_ratio if path.endswith(B) else options.head_ratio

    ratios = map_with_path(ratio, adapters)
    scale = optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, ratios))
    return optax.chain(named_optimizer(options, steps), scale)


def check_training(config: Config) -> None:
    """Finds out whether a job can be trained, whatever its model and data are.

    Raises:
        ValueError: an optimizer that optax does not have or that this loop can't run, or a batch that can't be cut into
            the microbatches of an accumulation.
    """
    options = config.optimisation
    named_optimizer(options, 1)
    if options.batch_size % options.accumulate:
        offenders = [f"batch_size = {options.batch_size}, accumulate = {options.accumulate}"]
        fix = "make batch_size a multiple of accumulate."
        raise JloraValueError("train", "a batch can't be cut into equal microbatches.", offenders, fix)


def named_optimizer(options: Optimisation, steps: int) -> optax.GradientTransformation:
    """An optimizer of optax, with the config's rate and decay.

    Raises:
        ValueError: optax has none of that name, it takes no weight decay, or it needs more than a schedule of the
            learning rate, a gradient and a loss.
    """
    known = {name: make for name, make in vars(optax).items() if is_optimizer(make)}
    if options.optimizer not in known:
        offenders = [f"{options.optimizer!r}  nearest: {', '.join(nearest(options.optimizer, known, 3))}"]
        raise JloraValueError("train", "optax has no such optimizer.", offenders, "correct [optimisation].")
    make = known[options.optimizer]
    takes_decay = "weight_decay" in inspect.signature(make).parameters
    if options.weight_decay and not takes_decay:
        problem = f"optax.{options.optimizer} has no weight decay."
        raise JloraValueError("train", problem, [], "leave weight_decay out, or take adamw.")
    decay = {"weight_decay": options.weight_decay} if takes_decay else {}
    try:
        tx = make(schedule(options, steps), **decay)
        jax.eval_shape(functools.partial(_update_once, tx))
    except (TypeError, ValueError) as error:
        problem = f"optax.{options.optimizer} needs more than a learning-rate schedule, a gradient and the loss."
        fix = "choose another optimizer, as adamw or adafactor."
        raise JloraValueError("train", problem, [str(error).splitlines()[0]], fix) from None
    return tx


def _update_once(tx: optax.GradientTransformation) -> Any:
    """An update of a small matrix, with what a training step gives an optimizer."""
    params = {"kernel_lora_a": jnp.ones((3, 2))}
    return optax.with_extra_args_support(tx).update(params, tx.init(params), params, value=jnp.zeros(()))


def is_optimizer(make: Any) -> bool:
    """Whether something of optax is an optimizer that needs a learning rate and nothing else."""
    if not inspect.isfunction(make):
        return False
    names = list(inspect.signature(make).parameters)
    needed = [name for name, value in inspect.signature(make).parameters.items() if value.default is value.empty]
    return names[:1] == ["learning_rate"] and set(needed) <= {"learning_rate"}


class Prepared(NamedTuple):
    """A batch as a step takes it, with what the whole of it holds.

    Attributes:
        batch: the rows of this process, their weights such that those of the whole batch sum to its rows: the mean over
            rows is then the mean over targets, however the batch is cut into parts and spread over devices.
        targets: tokens or texts to learn from.
        tokens: tokens to read.
    """

    batch: dict[str, np.ndarray]
    targets: int
    tokens: int


def prepare(batch: dict[str, np.ndarray], *, index: int = 0, count: int = 1) -> Prepared:
    """The part of a batch that process `index` of `count` holds."""
    weights = batch["weights"]
    scaled = weights * np.float32(len(weights) / (float(weights.sum()) or 1.0))
    rows = slice(len(weights) * index // count, len(weights) * (index + 1) // count)
    part = {name: value[rows] for name, value in (batch | {"weights": scaled}).items()}
    return Prepared(part, int((weights > 0).sum()), int(batch["attention_mask"].sum()))


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a run needs.

    Attributes:
        config: as it was read.
        task: what is learnt.
        params: the wrapped tree, on its devices.
        rows: what is trained on.
        validation: rows that every evaluation measures; None to train without.
        mesh: the devices; None for one.
    """

    config: Config
    task: Task
    params: Tree
    rows: Sequence[Row]
    validation: Sequence[Row] | None
    mesh: Mesh | None = None

    @functools.cached_property
    def batches(self) -> grain.MapDataset:
        """One epoch."""
        return training_batches(self.rows, **self._shapes(), seed=self.config.optimisation.seed)

    @property
    def largest(self) -> Any:
        """A batch of the largest shape there is."""
        length, places = list(buckets(self.rows, self.config.data.max_length).items())[-1]
        shapes = self._shapes()
        size = shapes["batch_size"]
        return pad([self.rows[n] for n in places[:size]], size=size, length=length, pad_id=shapes["pad_id"])

    def _shapes(self) -> dict[str, int]:
        pad_id = pad_token(self.task.loaded)
        size = self.config.optimisation.batch_size
        return {"batch_size": size, "max_length": self.config.data.max_length, "pad_id": pad_id}

    @functools.cached_property
    def digests(self) -> dict[str, int]:
        """What tells the rows of each split from others."""
        splits = {"rows": self.rows, "validation": self.validation}
        return {name: digest(rows) for name, rows in splits.items() if rows is not None}

    @property
    def steps(self) -> int:
        """Steps in all."""
        options = self.config.optimisation
        return options.steps or len(self.batches) * options.epochs

    def put(self, batch: dict[str, np.ndarray]) -> Any:
        """This process's rows of a batch on its devices."""
        return batch if self.mesh is None else place_rows(batch, self.mesh)


def digest(rows: Sequence[Row]) -> int:
    """A checksum of rows."""
    parts = (leaf.tobytes() for row in rows for leaf in (row.ids, row.targets, row.weights))
    return functools.reduce(lambda checksum, part: zlib.crc32(part, checksum), parts, 0)


def make_step(job: Job) -> tuple[Any, TrainState, Tree]:
    """The jitted step, the state before it, and the base."""
    options = job.config.optimisation
    adapters, base = split(job.params, job.task.trained)
    tx = make_optimizer(options, job.steps, adapters)
    create: Any = functools.partial(TrainState.create, tx=tx, key=jax.random.fold_in(jax.random.key(options.seed), 2))
    if job.mesh is not None:
        create = jax.jit(create, out_shardings=places(jax.eval_shape(create, adapters), adapters, tx, job.mesh))
    state = create(adapters)
    loss_fn = job.task.loss_fn(job.config.adapter.dropout)
    return make_train_step(loss_fn, tx, accumulate=options.accumulate, clip=options.clip), state, base


def places(state: TrainState, adapters: Tree, tx: optax.GradientTransformation, mesh: Mesh) -> Any:
    """Where a state lies: every leaf as the adapter it belongs to, what belongs to none on every device."""
    whole = NamedSharding(mesh, PartitionSpec())
    where = jax.tree.map(lambda leaf: leaf.sharding, adapters)
    moments = optax.tree.map_params(
        tx, lambda _, sharding: sharding, state.opt_state, where, transform_non_params=lambda _: whole
    )
    return replace(state, step=whole, adapters=where, opt_state=moments, key=whole, skipped=whole)  # type: ignore


def fit(job: Job, folder: Path, *, should_stop: Callable[[], int] = lambda: 0) -> Generator[Any]:
    """Trains the adapters and the head, and tells of it as it goes.

    Args:
        job: what to train.
        folder: the run's; a checkpoint in it is gone on from.
        should_stop: asked after every step; a signal's number to stop, 0 to go on.

    Yields:
        `StepMemory`; `Resumption` if there was a checkpoint; a `Step` every `output.log_every` steps and before an
        evaluation; an `Evaluation` every `run.evaluate_every` steps, or epoch, and at the end. Without validation
        data, a `Snapshot` in its place.

    Raises:
        Interrupted: `should_stop` returned a signal's number; a checkpoint has been saved.
        ValueError: too many steps were not finite, the last good state has been saved; what was saved can't be gone on
            from.
        OSError: a checkpoint can't be written; those before it are there.
    """
    options, per_epoch, steps = job.config, len(job.batches), job.steps
    evaluate_every = min(options.run.evaluate_every or per_epoch, steps)
    own: Any = functools.partial(prepare, index=jax.process_index(), count=jax.process_count())
    step, state, base = make_step(job)
    yield memory(step, state, base, job.put(own(job.largest).batch))
    history = History(folder / "metrics.jsonl", write=jax.process_index() == 0)
    checkpoints = RunCheckpoints(folder / "checkpoints", options.run.keep)
    rate, progress = schedule(options.optimisation, steps), Progress()
    batches: Any = iter(job.batches.map(own).repeat(math.ceil(steps / per_epoch)).to_iter_dataset())

    def save(n: int) -> None:
        written = history.position
        model = describe_model(job.task.loaded.model)
        notes = {**job.digests, "model": model, "data": batches.get_state(), "progress": progress.notes()}
        checkpoints.save(n, state, notes | {"written": written, "metrics": history.digest(written)})

    try:
        found = checkpoints.restore(state)
        if found is None:
            history.rewind(0)
        else:
            state, notes, damaged = found
            check_rows(notes, job.digests)
            check_model("resume", notes.get("model"), job.task.loaded.model)
            progress = Progress.read(notes["progress"])
            batches.set_state(notes["data"])
            past = history.rewind(notes["written"], notes.get("metrics"))
            if damaged:
                history.add(Damage(int(state.step), damaged))
            yield Resumption(int(state.step), past, damaged)
        n = int(state.step)
        while n < steps and not is_over(progress, options.run.patience):
            prepared = next(batches)
            state, metrics = step(state, base, job.put(prepared.batch))
            n += 1
            progress.losses.append((metrics["loss"], prepared.targets, prepared.tokens))
            epoch, evaluates = (n - 1) // per_epoch + 1, n % evaluate_every == 0 or n == steps
            logs = n % options.output.log_every == 0 or evaluates
            if logs:
                event = step_event(n, steps, epoch, progress, rate, metrics)
                history.add(event)
                yield event
                check_skipped(event, options.optimisation.max_skipped, functools.partial(save, n))
            if evaluates:
                # A step donates its state: what is handed out has to be a copy.
                params = join(jax.tree.map(jnp.copy, state.adapters), base)
                if job.validation is None:
                    yield Snapshot(n, params)
                else:
                    evaluation = judge(n, epoch, job.task.score(params, job.validation), progress, params)
                    history.add(evaluation)
                    yield evaluation
            # Several processes have to agree, for which they wait for each other: seldom, and where they do so anyway.
            stop = should_stop() if jax.process_count() == 1 else agree(should_stop()) if logs else 0
            if stop or evaluates or (options.run.save_every and n % options.run.save_every == 0):
                save(n)
            if stop:
                raise Interrupted(n, stop, options.output.overwrite)
    finally:
        checkpoints.close()


def memory(step: Any, state: TrainState, base: Tree, batch: Any) -> StepMemory:
    """The memory use of the compiled step; the compiled code serves the first call of these shapes too."""
    found = step.lower(state, base, batch).compile().memory_analysis()
    return StepMemory(found.argument_size_in_bytes, found.temp_size_in_bytes)


def agree(number: int) -> int:
    """The largest of all processes' numbers."""
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def check_rows(notes: dict[str, Any], digests: dict[str, int]) -> None:
    """Checks that a run resumes with the data that it was begun with.

    Args:
        notes: those of the checkpoint; older ones have no digest of the validation rows.
        digests: of the rows of each split now.

    Raises:
        ValueError: rows of a split are others.
    """
    names = {"rows": "training", "validation": "validation"}
    changed = [names[name] for name, value in digests.items() if notes.get(name, value) != value]
    if changed:
        problem = f"the {' and '.join(changed)} data are not those the run was begun with."
        reasons = ["a file has changed, or another version of jlora drew the validation split"]
        raise JloraValueError("resume", problem, reasons, f"put the files back, or {ANEW}")


def is_over(progress: Progress, patience: int | None) -> bool:
    """Whether evaluations have not been better for too long."""
    return patience is not None and progress.since >= patience


def step_event(
    n: int, steps: int, epoch: int, progress: Progress, rate: optax.Schedule, metrics: dict[str, Any]
) -> Step:
    """Sums up the steps since the last event."""
    losses = [(float(loss), targets, tokens) for loss, targets, tokens in progress.losses]
    progress.losses = []
    finite = [(loss, targets) for loss, targets, _ in losses if math.isfinite(loss)]
    targets = sum(targets for _, targets in finite)
    mean = sum(loss * targets for loss, targets in finite) / targets if targets else math.nan
    return Step(
        step=n,
        steps=steps,
        epoch=epoch,
        tokens=sum(tokens for *_, tokens in losses),
        targets=targets,
        loss=mean,
        learning_rate=float(rate(n - 1)),
        grad_norm=float(metrics["grad_norm"]),
        skipped=int(metrics["skipped"]),
    )


def check_skipped(event: Step, most: int, save: Callable[[], None]) -> None:
    """Raises where too many steps were left out, after saving the last good state."""
    if event.skipped >= most:
        save()
        problem = f"{count(event.skipped, 'step')} of {event.step} had a loss or gradient that is not finite."
        fix = "lower learning_rate, clip the gradient, or look for damaged data; the last good state is saved."
        raise JloraValueError("train", problem, [], fix)


def judge(n: int, epoch: int, scores: Scores, progress: Progress, params: Tree) -> Evaluation:
    """An evaluation, held against the best so far."""
    value = tuple(-math.inf if math.isnan(number) else number for number in (scores.value, -scores.loss))
    best = progress.best is None or value > progress.best
    progress.best = value if best else progress.best
    progress.since = 0 if best else progress.since + 1
    return Evaluation(n, epoch, scores.loss, scores.metrics, best, params)
