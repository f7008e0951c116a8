"""Sequence classification: which of its entries a question belongs to, learnt by an adapter and a new head.

A run's folder holds all that `load_run` needs to answer with it, the base model alone excepted.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from jlora.core.adapt import adapt
from jlora.core.errors import complain
from jlora.core.layouts import A, B
from jlora.core.paths import Tree, map_with_path
from jlora.core.tree import join, split, wrap
from jlora.interop.huggingface import LoadedModel, load_model
from jlora.recipes import config as configs
from jlora.recipes.config import Config, Optimisation
from jlora.recipes.data import Batch, Row, ordered_batches, tokenise, training_batches
from jlora.training.checkpoint import restore_adapter, save_adapter
from jlora.training.step import TrainState, make_train_step

HEAD = ("classifier",)
ADAPTER, CONFIG, LABELS = "adapter", "config.toml", "labels.json"
METRICS, RESULT, CURVE = "metrics.jsonl", "result.json", "learning_curve.png"
RUN_FILES = (ADAPTER, CONFIG, LABELS, METRICS, RESULT, CURVE)

# (params, input_ids, attention_mask), both int[rows, time], to logits float[rows, labels].
Forward = Callable[[Tree, Any, Any], Any]


class Scores(NamedTuple):
    """What a model made of some questions.

    Attributes:
        logits: one line a question, in the questions' order.
        loss: mean cross entropy.
        accuracy: share of questions whose best entry is the right one.
    """

    logits: Float[np.ndarray, "rows labels"]
    loss: float
    accuracy: float


class Step(NamedTuple):
    """Training went on by some steps.

    Attributes:
        step: steps taken so far.
        steps: steps there are in all.
        epoch: the epoch it is in, from 1.
        questions: questions trained on since the event before.
        loss: their mean cross entropy.
        learning_rate: the rate of A at this step.
    """

    step: int
    steps: int
    epoch: int
    questions: int
    loss: float
    learning_rate: float


class Epoch(NamedTuple):
    """An epoch ended.

    Attributes:
        epoch: its number, from 1.
        step: steps taken so far.
        loss: mean cross entropy over its questions as they were trained on.
        validation: the validation questions.
        best: whether no epoch before did better on them.
        skipped: steps left out so far because loss or gradient was not finite.
        params: the wrapped tree now.
    """

    epoch: int
    step: int
    loss: float
    validation: Scores
    best: bool
    skipped: int
    params: Tree


@dataclass(frozen=True, kw_only=True)
class Run:
    """A saved run, loaded onto its base.

    Attributes:
        loaded: the base model.
        params: the wrapped tree.
        labels: the entries; a label's place is its class.
        answers: what each entry says; empty where none were given.
        config: the job as it was run.
    """

    loaded: LoadedModel
    params: Tree
    labels: tuple[str, ...]
    answers: Mapping[str, str]
    config: Config


def load_base(config: Config, labels: Sequence[str]) -> LoadedModel:
    """The base model with a new head for `labels`; a seed makes the same head each time.

    Raises:
        ValueError: no such model, no tokenizer beside it, or it reads fewer tokens than the config asks for.
    """
    loaded = load_model(
        config.model.name,
        head="classification",
        pooling=config.model.pooling,
        labels=labels,
        key=jax.random.key(config.optimisation.seed),
    )
    if loaded.tokenizer is None:
        fix = "add the tokenizer's files to the model's folder."
        raise ValueError(complain("train", f"{config.model.name} has no tokenizer.", [], fix))
    most = loaded.config.max_position_embeddings
    if config.data.max_length > most:
        problem = f"data.max_length is {config.data.max_length}, the model reads {most} tokens."
        raise ValueError(complain("train", problem, [], f"set max_length to {most} or less."))
    return loaded


def wrap_base(config: Config, loaded: LoadedModel) -> Tree:
    """The base's parameters with a new adapter, as the config says.

    Raises:
        ValueError: a rank, alpha or target that the model has no place for.
    """
    adapter = config.adapter
    return wrap(
        loaded.params,
        adapter.rank,
        alpha=adapter.alpha,
        targets=loaded.model.lora_targets if adapter.targets is None else adapter.targets,
        key=jax.random.fold_in(jax.random.key(config.optimisation.seed), 1),
        rslora=adapter.rslora,
    )


def forward_of(loaded: LoadedModel) -> tuple[Forward, Forward]:
    """The jitted model, for wrapped parameters and for plain ones."""
    plain = _apply(loaded)
    return jax.jit(adapt(plain)), jax.jit(plain)


def _apply(loaded: LoadedModel) -> Forward:
    return lambda params, ids, mask: loaded.model.apply({"params": params}, ids, mask)


def evaluate(
    forward: Forward, params: Tree, rows: Sequence[Row], *, batch_size: int, max_length: int, pad_id: int
) -> Scores:
    """Asks all questions, in batches of the shapes that training uses."""
    logits: Any = None
    for places, batch in ordered_batches(rows, batch_size=batch_size, max_length=max_length, pad_id=pad_id):
        out = np.asarray(forward(params, batch["input_ids"], batch["attention_mask"]), np.float32)
        logits = np.empty((len(rows), out.shape[1]), np.float32) if logits is None else logits
        logits[places] = out[: len(places)]
    classes = np.array([row.label for row in rows])
    losses = -log_softmax(logits)[np.arange(len(rows)), classes]
    return Scores(logits, float(losses.mean()), float((logits.argmax(-1) == classes).mean()))


def log_softmax(logits: Float[np.ndarray, "rows labels"]) -> Float[np.ndarray, "rows labels"]:
    """Logarithms of probabilities, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


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
    """AdamW, with rates of its own for B and for the head.

    Source: LoRA+, Hayou et al. 2024, arXiv:2402.12354, for B's rate.
    """

    def ratio(path: str, _: Any) -> float:
        return 1.0 if path.endswith(A) else options.b_ratio if path.endswith(B) else options.head_ratio

    ratios = map_with_path(ratio, adapters)
    adamw = optax.adamw(schedule(options, steps), weight_decay=options.weight_decay)
    scale = optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, ratios))
    return optax.chain(adamw, scale)


def make_loss(loaded: LoadedModel, dropout: float) -> Callable[[Tree, Batch, Key[Array, ""]], Float[Array, ""]]:
    """The cross entropy of a batch; rows that fill it up count as 0, so a batch of few weighs little."""
    adapted = adapt(_apply(loaded), dropout=dropout)

    def loss_fn(params: Tree, batch: Batch, key: Key[Array, ""]) -> Float[Array, ""]:
        keys = {"lora_key": key} if dropout else {}
        logits = adapted(params, batch["input_ids"], batch["attention_mask"], **keys).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return (losses * batch["weights"]).mean()

    return loss_fn


def fit(
    config: Config,
    loaded: LoadedModel,
    params: Tree,
    train: Sequence[Row],
    validation: Sequence[Row],
    forward: Forward,
) -> Iterator[Step | Epoch]:
    """Trains the adapters and the head, and tells of it as it goes.

    Args:
        config: the job.
        loaded: the model.
        params: its wrapped parameters.
        train: questions to train on.
        validation: questions asked after every epoch.
        forward: the jitted model for wrapped parameters.

    Yields:
        A `Step` every `output.log_every` steps and at an epoch's end, then an `Epoch`. The best epoch has the
        highest validation accuracy, and among equals the lowest validation loss.
    """
    options, max_length, pad_id = config.optimisation, config.data.max_length, loaded.tokenizer.pad_token_id
    size = options.batch_size
    epoch_batches = training_batches(train, batch_size=size, max_length=max_length, pad_id=pad_id, seed=options.seed)
    per_epoch, steps = len(epoch_batches), len(epoch_batches) * options.epochs
    adapters, base = split(params, HEAD)
    tx, rate = make_optimizer(options, steps, adapters), schedule(options, steps)
    state = TrainState.create(adapters, tx, jax.random.fold_in(jax.random.key(options.seed), 2))
    step = make_train_step(make_loss(loaded, config.adapter.dropout), tx, clip=options.clip)
    best = (-1.0, 0.0)
    pending: list[tuple[Any, int]] = []
    totals = [0.0, 0]
    for n, batch in enumerate(epoch_batches.repeat(options.epochs), 1):
        state, metrics = step(state, base, batch)
        pending.append((metrics["loss"], int(batch["weights"].sum())))
        epoch, ends = (n - 1) // per_epoch + 1, n % per_epoch == 0
        if n % config.output.log_every == 0 or ends:
            # The loss is a mean over the rows of a batch, filled up ones included.
            total, questions = (
                size * sum(float(loss) for loss, _ in pending),
                sum(rows for _, rows in pending),
            )
            pending = []
            totals = [totals[0] + total, totals[1] + questions]
            yield Step(n, steps, epoch, questions, total / questions, float(rate(n - 1)))
        if ends:
            # A step donates its state: what is handed out has to be a copy.
            now = join(jax.tree.map(jnp.copy, state.adapters), base)
            scores = evaluate(forward, now, validation, batch_size=size, max_length=max_length, pad_id=pad_id)
            better = (scores.accuracy, -scores.loss) > best
            best = (scores.accuracy, -scores.loss) if better else best
            yield Epoch(epoch, n, totals[0] / totals[1], scores, better, int(metrics["skipped"]), now)
            totals = [0.0, 0]


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Finds out before training whether a run can be written.

    Raises:
        FileExistsError: a run is there already.
        NotADirectoryError: the path goes through a file.
        PermissionError: the folder can't be written to.
    """
    there = [str(folder / name) for name in RUN_FILES if (folder / name).exists()]
    if there and not overwrite:
        fix = "choose another --output.folder, or pass --output.overwrite."
        raise FileExistsError(complain("train", f"{folder} holds a run already.", there, fix))
    parent = next(place for place in (folder, *folder.parents) if place.exists())
    fix = "choose another --output.folder."
    if not parent.is_dir():
        raise NotADirectoryError(complain("train", f"{parent} is a file, not a folder.", [], fix))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(complain("train", f"{parent} can't be written to.", [], fix))


def begin_run(config: Config, labels: Sequence[str], answers: Mapping[str, str]) -> None:
    """Clears the folder of an earlier run and writes all of the new one that is known before training."""
    folder = config.output.folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in RUN_FILES:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (folder / CONFIG).write_text(configs.to_toml(config), encoding="utf-8")
    entries = [{"label": label} | ({"answer": answers[label]} if answers else {}) for label in labels]
    (folder / LABELS).write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def save_params(folder: Path, params: Tree) -> None:
    """Writes the adapter and the head of a run, over what was there."""
    save_adapter(folder / ADAPTER, params, train=HEAD)


def load_run(folder: Path, *, model: str | None = None) -> Run:
    """Loads a base model afresh and puts a run's adapter and head on it.

    Args:
        folder: what a training run wrote.
        model: where the base is now, if not where it was.

    Raises:
        FileNotFoundError: no finished run is there.
        ValueError: files of it are damaged, or the base is not the one it was trained on.
    """
    missing = [str(folder / name) for name in (CONFIG, LABELS, ADAPTER) if not (folder / name).exists()]
    if missing:
        fix = "pass the folder that `jlora train` wrote."
        raise FileNotFoundError(complain("predict", f"{folder} holds no run.", missing, fix))
    config = configs.read(folder / CONFIG)
    if model is not None:
        config = configs.with_model(config, model)
    labels, answers = _read_labels(folder / LABELS)
    loaded = load_base(config, labels)
    params = restore_adapter(folder / ADAPTER, loaded.params)
    return Run(loaded=loaded, params=params, labels=labels, answers=answers, config=config)


def _read_labels(path: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        labels = tuple(str(entry["label"]) for entry in entries)
        return labels, {entry["label"]: str(entry["answer"]) for entry in entries if "answer" in entry}
    except (ValueError, TypeError, KeyError) as error:
        problem = f"{path} is damaged: {error!r}."
        raise ValueError(complain("predict", problem, [], "copy the run's folder again, or train again.")) from None


def probabilities(
    run: Run, forward: Forward, params: Tree, texts: Sequence[str], *, batch_size: int
) -> Float[np.ndarray, "texts labels"]:
    """The probability of every entry for every text.

    Args:
        run: whose tokenizer and limits are used.
        forward: the jitted model, for wrapped or for plain parameters.
        params: its parameters.
        texts: what is asked.
        batch_size: rows to a batch, filled up where there are fewer texts.
    """
    tokenizer, max_length = run.loaded.tokenizer, run.config.data.max_length
    rows = [Row(ids, 0) for ids in tokenise(tokenizer, texts, max_length)]
    pad_id = tokenizer.pad_token_id
    scores = evaluate(forward, params, rows, batch_size=batch_size, max_length=max_length, pad_id=pad_id)
    return np.exp(log_softmax(scores.logits))


def bytes_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
