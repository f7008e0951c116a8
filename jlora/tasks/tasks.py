"""What can be learnt: classes of texts, classes of tokens, a language model, answers to questions.

A task knows its model's head, its loss and its measure; the loop around it is everyone's.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from jlora.data.batches import Row, ordered_batches
from jlora.data.readers import OUTSIDE
from jlora.errors import JloraValueError, count
from jlora.hf.load import LoadedModel
from jlora.tasks.metrics import entity_scores, macro_f1
from jlora.training.losses import cross_entropy
from jlora.training.sharding import place_batch
from jlora.transform.adapt import adapt
from jlora.tree.paths import Tree

LossFn = Callable[[Tree, dict[str, Any], Key[Array, ""]], Float[Array, ""]]


class Scores(NamedTuple):
    """What a model made of some rows.

    Attributes:
        loss: mean cross entropy over their targets.
        metrics: what the task measures, by name.
        value: what the best is chosen by, the higher the better.
        outputs: the rows' logits, classes of tokens, or nothing.
    """

    loss: float
    metrics: dict[str, float]
    value: float
    outputs: Any


class Task:
    """One kind of thing to learn, on a model that is loaded for it.

    Args:
        loaded: the model.
        labels: names of the classes, in the order of the logits.
        mesh: the devices; None for one.
        batch_size: rows of a batch.
        max_length: tokens of a row.

    Attributes:
        head: which of the model's heads it reads.
        trained: leaves trained in full, as `split` takes them.
        metrics: what it measures beside the loss.
        measure: the metric that chooses the best.
    """

    head: str | None = None
    trained: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    measure = "loss"

    def __init__(
        self,
        loaded: LoadedModel,
        labels: Sequence[str] = (),
        mesh: Mesh | None = None,
        *,
        batch_size: int,
        max_length: int,
    ):
        self.loaded, self.labels, self.mesh = loaded, tuple(labels), mesh
        self.batch_size, self.max_length = batch_size, max_length
        # On a mesh every device gets all outputs, so that each process can read them.
        whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        self.adapted = jax.jit(functools.partial(self._outputs, self._adapted()), out_shardings=whole)
        self.plain = jax.jit(functools.partial(self._outputs, self._plain()), out_shardings=whole)

    def loss_fn(self, dropout: float) -> LossFn:
        """The loss of a batch whose weights sum to its rows."""
        raise NotImplementedError

    def score(self, params: Tree, rows: Sequence[Row], *, merged: bool = False) -> Scores:
        """Asks all rows.

        Args:
            params: a wrapped tree, or a merged one.
            rows: what is asked.
            merged: the tree holds no adapters.
        """
        raise NotImplementedError

    def check_vocabulary(self, who: str, splits: Mapping[str, Sequence[Row]]) -> None:
        """Checks that the model has a row in its embedding for every token.

        Args:
            who: for the error.
            splits: rows by the name of their split.

        Raises:
            ValueError: the tokenizer has tokens that the model lacks, and the rows hold some of them: all are listed.
        """
        size, tokenizer = self.loaded.config.vocab_size, self.loaded.tokenizer
        offenders = []
        for split, rows in splits.items():
            numbers = Counter(token for row in rows for token in {*self._tokens(row).tolist()} if token >= size)
            offenders += [
                f"{split}: {tokenizer.convert_ids_to_tokens(token)!r} (id {token}) in {count(number, 'row')}"
                for token, number in sorted(numbers.items())
            ]
        if offenders:
            problem = f"the model has {size} tokens, the tokenizer {len(tokenizer)}, and the data needs the others."
            fix = f"set model.vocab_size = {len(tokenizer)} to add rows for them, or remove these tokens from the data."
            raise JloraValueError(who, problem, offenders, fix)

    def _tokens(self, row: Row) -> Int[np.ndarray, " tokens"]:
        """The tokens that a row needs a row of the embedding for."""
        return row.ids

    def _outputs(self, forward: Any, params: Tree, batch: dict[str, Any]) -> Any:
        raise NotImplementedError

    def _plain(self) -> Any:
        model = self.loaded.model
        return lambda params, batch: model.apply({"params": params}, *inputs(batch), **packed(batch))

    def _adapted(self) -> Any:
        return adapt(self._plain())

    def ask(self, params: Tree, rows: Sequence[Row], merged: bool) -> Iterable[tuple[list[int], dict[str, Any], Any]]:
        """Rows' places, their batch and what the model gives for it, batch by batch."""
        forward = self.plain if merged else self.adapted
        size, length = self.batch_size, self.max_length
        pad_id = pad_token(self.loaded)
        for places, found in ordered_batches(rows, batch_size=size, max_length=length, pad_id=pad_id):
            batch: Any = found
            placed = batch if self.mesh is None else place_batch(batch, self.mesh)
            yield places, batch, jax.tree.map(np.asarray, forward(params, placed))


def inputs(batch: dict[str, Any]) -> tuple[Any, Any]:
    return batch["input_ids"], batch["attention_mask"]


def packed(batch: dict[str, Any]) -> dict[str, Any]:
    return {"segment_ids": batch["segment_ids"]} if "segment_ids" in batch else {}


def pad_token(loaded: LoadedModel) -> int:
    """The token that pads a row: the tokenizer's, or 0 where the model has no row for that one. It is masked."""
    token = loaded.tokenizer.pad_token_id
    return 0 if token is None or token >= loaded.config.vocab_size else token


class Classes(Task):
    """Classes of texts."""

    head = "classification"
    metrics: tuple[str, ...] = ("accuracy", "macro_f1")
    measure = "accuracy"

    def __init__(self, loaded: LoadedModel, *args: Any, **options: Any):
        super().__init__(loaded, *args, **options)
        self.trained = (loaded.model.label_module,)

    def loss_fn(self, dropout: float) -> LossFn:
        """Weighted cross entropy."""
        adapted = adapt(self._plain(), dropout=dropout)

        def loss_fn(params: Tree, batch: dict[str, Any], key: Key[Array, ""]) -> Float[Array, ""]:
            logits = adapted(params, batch, **({"lora_key": key} if dropout else {})).astype(jnp.float32)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
            return (losses * batch["weights"]).sum() / len(batch["weights"])

        return loss_fn

    def _outputs(self, forward: Any, params: Tree, batch: dict[str, Any]) -> Any:
        return forward(params, batch).astype(jnp.float32)

    def score(self, params: Tree, rows: Sequence[Row], *, merged: bool = False) -> Scores:
        """Accuracy and macro-F1; `outputs` are the logits (rows, labels)."""
        logits = np.empty((len(rows), len(self.labels)), np.float32)
        for places, _, out in self.ask(params, rows, merged):
            logits[places] = out[: len(places)]
        classes = np.array([row.targets for row in rows])
        losses = -log_softmax(logits)[np.arange(len(rows)), classes]
        predicted = logits.argmax(-1)
        accuracy = float((predicted == classes).mean())
        metrics = {"accuracy": accuracy, "macro_f1": macro_f1(classes, predicted)}
        return Scores(float(losses.mean()), metrics, accuracy, logits)


class Entities(Classes):
    """Classes of tokens, judged by the entities they make."""

    head = "token_classification"
    metrics = ("precision", "recall", "f1")
    measure = "f1"

    def score(self, params: Tree, rows: Sequence[Row], *, merged: bool = False) -> Scores:
        """Precision, recall and F1 of entities; `outputs` are the tags of each row's words.

        Words that `max_length` cut off are tagged as outside, so their entities count as missed.
        """
        found: list[list[str]] = [[] for _ in rows]
        gold: list[list[str]] = [[] for _ in rows]
        total, targets = 0.0, 0
        for places, batch, out in self.ask(params, rows, merged):
            chances = log_softmax(out)
            for line, place in enumerate(places):
                kept = batch["weights"][line] > 0
                classes = batch["labels"][line][kept]
                total -= float(chances[line][kept][np.arange(len(classes)), classes].sum())
                targets += len(classes)
                gold[place] = [self.labels[n] for n in classes]
                found[place] = [self.labels[n] for n in out[line][kept].argmax(-1)]
                beyond = rows[place].beyond
                if beyond is not None:
                    gold[place] += [self.labels[n] for n in beyond]
                    found[place] += [OUTSIDE] * len(beyond)
        precision, recall, f1 = entity_scores(gold, found)
        return Scores(total / targets, {"precision": precision, "recall": recall, "f1": f1}, f1, found)


class Language(Task):
    """The next token of texts, or of answers alone."""

    head = "causal_lm"
    metrics = ("perplexity",)
    measure = "loss"

    def loss_fn(self, dropout: float) -> LossFn:
        """Cross entropy in chunks of tokens, its gradient taken in the forward pass."""
        model = self.loaded.model
        hidden = adapt(self._hidden, dropout=dropout)
        head = adapt(lambda params, hidden: model.apply({"params": params}, hidden, method="head"))

        def loss_fn(params: Tree, batch: dict[str, Any], key: Key[Array, ""]) -> Float[Array, ""]:
            states = hidden(params, batch, **({"lora_key": key} if dropout else {}))
            weights = batch["weights"]
            mean = cross_entropy(head, params, states, batch["labels"], weights)
            return mean * weights.sum() / len(weights)

        return loss_fn

    def _tokens(self, row: Row) -> Int[np.ndarray, " tokens"]:
        return np.concatenate([row.ids, row.targets[row.weights > 0]])

    def _hidden(self, params: Tree, batch: dict[str, Any]) -> Any:
        return self.loaded.model.apply({"params": params}, *inputs(batch), **packed(batch), method="hidden")

    def _outputs(self, forward: Any, params: Tree, batch: dict[str, Any]) -> Any:
        hidden, head = forward
        weights = batch["weights"]
        total = weights.sum()
        return cross_entropy(head, params, hidden(params, batch), batch["labels"], weights) * total, total

    def _plain(self) -> Any:
        model = self.loaded.model
        return self._hidden, lambda params, hidden: model.apply({"params": params}, hidden, method="head")

    def _adapted(self) -> Any:
        return tuple(adapt(part) for part in self._plain())

    def score(self, params: Tree, rows: Sequence[Row], *, merged: bool = False) -> Scores:
        """Loss in nats per token, and perplexity."""
        sums = [out for _, _, out in self.ask(params, rows, merged)]
        loss = float(sum(total for total, _ in sums) / sum(targets for _, targets in sums))
        return Scores(loss, {"perplexity": math.exp(min(loss, 700.0))}, -loss, None)


TASKS: dict[str, type[Task]] = {
    "sequence_classification": Classes,
    "token_classification": Entities,
    "causal_lm": Language,
    "instruction": Language,
}


def log_softmax(logits: Float[np.ndarray, "*rows labels"]) -> Float[np.ndarray, "*rows labels"]:
    """Logarithms of probabilities, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
