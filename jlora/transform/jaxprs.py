"""Access to jaxprs: all that differs between JAX 0.10, 0.11 and 0.12, and all reading of a primitive's parameters.

From 0.11 on Jaxpr and ClosedJaxpr are one class, and scan describes its consts and carry by `ft_in` instead of by
`num_consts` and `num_carry`.
"""

import os
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jax.extend.core import primitives

Equation = Any
Value = Any

# Libraries between a user's line and an equation, wherever they are installed.
LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "optax", "haiku", "equinox", "keras", "torchax")

REMAT = primitives.remat_p.name


class FunctionSource(NamedTuple):
    """The place where a function is defined, which identifies it in a jaxpr.

    Attributes:
        file: path of the source file.
        line: of its first line, decorators included.
    """

    file: str
    line: int


class Body(NamedTuple):
    """A jaxpr with its constants."""

    jaxpr: Any
    consts: Sequence[Value]


class Jit(NamedTuple):
    name: str
    body: Body
    in_shardings: Sequence[Any]
    out_shardings: Sequence[Any]


class Remat(NamedTuple):
    body: Body
    policy: Callable[..., bool] | None
    prevent_cse: Any


class Scan(NamedTuple):
    body: Body
    num_consts: int
    num_carry: int
    length: int
    reverse: bool
    unroll: int


class While(NamedTuple):
    condition: Body
    condition_consts: int
    body: Body
    body_consts: int


class Dot(NamedTuple):
    contract: tuple[Sequence[int], Sequence[int]]
    batch: tuple[Sequence[int], Sequence[int]]
    precision: Any


class Conv(NamedTuple):
    options: dict[str, Any]
    lhs_spec: Sequence[int]
    rhs_spec: Sequence[int]
    out_spec: Sequence[int]
    groups: int
    batch_groups: int


class Gather(NamedTuple):
    dimensions: Any
    slice_sizes: Sequence[int]
    options: dict[str, Any]


class Ragged(NamedTuple):
    contract: tuple[Sequence[int], Sequence[int]]
    plain: bool
    group_axis: int
    precision: Any


def body(jaxpr: Any) -> Body:
    """A jaxpr, closed or open, with its constants."""
    return Body(getattr(jaxpr, "jaxpr", jaxpr), tuple(getattr(jaxpr, "consts", ())))


def run(equation: Equation, values: Sequence[Value]) -> list[Value]:
    """Evaluates one equation as it stands, rules of custom_jvp and custom_vjp included.

    A jaxpr of this one equation does it, since how a primitive's parameters become arguments of its bind differs.
    """
    inputs: dict[Any, Value] = {}
    for var, value in zip(equation.invars, values, strict=True):
        if not isinstance(var, core.Literal):
            inputs[var] = value
    used = [var for var in equation.outvars if not isinstance(var, core.DropVar)]
    single = core.Jaxpr((), tuple(inputs), tuple(used), [equation], equation.effects, _debug(len(inputs), len(used)))
    outs = iter(core.jaxpr_as_fun(core.ClosedJaxpr(single, ()))(*inputs.values()))
    return [None if isinstance(var, core.DropVar) else next(outs) for var in equation.outvars]


def _debug(inputs: int, outputs: int) -> core.DebugInfo:
    return core.DebugInfo("jlora", "equation", ("",) * inputs, ("",) * outputs)


def is_primitive(value: Any) -> bool:
    return isinstance(value, core.Primitive)


def custom_function(equation: Equation) -> FunctionSource | None:
    """Where the function of a custom_jvp or custom_vjp call is defined; None for any other equation."""
    if equation.primitive.name not in ("custom_jvp_call", "custom_vjp_call"):
        return None
    info = closed_call(equation).jaxpr.debug_info
    return FunctionSource(info.func_filename, info.func_lineno)


def is_literal(var: Any) -> bool:
    return isinstance(var, core.Literal)


def as_function(closed: Any) -> Callable[..., list[Value]]:
    """The function that evaluates a closed jaxpr."""
    return core.jaxpr_as_fun(closed)


def under_named_axis() -> bool:
    """Whether a vmap or shard_map with a named axis is being traced, whose size a trace may have read."""
    return core.nonempty_axis_env_DO_NOT_USE()


def jit(equation: Equation) -> Jit:
    p = equation.params
    return Jit(p["name"], body(p["jaxpr"]), p["in_shardings"], p["out_shardings"])


def closed_call(equation: Equation) -> Body:
    return body(equation.params["call_jaxpr"])


def remat(equation: Equation) -> Remat:
    p = equation.params
    return Remat(body(p["jaxpr"]), p["policy"], p["prevent_cse"])


def scan(equation: Equation) -> Scan:
    p = equation.params
    if "ft_in" in p:
        consts, carry, _ = (len(part) for part in p["ft_in"].unpack())
    else:
        consts, carry = p["num_consts"], p["num_carry"]
    return Scan(body(p["jaxpr"]), consts, carry, p["length"], p["reverse"], p["unroll"])


def while_(equation: Equation) -> While:
    p = equation.params
    return While(body(p["cond_jaxpr"]), p["cond_nconsts"], body(p["body_jaxpr"]), p["body_nconsts"])


def branches(equation: Equation) -> list[Body]:
    return [body(branch) for branch in equation.params["branches"]]


def dot(equation: Equation) -> Dot:
    contract, batch = equation.params["dimension_numbers"]
    return Dot(contract, batch, equation.params["precision"])


def conv(equation: Equation) -> Conv:
    p = equation.params
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers", "precision")
    spec = p["dimension_numbers"]
    options = {name: p[name] for name in names}
    return Conv(options, spec.lhs_spec, spec.rhs_spec, spec.out_spec, p["feature_group_count"], p["batch_group_count"])


def gather(equation: Equation) -> Gather:
    p = equation.params
    options = {name: p[name] for name in ("unique_indices", "indices_are_sorted", "mode", "fill_value")}
    return Gather(p["dimension_numbers"], p["slice_sizes"], options)


def ragged_dot(equation: Equation) -> Ragged:
    p = equation.params
    numbers = p["ragged_dot_dimension_numbers"]
    contract, (batch, _) = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions)
    ranks = tuple(var.aval.ndim for var in equation.invars[:2])
    plain = ranks == (2, 3) and not batch and len(groups) == 1 and tuple(numbers.lhs_ragged_dimensions) == (0,)
    return Ragged(contract, plain and p["group_offset"] is None, groups[0] if groups else -1, p["precision"])


def permutation(equation: Equation) -> Sequence[int]:
    return equation.params["permutation"]


def broadcast_dimensions(equation: Equation) -> Sequence[int]:
    return equation.params["broadcast_dimensions"]


def dimensions(equation: Equation) -> Sequence[int] | None:
    return equation.params["dimensions"]


def slice_bounds(equation: Equation) -> tuple[Sequence[int], Sequence[int], Sequence[int] | None]:
    p = equation.params
    return p["start_indices"], p["limit_indices"], p["strides"]


def slice_sizes(equation: Equation) -> Sequence[int]:
    return equation.params["slice_sizes"]


def split_axis(equation: Equation) -> tuple[Sequence[int], int]:
    return equation.params["sizes"], equation.params["axis"]


def source(equation: Equation) -> str:
    """File and line of the user's code that an equation came from, as "model.py:12 (__call__)"; "" if unknown."""
    trace = equation.source_info.traceback
    inside = ("<", *(folder + os.sep for folder in _library_folders()))
    frames = (frame for frame in (trace.frames if trace else ()) if not frame.file_name.startswith(inside))
    return next((f"{frame.file_name}:{frame.line_num} ({frame.function_name})" for frame in frames), "")


def _library_folders() -> set[str]:
    """Folders of code that is not the user's: installed packages, and libraries that lie elsewhere."""
    paths = sysconfig.get_paths()
    found = {paths[name] for name in ("purelib", "platlib", "stdlib")} | {str(Path(__file__).parents[1])}
    # An editable install, a source tree on PYTHONPATH or a `pip install --target` folder.
    files = (getattr(sys.modules.get(library), "__file__", None) for library in LIBRARIES)
    return found | {str(Path(file).parent) for file in files if file}


def unread(fn: Callable[..., Any], *args: Any) -> set[int]:
    """Which inputs of a function no output of it depends on.

    Args:
        fn: any function of pytrees of arrays.
        *args: its arguments, concrete or abstract.

    Returns:
        Indices in the order of `jax.tree.leaves(args)`.
    """
    closed = body(jax.make_jaxpr(fn)(*args))
    needed = _needed(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return {index for index, var in enumerate(closed.jaxpr.invars) if var not in needed}


def _needed(jaxpr: Any, wanted: Sequence[bool]) -> set[Any]:
    needed = {var for var, want in zip(jaxpr.outvars, wanted, strict=True) if want and not is_literal(var)}
    for equation in reversed(jaxpr.eqns):
        wants = [var in needed for var in equation.outvars]
        if any(wants) or equation.effects:
            reads = _reads(equation, wants)
            needed |= {v for v, read in zip(equation.invars, reads, strict=True) if read and not is_literal(v)}
    return needed


def _reads(equation: Equation, wants: Sequence[bool]) -> list[bool]:
    """For each input of an equation, whether the required outputs depend on it; True if that can't be determined."""
    name = equation.primitive.name
    if name == "cond":
        each = [_reads_of(branch, wants) for branch in branches(equation)]
        return [True, *(any(column) for column in zip(*each, strict=True))]
    if name in ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", REMAT):
        return _reads_of(body(equation.params.get("jaxpr") or equation.params["call_jaxpr"]), wants)
    if name == "scan":
        # A carry may feed any later step, so every one is wanted; consts and slices are read or not by the body.
        return _reads_of(scan(equation).body, [True] * len(wants))
    if name == "while":
        loop = while_(equation)
        everything = [True] * len(wants)
        checks, steps = _reads_of(loop.condition, [True]), _reads_of(loop.body, everything)
        return [*checks[: loop.condition_consts], *steps[: loop.body_consts], *everything]
    return [True] * len(equation.invars)


def _reads_of(inner: Body, wants: Sequence[bool]) -> list[bool]:
    needed = _needed(inner.jaxpr, wants)
    return [var in needed for var in inner.jaxpr.invars]
