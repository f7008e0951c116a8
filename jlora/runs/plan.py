"""What a fine-tuning step will take, from shapes alone: no weight is read, and none is allocated.

Parameters, adapter and optimizer are counted leaf by leaf. What the step needs beside them is the compiler's own count
for the very step that `jlora train` runs, compiled for abstract arguments by the default device's compiler.

A CPU stands in for an accelerator where there is none, and differs from it. It fuses less, and two of its ways would
mislead: it multiplies 16-bit kernels by way of float32 copies, all of them at once, so there the step is counted in
float32 as well and that count is what is planned with; and it undoes `remat` unless the layers are scanned.
"""

import functools
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.data.batches import Row, pad
from jlora.errors import JloraValueError, nearest
from jlora.hf.families import family_of
from jlora.hf.load import LoadedModel, load_model, shapes
from jlora.models.family import LABELLED
from jlora.runs import config as configs
from jlora.runs.engine import make_optimizer, prepare
from jlora.tasks.tasks import TASKS, Task
from jlora.training.step import TrainState, make_train_step
from jlora.tree.paths import Tree, flatten
from jlora.tree.splitting import split
from jlora.tree.summary import summary
from jlora.tree.wrapping import is_adapter_leaf, wrap

STEPS = 1000  # of the schedule, whose length changes no shape
NARROW = ("bfloat16", "float16")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS |= {f"{letter}i": 2 ** (10 * n) for n, letter in enumerate("KMGT", 1)}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What of a training job decides how much memory its step takes.

    Attributes:
        rank: columns of A and rows of B
        targets: a regular expression for the paths of kernels, or a list of names of modules; left out, all but the
            head
        dropout: share of an adapter's input that is dropped while training
        batch_size: rows to a step
        accumulate: parts a batch is taken in, one after the other
        sequence: tokens in a row
        dtype: what the base is stored and computed in
        optimizer: any optimizer of optax, by name
        scan: one compiled body for all layers
        remat: recompute each layer in the backward pass
        task: what is learnt; auto is a language model, or classes of texts for BERT
        labels: classes there are; left out, as many as the checkpoint has
        untie: count a tied output head as a separate copy of the input embedding
        vocab_size: tokens of the embedding and the output head; left out, as many as the checkpoint has
    """

    rank: int = 8
    targets: str | tuple[str, ...] | None = None
    dropout: float = 0.0
    batch_size: int = 1
    accumulate: int = 1
    sequence: int = 512
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    optimizer: str = "adamw"
    scan: bool = True
    remat: bool = False
    task: Literal["auto", "causal_lm", "instruction", "sequence_classification", "token_classification"] = "auto"
    labels: int | None = None
    untie: bool = False
    vocab_size: int | None = None


class Remedy(NamedTuple):
    """A way to make the step fit that the compiler has confirmed.

    Attributes:
        changes: settings to change, with their new values.
        total_bytes: what the step takes then.
    """

    changes: dict[str, Any]
    total_bytes: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a training step takes; `str()` is a table. All sizes are in bytes.

    Attributes:
        model: folder or name.
        settings: what was planned for.
        platform: whose compiler counted: "cpu", "gpu", "tpu".
        parameters: of the base with its head.
        trained: parameters that train: every A and B, and a new head in full.
        base_bytes: of the base with its head.
        adapter_bytes: of every A, B and scaling.
        optimizer_bytes: of the optimizer's state.
        argument_bytes: what the compiled step is called with: all of these, the batch and the step's counters.
        output_bytes: what it gives back and does not put in the place of an argument.
        temporary_bytes: what it needs beside these, as compiled for `platform`.
        planned_bytes: what is planned with in their place; less than `temporary_bytes` where that counts copies that
            only a CPU makes.
        memory: what there is; None where it was not told.
        remedies: where it does not fit, each setting that would do alone, or failing that the fewest together.
        least: where nothing makes it fit, the least that was found.
    """

    model: str
    settings: Settings
    platform: str
    parameters: int
    trained: int
    base_bytes: int
    adapter_bytes: int
    optimizer_bytes: int
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    planned_bytes: int
    memory: int | None = None
    remedies: tuple[Remedy, ...] = ()
    least: Remedy | None = None

    @property
    def percent(self) -> float:
        """Parameters that train in percent of the base's."""
        return 100 * self.trained / self.parameters

    @property
    def total_bytes(self) -> int:
        """The most that the step holds at once."""
        return self.argument_bytes + self.output_bytes + self.planned_bytes

    @property
    def fits(self) -> bool | None:
        """Whether that is there; None where the memory was not told."""
        return None if self.memory is None else self.total_bytes <= self.memory

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        derived = {"percent": self.percent, "total_bytes": self.total_bytes, "fits": self.fits}
        remedies = {"remedies": [remedy._asdict() for remedy in self.remedies]}
        return asdict(self) | derived | remedies | {"least": self.least._asdict() if self.least else None}

    def __str__(self) -> str:
        settings = self.settings
        scan, remat = "scanned" if settings.scan else "unrolled", ", recomputed" if settings.remat else ""
        parts = f" in {settings.accumulate} parts" if settings.accumulate > 1 else ""
        title = (
            f"{self.model}: rank {settings.rank}, batch {settings.batch_size} x {settings.sequence}{parts}, "
            f"{settings.dtype}, {settings.optimizer}, layers {scan}{remat}"
        )
        rows = {
            "parameters": f"{self.parameters:,}",
            "trained": f"{self.trained:,}",
            "base": readable(self.base_bytes),
            "adapter": readable(self.adapter_bytes),
            "optimizer": readable(self.optimizer_bytes),
            "arguments of the step": readable(self.argument_bytes),
            "temporary": readable(self.planned_bytes),
            "total": readable(self.total_bytes),
        }
        wide, most = max(map(len, rows)), max(map(len, rows.values()))
        lines = [f"  {name.ljust(wide)}  {value.rjust(most)}" for name, value in rows.items()]
        lines[1] += f"  {self.percent:.2f} %"
        return "\n".join([title, *lines, *self._notes(), *self._verdict()])

    def _notes(self) -> list[str]:
        notes = []
        if self.platform == "cpu":
            notes.append("Counted by the compiler of this CPU, in place of an accelerator's, which counts otherwise.")
        if self.planned_bytes != self.temporary_bytes:
            notes.append(
                f"Temporary bytes are those of the step in float32; on this CPU it takes "
                f"{readable(self.temporary_bytes)}, with float32 copies of the {self.settings.dtype} kernels."
            )
        if self.platform == "cpu" and self.settings.remat and not self.settings.scan:
            notes.append("A CPU's compiler undoes remat unless the layers are scanned.")
        return notes

    def _verdict(self) -> list[str]:
        if self.memory is None:
            return []
        spare = self.memory - self.total_bytes
        if spare >= 0:
            return [f"It fits in {readable(self.memory)}, with {readable(spare)} to spare."]
        short = f"It does not fit in {readable(self.memory)}: {readable(-spare)} short."
        if self.least:
            return [short, f"Nothing here makes it fit. The least is {describe(self.least)}."]
        return [f"{short} It would with", *(f"  {describe(remedy)}" for remedy in self.remedies)]


def plan(model: str | Path | LoadedModel, *, memory: int | str | None = None, **settings: Any) -> Plan:
    """Says what fine-tuning a model takes, and what to change where that is too much.

    The base is never loaded: of a folder or hub name config.json alone is read. The figures are those of the step that
    `jlora train` runs, with a batch whose every row is full. Run it where the training will run: temporary bytes are
    those of the default device's compiler, and a CPU only stands in for an accelerator.

    Where the step does not fit, it is compiled again with scan, remat, accumulation (the batch stays what it is),
    bfloat16 and a lower rank, one at a time, and if none does, together. What is recommended was counted to fit.

    Args:
        model: a folder in Hugging Face form, a name on the hub, or what `load_model` gave.
        memory: what there is, in bytes or as "24GB" (10^9 bytes) or "24GiB"; a runtime keeps some of a device's for
            itself.
        settings: the fields of `Settings`.

    Raises:
        ValueError: settings out of range, all of them listed; a model or a target that isn't there.
        TypeError: an unknown setting.
    """
    wanted = Settings(**settings)
    size = None if memory is None else read_memory(memory)
    loaded = load_shapes(model, wanted.untie, wanted.vocab_size)
    check(wanted, loaded)
    name = model if isinstance(model, str | Path) else loaded.model.origin.name if loaded.model.origin else "the model"
    planner = Planner(loaded, size)
    held, step = planner.held(wanted), planner.compiled(wanted)
    found = Plan(
        model=str(name),
        settings=wanted,
        platform=jax.default_backend(),
        parameters=held.parameters,
        trained=held.trained,
        base_bytes=held.base,
        adapter_bytes=held.adapter,
        optimizer_bytes=held.optimizer,
        argument_bytes=step.argument_size_in_bytes,
        output_bytes=step.output_size_in_bytes - step.alias_size_in_bytes,
        temporary_bytes=step.temp_size_in_bytes,
        planned_bytes=planner.compiled(planner.counted(wanted)).temp_size_in_bytes,
        memory=size,
    )
    if found.fits is not False:
        return found
    remedies, least = planner.remedies(wanted)
    return replace(found, remedies=remedies, least=least)


def load_shapes(model: str | Path | LoadedModel, untie: bool = False, vocab_size: int | None = None) -> LoadedModel:
    """The model without its weights; one that is loaded already stays as it was loaded.

    Raises:
        ValueError: settings of loading for a model that is loaded already.
    """
    if not isinstance(model, LoadedModel):
        return load_model(model, abstract=True, untie=untie, vocab_size=vocab_size)
    if untie or vocab_size is not None:
        fix = "pass untie= and vocab_size= to load_model instead."
        raise JloraValueError("plan", "the model is loaded already.", (), fix)
    return model


class Held(NamedTuple):
    """What is there before a step.

    Attributes:
        parameters: of the base with its head.
        trained: how many parameters train.
        base: bytes of the base with its head.
        adapter: bytes of every A, B and scaling.
        optimizer: bytes of the optimizer's state.
        total: bytes of all of it with the batch and the counters.
    """

    parameters: int
    trained: int
    base: int
    adapter: int
    optimizer: int
    total: int


class Step(NamedTuple):
    """A training step and what it is called with, abstract all but the batch."""

    task: Task
    params: Tree
    function: Any
    state: TrainState
    base: Tree
    batch: dict[str, np.ndarray]


class Planner:
    """Counts and compiles the steps of one model, each of them once.

    Args:
        loaded: the model; its parameters are not looked at.
        memory: bytes there are; None for any number.
    """

    def __init__(self, loaded: LoadedModel, memory: int | None):
        self.memory = memory
        self.step = functools.cache(functools.partial(make_step, loaded))
        self.held = functools.cache(self._held)
        self.compiled = functools.cache(self._compiled)

    def _held(self, settings: Settings) -> Held:
        """What is there before a step, counted leaf by leaf."""
        step = self.step(settings)
        leaves, counts = flatten(step.params), summary(step.params, step.task.trained)
        adapter = sum(size_of(leaf) for path, leaf in leaves.items() if is_adapter_leaf(path))
        base = sum(size_of(leaf) for path, leaf in leaves.items() if not is_adapter_leaf(path))
        total = sum(size_of(leaf) for leaf in jax.tree.leaves((step.state, step.base, step.batch)))
        optimizer = sum(size_of(leaf) for leaf in jax.tree.leaves(step.state.opt_state))
        return Held(counts.total, counts.trainable, base, adapter, optimizer, total)

    def _compiled(self, settings: Settings) -> Any:
        """What the compiler says of a step."""
        step = self.step(settings)
        return step.function.lower(step.state, step.base, step.batch).compile().memory_analysis()

    def counted(self, settings: Settings) -> Settings:
        """The settings whose temporary bytes are planned with."""
        stands_in = jax.default_backend() == "cpu" and settings.dtype in NARROW
        return replace(settings, dtype="float32") if stands_in else settings

    def total(self, settings: Settings) -> int:
        """The most that a step holds at once."""
        counted = self.counted(settings)
        return peak(self.compiled(counted)) + self.held(settings).base - self.held(counted).base

    def fits(self, settings: Settings) -> bool:
        """Whether there is memory for a step; compiled only where there is enough for what it is called with."""
        assert self.memory is not None
        return self.held(settings).total <= self.memory and self.total(settings) <= self.memory

    def remedies(self, settings: Settings) -> tuple[tuple[Remedy, ...], Remedy | None]:
        """What makes a step fit that does not, or else the least it comes to."""
        found = [self.relax(settings, name, values) for name, values in knobs(settings).items()]
        fitting = [changed for changed in found if changed is not None]
        if fitting:
            return tuple(self.remedy(settings, changed) for changed in fitting), None
        least = replace(settings, **{name: values[-1] for name, values in knobs(settings).items()})
        if not self.fits(least):
            return (), self.remedy(settings, least)
        # What costs the result most is given back first.
        for name, values in reversed(knobs(settings).items()):
            least = self.relax(least, name, values) or least
        return (self.remedy(settings, least),), None

    def relax(self, settings: Settings, name: str, values: Sequence[Any]) -> Settings | None:
        """The mildest value of one setting with which a step fits, None where it fits with none."""
        tried = [replace(settings, **{name: value}) for value in values]
        place = bisect_left(range(len(tried)), True, key=lambda n: self.fits(tried[n]))
        return tried[place] if place < len(tried) else None

    def remedy(self, settings: Settings, changed: Settings) -> Remedy:
        """What was changed, and what the step takes then."""
        before, after = asdict(settings), asdict(changed)
        changes = {name: value for name, value in after.items() if value != before[name]}
        return Remedy(changes, self.total(changed))


def knobs(settings: Settings) -> dict[str, list[Any]]:
    """The values a setting may take to save memory, from as it is to the strongest; the harmless ones first."""
    size, rank = settings.batch_size, settings.rank
    return {
        "scan": [settings.scan] if settings.scan else [False, True],
        "remat": [settings.remat] if settings.remat else [False, True],
        "accumulate": [n for n in range(settings.accumulate, size + 1) if size % n == 0],
        "dtype": [settings.dtype] if settings.dtype in NARROW else [settings.dtype, "bfloat16"],
        "rank": [rank >> n for n in range(rank.bit_length())],
    }


def make_step(loaded: LoadedModel, settings: Settings) -> Step:
    """The step that `jlora train` runs with these settings, on a full batch."""
    loaded = shaped(loaded, settings)
    model, kind = loaded.model, task_of(loaded, settings)
    job = configs.Config(
        model=configs.Model(name="model"),
        data=configs.Data(task=kind, train=Path("data")),
        optimisation=configs.Optimisation(
            optimizer=settings.optimizer, batch_size=settings.batch_size, accumulate=settings.accumulate
        ),
        output=configs.Output(folder=Path("run")),
    )
    task = TASKS[kind](loaded, batch_size=settings.batch_size, max_length=settings.sequence)
    targets = model.lora_targets if settings.targets is None else settings.targets
    params = wrap(loaded.params, settings.rank, targets=targets, layout=model.lora_layout)
    adapters, base = split(params, task.trained)
    tx = make_optimizer(job.optimisation, STEPS, adapters)
    state = jax.eval_shape(lambda adapters: TrainState.create(adapters, tx, jax.random.key(0)), adapters)
    function = make_train_step(task.loss_fn(settings.dropout), tx, accumulate=settings.accumulate)
    return Step(task, params, function, state, base, full_batch(settings, kind))


def shaped(loaded: LoadedModel, settings: Settings) -> LoadedModel:
    """The model computed as the settings say, with the task's head, its parameters abstract."""
    model, dtype = loaded.model, jnp.dtype(settings.dtype)
    switches: dict[str, Any] = {"scan": settings.scan, "remat": settings.remat}
    family, head = family_of(model), TASKS[task_of(loaded, settings)].head
    model = model.clone(num_labels=settings.labels or model.num_labels)
    if family.pooled:
        model = model.clone(config=replace(model.config, **switches), dtype=dtype, head=head)
    else:
        model = model.clone(config=replace(model.config, **switches, dtype=dtype), head_type=head)
    return replace(loaded, model=model, params=shapes(model, dtype))


def task_of(loaded: LoadedModel, settings: Settings) -> Any:
    """What is learnt."""
    if settings.task != "auto":
        return settings.task
    head = loaded.model.head_type
    if head in ("causal_lm", "token_classification"):
        return head
    return "sequence_classification"


def full_batch(settings: Settings, kind: str) -> dict[str, np.ndarray]:
    """A batch as the step takes it, without padding."""
    size, ones = settings.sequence, np.ones(settings.sequence, np.int32)
    targets = np.zeros(() if kind == "sequence_classification" else size, np.int32)
    row = Row(ones, targets, targets.astype(np.float32), ones if TASKS[kind].head == "causal_lm" else None)
    batch: Any = pad([row] * settings.batch_size, size=settings.batch_size, length=size, pad_id=0)
    return prepare(batch).batch


def peak(found: Any) -> int:
    """The most that a compiled step holds at once; what it gives back in an argument's place is counted once."""
    given = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + given + found.temp_size_in_bytes


def size_of(leaf: Any) -> int:
    """Bytes of an array, concrete or abstract."""
    return leaf.size * leaf.dtype.itemsize


def check(settings: Settings, loaded: LoadedModel) -> None:
    """Raises where a plan can't be made, everything that is wrong listed."""
    heads, most = family_of(loaded.model).heads, getattr(loaded.config, "max_position_embeddings", None)
    wrong = [
        f"{name} = {getattr(settings, name)}  expected: a whole number from 1"
        for name in ("rank", "batch_size", "accumulate", "sequence")
        if getattr(settings, name) < 1
    ]
    if settings.dtype not in ("float32", *NARROW):
        wrong.append(f"dtype = {settings.dtype!r}  expected: float32, {' or '.join(NARROW)}")
    if not 0 <= settings.dropout <= 0.9:
        wrong.append(f"dropout = {settings.dropout}  expected: a number 0 to 0.9")
    if not wrong and settings.batch_size % settings.accumulate:
        wrong.append(f"accumulate = {settings.accumulate}  expected: a divisor of batch_size = {settings.batch_size}")
    if most is not None and settings.sequence > most:
        wrong.append(f"sequence = {settings.sequence}  expected: at most {most} tokens, which the model reads")
    kinds = [name for name, task in TASKS.items() if task.head in heads]
    if settings.task not in ("auto", *kinds):
        wrong.append(f"task = {settings.task!r}  expected: {' or '.join(kinds)}, for this model")
    elif settings.labels is not None:
        labelled = TASKS[task_of(loaded, settings)].head in LABELLED
        if not labelled or settings.labels < 1:
            wrong.append(
                f"labels = {settings.labels}  expected: {'a whole number from 1' if labelled else 'none here'}"
            )
    if wrong:
        raise JloraValueError("plan", "settings that can't be planned.", wrong, "correct them.")


def read_memory(memory: int | str) -> int:
    """Bytes of a size like "24GB" or "80GiB".

    >>> read_memory("24GB"), read_memory("1.5 GiB"), read_memory(1000)
    (24000000000, 1610612736, 1000)

    Raises:
        ValueError: it is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?i?)B?\s*", str(memory))
    unit = found[2].replace("k", "K") if found else "none"
    if not found or unit not in UNITS or float(found[1]) == 0:
        near = nearest(str(memory), ("24GB", "80GiB", "512MB"), 1)[0]
        fix = "give bytes, or a number with kB, MB, GB, TB, or KiB, MiB, GiB, TiB."
        raise JloraValueError("plan", f"{memory!r} is no size of a memory.", [f"as in {near!r}"], fix)
    return round(float(found[1]) * UNITS[unit])


def readable(size: float) -> str:
    """Bytes in GB of 10^9, or MB of 10^6."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"


def describe(remedy: Remedy) -> str:
    """A remedy in words."""
    changes = ", ".join(name if value is True else f"{name} {value}" for name, value in remedy.changes.items())
    return f"{changes or 'what it is'}: {readable(remedy.total_bytes)}"
