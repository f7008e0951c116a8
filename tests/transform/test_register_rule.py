"""`jlora.register_rule`: a user's own operation takes part in the transform."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import mlir

import jlora
from jlora.transform.registry import RULES


@pytest.fixture(autouse=True)
def registered():
    """Rules that a test registers are removed after it."""
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


def make_fused():
    """A matmul with a derivative of its own, which is twice the true one: it must be kept for the frozen kernel."""

    @jax.custom_vjp
    def fused(x, w):
        return x @ w

    fused.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (2 * g @ saved[1].T, 2 * saved[0].T @ g))
    return fused


def tree(seed=0):
    rng = np.random.default_rng(seed)
    params = jlora.wrap({"dense": {"kernel": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)}}, 2)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params)


X = jnp.asarray(np.random.default_rng(1).normal(size=(4, 6)), jnp.float32)


def reference(params, x):
    """X W + s (x A) B in NumPy, float64."""
    names = ("kernel", "kernel_lora_a", "kernel_lora_b", "kernel_lora_scaling")
    w, a, b, s = (np.asarray(params["dense"][name], np.float64) for name in names)
    return np.asarray(x, np.float64) @ w + s * (np.asarray(x, np.float64) @ a) @ b


def test_without_a_rule_a_custom_function_is_refused_by_name():
    fused = make_fused()
    with pytest.raises(ValueError, match="'dense/kernel' in `custom_vjp_call`"):
        jlora.adapt(lambda p, x: fused(x, p["dense"]["kernel"]))(tree(), X)


@pytest.mark.parametrize("around", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "remat"])
def test_a_rule_adapts_a_function_with_a_custom_vjp_and_keeps_its_derivative(around):
    fused = make_fused()

    @jlora.register_rule(fused, operands=1)
    def rule(call, x, w):
        return call(x, w.kernel) + call.einsum("bi,io->bo", x, w)

    fn = jlora.adapt(lambda p, x: around(fused)(x, p["dense"]["kernel"]))
    params = tree()
    np.testing.assert_allclose(fn(params, X), reference(params, X), rtol=1e-4, atol=1e-4)
    grad = jax.grad(lambda x: fn(params, x).sum())(X)
    w, delta = params["dense"]["kernel"], jlora.merge(params)["dense"]["kernel"] - params["dense"]["kernel"]
    expected = jnp.ones((4, 5)) @ (2 * w + delta).T
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-4)


def test_a_rule_serves_layout_inference_too():
    fused = make_fused()

    @jlora.register_rule(fused, operands=1)
    def rule(call, x, w):
        return call(x, w.kernel) + call.einsum("bi,io->bo", x, w)

    fn = lambda p, x: fused(x, p["kernel"].T)
    assert jlora.infer_layout(fn, {"kernel": jnp.zeros((5, 6))}, X) == {"kernel": "oi"}


def test_another_operand_than_those_registered_is_refused():
    fused = make_fused()

    @jlora.register_rule(fused, operands=1)
    def rule(call, x, w):
        pytest.fail("the rule was called")

    with pytest.raises(ValueError, match="no low-rank form"):
        jlora.adapt(lambda p, x: fused(p["dense"]["kernel"].T, x.T))(tree(), X)


def test_a_rule_may_refuse_one_use_and_cover_another():
    fused = make_fused()

    @jlora.register_rule(fused)
    def rule(call, x, w):
        if not isinstance(w, jlora.transform.kernel.AdaptedKernel):
            call.refuse()
        return call(x, w.kernel) + call.einsum("bi,io->bo", x, w)

    params = tree()
    fn = lambda p, x: fused(x, p["dense"]["kernel"]) + fused(p["dense"]["kernel"].T, x.T).T
    with pytest.raises(ValueError, match="1 use of an adapted kernel"):
        jlora.adapt(fn)(params, X)
    found = jlora.adapt(fn, materialize=True)(params, X)
    np.testing.assert_allclose(found, 2 * reference(params, X), rtol=1e-4, atol=1e-4)


def test_a_users_primitive_gets_a_rule_by_itself_or_by_name():
    double_p = jex.Primitive("double_for_test")
    double_p.def_impl(lambda w: w * 2)
    double_p.def_abstract_eval(lambda w: w)
    mlir.register_lowering(double_p, mlir.lower_fun(lambda w: w * 2, multiple_results=False))
    params = tree()
    for target in (double_p, "double_for_test"):
        RULES.pop("double_for_test", None)

        @jlora.register_rule(target)
        def rule(call, w):
            return w.with_factors(call(w.kernel), lambda a, b: (a, 2 * b))

        found = jlora.adapt(lambda p, x: x @ double_p.bind(p["dense"]["kernel"]))(params, X)
        np.testing.assert_allclose(found, 2 * reference(params, X), rtol=1e-4, atol=1e-4)


def test_a_users_rule_for_a_primitive_of_jax_wins_whenever_it_is_registered():
    program = (
        "import jlora\n"
        "@jlora.register_rule('neg')\n"
        "def rule(call, w):\n"
        "    call.refuse()\n"
        "import jax.numpy as jnp\n"
        "params = jlora.wrap({'kernel': jnp.ones((4, 4))}, 2)\n"
        "jlora.adapt(lambda p, x: x @ -p['kernel'])(params, jnp.ones((1, 4)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "'kernel' in `neg`" in done.stderr


def test_dropout_reaches_the_low_rank_term_of_a_rule():
    fused = make_fused()

    @jlora.register_rule(fused, operands=1)
    def rule(call, x, w):
        return call(x, w.kernel) + call.einsum("bi,io->bo", x, w)

    fn = jlora.adapt(lambda p, x: fused(x, p["dense"]["kernel"]), dropout=0.5)
    params = tree()
    dropped = fn(params, X, lora_key=jax.random.key(0))
    assert not np.allclose(dropped, fn(params, X))
    np.testing.assert_allclose(fn(params, X), reference(params, X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", [jnp.sin, 3, None, jax.jit(lambda x: x)], ids=["function", "int", "None", "jitted"])
def test_a_target_of_another_kind_is_an_error(target):
    with pytest.raises(TypeError) as error:
        jlora.register_rule(target)
    assert str(error.value).startswith("register_rule: the target is a ")
    assert "\nFix: pass a primitive, its name, or a function decorated with" in str(error.value)


@pytest.mark.parametrize("subscripts", ["bi,io", "bi->bo", "bio,io->bo", "bi,i->bo"])
def test_subscripts_that_do_not_fit_are_an_error(subscripts):
    fused = make_fused()

    @jlora.register_rule(fused, operands=1)
    def rule(call, x, w):
        return call(x, w.kernel) + call.einsum(subscripts, x, w)

    with pytest.raises(ValueError, match=r"^einsum: "):
        jlora.adapt(lambda p, x: fused(x, p["dense"]["kernel"]))(tree(), X)


def test_the_example_of_the_transforms_readme_runs_and_is_exact():
    text = (Path(jlora.__file__).parent / "transform" / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    # A file of its own, since a function with a custom derivative is identified by where it is defined.
    names: dict = {}
    exec(compile(block, "readme_example.py", "exec"), names)
    params = tree()
    found = jlora.adapt(lambda p, x: names["fused_matmul"](x, p["dense"]["kernel"]))(params, X)
    np.testing.assert_allclose(found, reference(params, X), rtol=1e-4, atol=1e-4)


def test_every_rule_states_its_reason_in_one_line():
    rules = {name: rule for name, rule in RULES.items() if rule.apply.__module__.startswith("jlora.")}
    assert len(rules) > 20 and [name for name, rule in rules.items() if not rule.summary.endswith(".")] == []
