"""Trees of every kind of container that JAX knows: read by slash path, split and joined, or refused by name."""

import textwrap
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, struct

import jlora
from jlora.tree.paths import AS_DICT, flatten, map_with_path

KERNEL = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.float32)
X = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4)), jnp.float32)


@struct.dataclass
class FlaxLinear:
    weight: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclass
class JaxLinear:
    weight: Any
    bias: Any


@jax.tree_util.register_pytree_node_class
class NodeLinear:
    """A class of the old registry, whose children have positions only."""

    def __init__(self, weight: Any, bias: Any) -> None:
        self.weight, self.bias = weight, bias

    def tree_flatten(self) -> Any:
        return (self.weight, self.bias), None

    @classmethod
    def tree_unflatten(cls, _: Any, children: Any) -> "NodeLinear":
        return cls(*children)


class TupleLinear(NamedTuple):
    weight: Any
    bias: Any


KINDS = (FlaxLinear, JaxLinear, NodeLinear, TupleLinear)
every_kind = pytest.mark.parametrize("kind", KINDS)


def network(kind: Any) -> dict[str, Any]:
    """A dict that holds a kernel, and an object of `kind`."""
    return {"dense": {"kernel": KERNEL}, "out": kind(KERNEL + 1, jnp.ones(4))}


def apply(params: Any, x: Any) -> Any:
    out = params["out"]
    return jnp.tanh(x @ params["dense"]["kernel"]) @ out.weight + out.bias


def trained(params: Any, seed: int = 0) -> Any:
    """The tree with a random B, as after some training."""
    rng = np.random.default_rng(seed)
    draw = lambda path, leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) if path.endswith("_b") else leaf
    return map_with_path(draw, params)


def same(left: Any, right: Any) -> bool:
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return jax.tree.structure(left) == jax.tree.structure(right) and all(x is y for x, y in pairs)


@every_kind
def test_objects_of_registered_classes_are_walked_by_every_function(kind: Any, tmp_path: Any) -> None:
    base = network(kind)
    params = trained(jlora.wrap(base, 2))
    weight, bias = list(flatten(params))[-2:]
    assert weight in ("out/weight", "out/0") and bias in ("out/bias", "out/1")
    assert jlora.infer_layout(apply, base, X) == {"dense/kernel": "io", weight: "io"}
    summary = jlora.summary(params, train=[weight])
    assert (summary.total, summary.trainable) == (36, 16 + 16)
    adapters, rest = jlora.split(params, train=[weight])
    assert len(jax.tree.leaves(adapters)) == 3 and len(jax.tree.leaves(rest)) == 3
    assert same(jlora.join(adapters, rest), params)
    assert same(jlora.attach(jlora.extract(params), jlora.unwrap(params)), params)
    mask = jlora.mask(params, train=[bias])
    assert jax.tree.structure(mask) == jax.tree.structure(params) and sum(jax.tree.leaves(mask)) == 3
    assert list(jlora.spectrum(params)) == ["dense/kernel"]
    assert type(jlora.merge(params)["out"]) is kind
    a, b = (np.asarray(params["dense"][f"kernel_lora_{n}"], np.float64) for n in "ab")
    hidden = np.tanh(np.asarray(X, np.float64) @ (np.asarray(KERNEL, np.float64) + a @ b))
    expected = hidden @ np.asarray(KERNEL + 1, np.float64) + 1
    np.testing.assert_allclose(jlora.adapt(apply)(params, X), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(apply(jlora.merge(params), X), expected, rtol=1e-5, atol=1e-5)
    jlora.save_adapter(tmp_path, params, train=[weight])
    restored = jlora.restore_adapter(tmp_path, network(kind))
    for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, other)


@every_kind
def test_a_kernel_in_an_object_is_refused_by_name_and_the_fix_in_the_error_works(kind: Any) -> None:
    tree = network(kind)["out"]
    with pytest.raises(ValueError, match=r"wrap: 1 kernel is directly in (.|\n)*in a " + kind.__name__) as caught:
        jlora.wrap(tree, 2, targets=".*(weight|0)")
    assert AS_DICT in str(caught.value)
    names: dict[str, Any] = {"jax": jax, "tree": tree, "fn": lambda tree, x: x @ tree.weight + tree.bias}
    exec(textwrap.dedent(AS_DICT.partition("\n")[2]), names)
    fn, params = names["fn_of_dict"], names["params"]
    params = trained(jlora.wrap(params, 2, layout=jlora.infer_layout(fn, params, X)))
    outputs, expected = jlora.adapt(fn)(params, X), fn(jlora.merge(params), X)
    assert not np.allclose(outputs, names["fn"](tree, X))
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_of_a_dict_is_not_attached_to_an_object_of_the_same_paths() -> None:
    params = jlora.wrap({"out": {"weight": KERNEL, "bias": jnp.ones(4)}}, 2, targets=["weight"])
    with pytest.raises(ValueError, match="FlaxLinear can't take 3 new leaves") as caught:
        jlora.attach(jlora.extract(params), {"out": FlaxLinear(KERNEL, jnp.ones(4))})
    assert "\nFix: " in str(caught.value)


def test_a_box_whose_array_is_on_the_other_side_is_joined_again() -> None:
    params = {"dense": {"kernel": KERNEL}, "all": [FlaxLinear(FlaxLinear(KERNEL, None), None)]}
    wrapped = jlora.wrap(params, 2)
    assert same(jlora.join(*jlora.split(wrapped, train=["all"])), wrapped)


SUFFIXES = ("_lora_a", "_lora_b", "_lora_scaling")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_module_with_the_name_of_an_adapters_leaf_is_a_module(suffix: str) -> None:
    name = f"gate{suffix}"
    base = {"dense": {"kernel": KERNEL}, name: {"kernel": KERNEL - 1, "bias": jnp.ones(4)}}
    apply = lambda params, x: x @ params["dense"]["kernel"] @ params[name]["kernel"] + params[name]["bias"]
    for targets in (["dense"], None):
        params = trained(jlora.wrap(base, 2, targets=targets))
        assert same(jlora.unwrap(params), base)
        assert jax.tree.structure(jlora.merge(params)) == jax.tree.structure(base)
        assert same(jlora.join(*jlora.split(params)), params)
        merged = jlora.merge(params)
        np.testing.assert_allclose(jlora.adapt(apply)(params, X), apply(merged, X), rtol=2e-5, atol=2e-5)
        assert len(jlora.summary(params).rows) == (1 if targets else 2)
    assert jlora.infer_layout(apply, base, X) == {"dense/kernel": "io", f"{name}/kernel": "io"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_array_with_the_name_of_an_adapters_leaf_is_refused(suffix: str) -> None:
    base = {"dense": {"kernel": KERNEL, f"gate{suffix}": KERNEL}}
    for call in (jlora.wrap, lambda base: jlora.infer_layout(lambda params: 0, base)):
        with pytest.raises(
            ValueError, match=f"1 array of the base is named like the leaves(.|\n)*'dense/gate{suffix}'\nFix: "
        ):
            call(base)


def test_a_module_with_the_name_of_a_new_adapter_leaf_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 name for an adapter leaf is already in use.\n  'dense/kernel'  beside"):
        jlora.wrap({"dense": {"kernel": KERNEL, "kernel_lora_b": {"kernel": KERNEL}}}, 2, targets=["dense"])


REPEATED = {
    "slash in a key": ({"a/b": {"kernel": KERNEL}, "a": {"b": {"kernel": KERNEL}}}, "a/b/kernel"),
    "number and text": (OrderedDict({0: {"kernel": KERNEL}, "0": {"kernel": KERNEL}}), "0/kernel"),
    "empty key": ({"": {"kernel": KERNEL}, "kernel": KERNEL}, "kernel"),
}
WRAPPED = jlora.wrap({"dense": {"kernel": KERNEL}}, 2)


@pytest.mark.parametrize("tree, path", REPEATED.values(), ids=REPEATED)
def test_two_arrays_of_one_path_are_refused_by_every_function_that_reads_a_tree(
    tree: Any, path: str, tmp_path: Any
) -> None:
    wrapped = WRAPPED | dict(tree)
    calls = {
        "wrap": lambda: jlora.wrap(tree, 2),
        "attach": lambda: jlora.attach(jlora.extract(WRAPPED), tree),
        "infer_layout": lambda: jlora.infer_layout(lambda params: 0, tree),
        "save_adapter": lambda: jlora.save_adapter(tmp_path / "new", wrapped),
        "restore_adapter": lambda: jlora.restore_adapter(tmp_path, tree),
    } | {
        name: lambda name=name: getattr(jlora, name)(wrapped)
        for name in ("merge", "unwrap", "split", "extract", "mask", "summary", "spectrum")
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"^{name}: 1 slash path of the tree has several arrays") as caught:
            call()
        assert f"\n  {path!r}  2 arrays\nFix: " in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_a_key_with_a_slash_is_fine_alone() -> None:
    base = {"a/b": {"kernel": KERNEL}}
    params = trained(jlora.wrap(base, 2))
    apply = lambda params, x: x @ params["a/b"]["kernel"]
    np.testing.assert_allclose(jlora.adapt(apply)(params, X), apply(jlora.merge(params), X), rtol=2e-5, atol=2e-5)


def test_a_kernel_under_a_number_is_refused_where_jax_could_not_sort_the_keys() -> None:
    class Net(nnx.Module):
        def __init__(self) -> None:
            self.layers = nnx.List([nnx.Param(KERNEL)])

    for tree in ({0: KERNEL}, nnx.split(Net())[1]):
        with pytest.raises(
            ValueError, match=r"1 kernel is under a key that is not a string.\n  '.*0'  under the key 0"
        ):
            jlora.wrap(tree, 2, targets=".*0")
    ordered = jlora.wrap(OrderedDict({0: KERNEL}), 2, targets="0")
    assert len(jax.tree.leaves(ordered)) == 4


OTHERS = {"None": None, "int": 3, "function": len, "empty dict": {}}
ONE_TREE = ("wrap", "merge", "unwrap", "split", "extract", "mask", "summary", "spectrum", "gradient_norms")


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_an_argument_that_is_not_a_tree_of_arrays_is_one_error_in_every_function(other: Any, tmp_path: Any) -> None:
    calls = {name: lambda name=name: getattr(jlora, name)(other) for name in ONE_TREE} | {
        "attach": lambda: jlora.attach(other, {"dense": {"kernel": KERNEL}}),
        "infer_layout": lambda: jlora.infer_layout(lambda params: 0, other),
        "resize": lambda: jlora.resize(other, rank=2),
        "allocate": lambda: jlora.allocate({}, other, budget=2),
        "save_adapter": lambda: jlora.save_adapter(tmp_path / "new", other),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError if other == {} else TypeError, match=f"^{name}: .*\n(.|\n)*Fix: "):
            call()
    with pytest.raises(ValueError if other == {} else TypeError, match=r"^attach: "):
        jlora.attach(jlora.extract(WRAPPED), other)
    if other != {}:
        for halves in ((other, WRAPPED), (WRAPPED, other)):
            with pytest.raises(TypeError, match=r"^join: (adapters|base) is not a tree of arrays"):
                jlora.join(*halves)
    assert not (tmp_path / "new").exists()


ARGUMENTS = {
    "adapt fn": (lambda: jlora.adapt(3), "adapt: fn is of type int, not a function"),
    "adapt dropout": (lambda: jlora.adapt(apply, dropout="x"), "adapt: dropout is 'x'"),
    "infer_layout fn": (lambda: jlora.infer_layout({}, WRAPPED), "infer_layout: fn is of type dict, not a function"),
    "wrap alpha": (lambda: jlora.wrap({"kernel": KERNEL}, 2, alpha="x"), "wrap: alpha must be a number"),
    "wrap layout": (lambda: jlora.wrap({"kernel": KERNEL}, 2, layout="io"), "wrap: layout is of type str, not a dict"),
    "wrap init": (lambda: jlora.wrap({"kernel": KERNEL}, 2, init="zeros"), "wrap: init is of type str, not a function"),
    "split train": (lambda: jlora.split(WRAPPED, train=3), "split: train is 3"),
    "allocate importance": (
        lambda: jlora.allocate(None, WRAPPED, budget=1),
        "allocate: importance is of type NoneType",
    ),
}


@pytest.mark.parametrize("call, words", ARGUMENTS.values(), ids=ARGUMENTS)
def test_an_argument_of_the_wrong_kind_is_one_error(call: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words) as caught:
        call()
    assert "\nFix: " in str(caught.value)
