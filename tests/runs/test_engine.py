"""Pieces of the training loop; whole runs are in test_recipes and test_survival."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import optax
import pytest

from jlora.runs.config import Config, Data, Model, Optimisation, Output
from jlora.runs.engine import check_training, named_optimizer, prepare, schedule


def batch():
    rng = np.random.default_rng(0)
    weights = (rng.random((8, 5)) < 0.6).astype(np.float32)
    ids = rng.integers(1, 9, (8, 5))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids, "weights": weights}


def test_the_processes_parts_make_up_the_batch_of_one():
    whole = prepare(batch())
    parts = [prepare(batch(), index=index, count=4) for index in range(4)]
    for name, value in whole.batch.items():
        np.testing.assert_array_equal(np.concatenate([part.batch[name] for part in parts]), value)
    assert {(part.targets, part.tokens) for part in parts} == {(int(batch()["weights"].sum()), 40)}


def test_the_mean_over_a_batchs_rows_is_the_mean_over_its_targets():
    losses = np.random.default_rng(1).random((8, 5))
    weights = batch()["weights"]
    expected = (losses * weights).sum() / weights.sum()
    scaled = prepare(batch()).batch["weights"]
    np.testing.assert_allclose((losses * scaled).sum() / len(scaled), expected, rtol=1e-6)
    # In equal parts too, however the targets are spread over them.
    parts = [(losses[i::4] * scaled[i::4]).sum() / 2 for i in range(4)]
    np.testing.assert_allclose(np.mean(parts), expected, rtol=1e-6)


@pytest.mark.parametrize("kind, middle, end", [("linear", 0.5, 0.0), ("cosine", 0.5, 0.0), ("constant", 1.0, 1.0)])
def test_the_rate_rises_over_the_warm_up_and_goes_on_as_told(kind, middle, end):
    rate = schedule(Optimisation(learning_rate=2.0, warmup=0.2, schedule=kind), 100)
    np.testing.assert_allclose([rate(n) for n in (0, 10, 20, 60, 100)], [0, 1, 2, 2 * middle, 2 * end], atol=1e-6)


def test_an_optimizer_is_found_in_optax_by_name():
    for name in ("adamw", "sgd", "lion", "adafactor"):
        assert isinstance(named_optimizer(Optimisation(optimizer=name), 10), optax.GradientTransformation)
    with pytest.raises(ValueError, match=r"optax has no such optimizer\.\n  'adamv'  nearest: adam, "):
        named_optimizer(Optimisation(optimizer="adamv"), 10)
    with pytest.raises(ValueError, match=r"optax\.sgd has no weight decay"):
        named_optimizer(Optimisation(optimizer="sgd", weight_decay=0.1), 10)


@pytest.mark.parametrize("name", ["lbfgs", "sm3", "rprop"])
def test_an_optimizer_that_needs_more_than_a_gradient_is_refused_at_the_start(name):
    with pytest.raises(
        ValueError, match=rf"optax\.{name} needs more than a learning-rate schedule, a gradient and"
    ) as e:
        named_optimizer(Optimisation(optimizer=name), 10)
    assert "\nFix: choose another optimizer" in str(e.value)


def test_a_batch_that_the_accumulation_does_not_divide_is_refused_at_the_start():
    job = Config(model=Model(name="m"), data=Data(train=Path("/a")), output=Output(folder=Path("/out")))
    check_training(replace(job, optimisation=Optimisation(batch_size=6, accumulate=3)))
    with pytest.raises(ValueError, match=r"equal microbatches\.\n  batch_size = 6, accumulate = 4\nFix: "):
        check_training(replace(job, optimisation=Optimisation(batch_size=6, accumulate=4)))
