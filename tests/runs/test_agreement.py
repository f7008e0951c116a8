"""Adapted and merged predictions: rounding is not a difference, a wrong merge is."""

import jax
import numpy as np
import pytest

from jlora.runs.agreement import TOLERANCES, coarsest_dtype, compare
from jlora.runs.config import Model
from jlora.tasks.tasks import Scores


def classes(logits: np.ndarray) -> Scores:
    return Scores(0.0, {}, 0.0, logits)


def test_predictions_that_differ_in_a_near_tie_agree_and_others_do_not():
    adapted = np.array([[8.0, 0.0, -8.0], [1.0, 1.02, 0.0]], np.float32)
    merged = np.array([[8.0, 0.1, -8.0], [1.03, 1.0, 0.0]], np.float32)
    difference, warning = compare(classes(adapted), classes(merged), "bfloat16")
    assert difference == pytest.approx(0.1) and warning is None
    # In float32, 0.02 of 8 is no rounding.
    _, warning = compare(classes(adapted), classes(merged), "float32")
    assert warning is not None and warning.startswith("1 prediction of 2 differs between the adapted and the merged")
    far = np.array([[0.0, 8.0, -8.0], [0.0, -1.0, 5.0]], np.float32)
    _, warning = compare(classes(adapted), classes(far), "bfloat16")
    assert warning is not None and warning.startswith("2 predictions of 2 differ")


def test_logits_that_are_not_numbers_do_not_agree():
    broken = np.full((3, 2), np.nan, np.float32)
    assert compare(classes(broken), classes(broken), "bfloat16").warning is not None


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_mean_losses_agree_within_the_dtypes_rounding(dtype):
    eps = {"float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}[dtype]
    for factor, agrees in ((1, True), (1000, False)):
        other = Scores(4.0 * (1 + factor * eps), {}, 0.0, None)
        agreement = compare(Scores(4.0, {}, 0.0, None), other, dtype)
        assert agreement.difference == pytest.approx(4 * factor * eps)
        assert (agreement.warning is None) == agrees
    assert compare(Scores(float("nan"), {}, 0.0, None), Scores(1.0, {}, 0.0, None), dtype).warning is not None


def test_the_coarser_of_storage_and_computation_decides():
    assert coarsest_dtype(Model(name="x")) == ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    assert coarsest_dtype(Model(name="x", dtype="bfloat16", compute_dtype="float32")) == "bfloat16"
    assert coarsest_dtype(Model(name="x", dtype="float32", compute_dtype="float16")) == "float16"
