"""Splits a wrapped tree into trainable and frozen leaves, and takes adapters off their base and puts them back."""

from collections.abc import Callable
from typing import Any

from jlora.errors import JloraTypeError, JloraValueError, count, nearest, quoted
from jlora.tree.layouts import A, B
from jlora.tree.paths import Tree, TreePath, children, flatten, map_with_path, partition, read_arrays, union
from jlora.tree.targets import Pattern, select_paths
from jlora.tree.wrapping import check_names, check_unwrapped, is_adapter_leaf, read_layouts


def split(params: Tree, train: Pattern = ()) -> tuple[Tree, Tree]:
    """Splits a wrapped tree into the trainable leaves and all others, so that only the first are differentiated.

    ::

        adapters {"dense": {"kernel_lora_a": ..., "kernel_lora_b": ...}}
        base     {"dense": {"kernel": ..., "kernel_lora_scaling": ..., "bias": ...}}

    Args:
        params: a wrapped tree.
        train: leaves to train in full in addition to the adapters: a regular expression for whole slash paths, or
            names of modules or leaves.

    Returns:
        The trainable leaves and the frozen leaves, each in the containers of `params`.

    Raises:
        ValueError: the tree has no adapter, or a name in `train` matches nothing.

    Examples:
        >>> params = jlora.wrap({"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)}, rank=2)
        >>> adapters, base = jlora.split(params)
        >>> sorted(adapters), sorted(base)
        (['kernel_lora_a', 'kernel_lora_b'], ['bias', 'kernel', 'kernel_lora_scaling'])
        >>> adapters, base = jlora.split(params, train=["bias"])
        >>> sorted(adapters)
        ['bias', 'kernel_lora_a', 'kernel_lora_b']
    """
    read_layouts("split", params)
    return partition(params, make_trainable_test("split", params, train))


def join(adapters: Tree, base: Tree) -> Tree:
    """Joins the two trees that `split` returned.

    Raises:
        TypeError: an argument is not a tree.
        ValueError: both trees have the same leaf.

    Examples:
        >>> params = jlora.wrap({"kernel": jnp.ones((4, 4))}, rank=2)
        >>> adapters, base = jlora.split(params)
        >>> jlora.join(adapters, base).keys() == params.keys()
        True
    """
    for name, half in (("adapters", adapters), ("base", base)):
        if children(half) is None:
            raise JloraTypeError("join", f"{name} is not a tree of arrays.", [], "pass jlora.split(params).")
    return union(adapters, base)


def extract(params: Tree) -> Tree:
    """The leaves of all adapters, scalings included, without the base.

    This is the tree that `save_adapter` writes, and that `attach` puts on another copy of the base.

    Raises:
        ValueError: the tree has no adapter.

    Examples:
        >>> params = jlora.wrap({"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)}, rank=2)
        >>> sorted(jlora.extract(params))
        ['kernel_lora_a', 'kernel_lora_b', 'kernel_lora_scaling']
    """
    read_layouts("extract", params)
    return partition(params, lambda path, _: is_adapter_leaf(path))[0]


def attach(adapter: Tree, base_params: Tree) -> Tree:
    """Puts an extracted adapter on a base.

    Raises:
        ValueError: the base already has an adapter, or lacks a kernel of the adapter, or has it in another shape; all
            such kernels are listed.

    Examples:
        >>> base = {"kernel": jnp.ones((4, 4))}
        >>> adapter = jlora.extract(jlora.wrap(base, rank=2))
        >>> sorted(jlora.attach(adapter, base))
        ['kernel', 'kernel_lora_a', 'kernel_lora_b', 'kernel_lora_scaling']
    """
    base = read_arrays("attach", base_params, "base_params")
    check_unwrapped("attach", base)
    check_names("attach", base)
    kernels = {path[: -len(A)] for path in read_arrays("attach", adapter, "adapter") if path.endswith(A)}
    missing = [f"{path!r}  nearest: {quoted(nearest(path, base, 1))}" for path in sorted(kernels - set(base))]
    if missing:
        raise JloraValueError(
            "attach",
            f"the base lacks {count(len(missing), 'kernel')} of the adapter.",
            missing,
            "attach the adapter to the base that it was trained on.",
        )
    params = union(adapter, base_params)
    read_layouts("attach", params)
    return params


def mask(params: Tree, train: Pattern = ()) -> Tree:
    """A tree of bool for optax: True for trainable leaves, that is every A and B and the leaves named in `train`.

    Raises:
        ValueError: the tree has no adapter, or a name in `train` matches nothing.

    Examples:
        >>> jlora.mask(jlora.wrap({"kernel": jnp.ones((4, 4))}, rank=2))
        {'kernel': False, 'kernel_lora_a': True, 'kernel_lora_b': True, 'kernel_lora_scaling': False}
    """
    read_layouts("mask", params)
    return map_with_path(make_trainable_test("mask", params, train), params)


def make_trainable_test(who: str, params: Tree, train: Pattern) -> Callable[[TreePath, Any], bool]:
    """A function of a leaf's path and value: whether the leaf is an A or a B, or named in `train`.

    Raises:
        ValueError: a name in `train` matches nothing.
    """
    paths = [path for path in flatten(params) if not is_adapter_leaf(path)]
    full = select_paths(who, train, paths) if train else set()
    return lambda path, _: path.endswith((A, B)) or path in full
