"""Whether a model with its adapter applied and the same model with the adapter merged give the same predictions."""

from typing import NamedTuple

import jax
import numpy as np

from jlora.errors import count
from jlora.runs.config import Model
from jlora.tasks.tasks import Scores

# About ten units in the last place of each dtype; float32 sums over thousands of terms lose some more.
TOLERANCES = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 8e-2}


class Agreement(NamedTuple):
    """The comparison of adapted and merged scores.

    Attributes:
        difference: the largest difference of logits where the task has them, else that of the mean losses.
        warning: what differs by more than rounding explains; None where nothing does.
    """

    difference: float
    warning: str | None


def compare(adapted: Scores, merged: Scores, dtype: str) -> Agreement:
    """Compares the scores of a model with its adapter applied and merged.

    With logits, predictions are compared: a row counts as different where both predictions differ and the adapted
    logits of the two classes are further apart than the tolerance. Without logits, the mean losses are compared.

    Args:
        adapted: scores with the adapter applied.
        merged: scores of the same rows with the adapter merged.
        dtype: the least precise dtype of the parameters and of the computation.
    """
    if isinstance(adapted.outputs, np.ndarray):
        return _compare_logits(adapted.outputs, merged.outputs, dtype)
    difference = abs(adapted.loss - merged.loss)
    if difference <= TOLERANCES[dtype] * max(1.0, abs(adapted.loss)):
        return Agreement(difference, None)
    losses = f"mean losses {adapted.loss:g} and {merged.loss:g}"
    return Agreement(difference, f"the adapted and the merged model differ by more than {dtype} rounds: {losses}.")


def _compare_logits(adapted: np.ndarray, merged: np.ndarray, dtype: str) -> Agreement:
    difference = float(np.abs(adapted - merged).max(initial=0.0))
    rows = np.arange(len(adapted))
    margin = adapted.max(-1) - adapted[rows, merged.argmax(-1)]
    tolerance = TOLERANCES[dtype] * np.abs(adapted).max(initial=0.0)
    # Not "margin > tolerance": a NaN is a difference too.
    different = int((~(margin <= tolerance)).sum())
    if not different:
        return Agreement(difference, None)
    verb = "differs" if different == 1 else "differ"
    predictions = f"{count(different, 'prediction')} of {len(adapted)} {verb}"
    return Agreement(
        difference,
        f"{predictions} between the adapted and the merged model, logits by up to {difference:g}: "
        f"more than {dtype} rounds.",
    )


def coarsest_dtype(model: Model) -> str:
    """The least precise dtype that a model is stored or computed in.

    An accelerator multiplies float32 in TF32 or bfloat16 unless `jax_default_matmul_precision` says otherwise.
    """
    dtypes = {model.dtype, model.compute_dtype or model.dtype}
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    if jax.default_backend() != "cpu" and precision is None:
        dtypes.add("bfloat16")
    return max(dtypes, key=TOLERANCES.__getitem__)
