"""The shared parts of the models against torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.models.layers import ACTIVATIONS

torch = pytest.importorskip("torch", reason="torch is the oracle, and is not installed")
activations = pytest.importorskip("transformers.activations")


NAMES = (
    *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new"),
    *("gelu_python", "gelu_python_tanh", "gelu_pytorch_tanh", "hardswish", "leaky_relu"),
    *("linear", "mish", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu", "swish", "tanh"),
)


@pytest.mark.parametrize("name", sorted({*NAMES, *ACTIVATIONS}))
def test_activations_equal_those_of_transformers(name):
    x = np.linspace(-12, 12, 1001)
    expected = activations.ACT2FN[name](torch.tensor(x)).numpy()
    with jax.enable_x64(True):
        actual = np.asarray(ACTIVATIONS[name](jnp.asarray(x, jnp.float64)))
    assert actual.dtype == np.float64
    # gelu_fast rounds sqrt(2 / pi) to ten digits.
    np.testing.assert_allclose(actual, expected, atol=1e-9, rtol=0)
