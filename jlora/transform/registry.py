"""The registry of rules, and the evaluation of a jaxpr by them.

A rule says what one primitive, or one function with a custom derivative, does to an adapted kernel. It is called as
`rule(call, *operands)`, where at least one operand is an `AdaptedKernel`, and returns the outputs. Three things are
all that a rule needs:

- `call(*arrays)` runs the operation as it stands, on plain arrays.
- `kernel.view(...)` transforms the kernel and both factors alike.
- `call.contract(...)` multiplies an operand with the low-rank factors, without forming their product.
"""

import inspect
import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jlora.errors import JloraTypeError
from jlora.transform import jaxprs
from jlora.transform.contraction import contract_factors, parse_einsum
from jlora.transform.jaxprs import Body, Equation
from jlora.transform.kernel import AdaptedKernel, Factor

RuleFn = Callable[..., Any]
F = TypeVar("F", bound=RuleFn)


class NoLowRankForm(Exception):
    """A rule found that this use of a kernel has no low-rank form."""


class PrimitiveRule(NamedTuple):
    """A registered rule.

    Attributes:
        apply: called as `apply(call, *operands)`.
        operands: the operands that may be adapted kernels; None for any.
        summary: the first line of the rule's docstring.
    """

    apply: RuleFn
    operands: tuple[int, ...] | None
    summary: str


RULES: dict[Any, PrimitiveRule] = {}


def register_rule(target: Any, *, operands: int | Sequence[int] | None = None) -> Callable[[F], F]:
    """Registers how an operation acts on an adapted kernel. Use it as a decorator.

    The rule is called as `rule(call, *operands)` with the flat array operands of the operation, at least one of them
    an `AdaptedKernel`, and returns the output, or a sequence of outputs. A rule that finds no low-rank form calls
    `call.refuse()`.

    ::

        @jax.custom_vjp
        def fused_matmul(x, w): ...                       # (batch, in), (in, out) -> (batch, out)

        @jlora.register_rule(fused_matmul, operands=1)
        def fused_matmul_rule(call, x, w):
            return call(x, w.kernel) + call.einsum("bi,io->bo", x, w)

    Args:
        target: a JAX primitive, the name of one, or a function decorated with `jax.custom_vjp` or `jax.custom_jvp`.
            Such a function is identified by the place where it is defined, so functions made by one factory share a
            rule.
        operands: positions of the operands that may be adapted kernels. Any other adapted operand is refused before the
            rule is called. None allows all of them.

    Returns:
        A decorator that returns the rule unchanged. The last registration for a target wins.

    Raises:
        TypeError: `target` is not one of these.
    """
    names = _names_of(target)
    positions = (operands,) if isinstance(operands, int) else None if operands is None else tuple(operands)

    def register(rule: F) -> F:
        summary = (inspect.getdoc(rule) or "").partition("\n")[0]
        for name in names:
            RULES[name] = PrimitiveRule(rule, positions, summary)
        return rule

    return register


def _names_of(target: Any) -> tuple[Any, ...]:
    """The registry's keys for what a user passes as `target`."""
    if isinstance(target, str):
        return (target,)
    if jaxprs.is_primitive(target):
        return (target.name,)
    code = getattr(inspect.unwrap(getattr(target, "fun", lambda: None)), "__code__", None)
    if isinstance(target, jax.custom_vjp | jax.custom_jvp) and code is not None:
        return (jaxprs.FunctionSource(code.co_filename, code.co_firstlineno),)
    problem = f"the target is a {type(target).__name__}."
    fix = "pass a primitive, its name, or a function decorated with jax.custom_vjp or jax.custom_jvp."
    raise JloraTypeError("register_rule", problem, [], fix)


class Recorder:
    """What an evaluation collects: refused uses, and how kernels were contracted.

    Attributes:
        refusals: one line for every use of a kernel that has no low-rank form; the evaluation goes on, to find all.
        reads: path, and one letter for every axis of the kernel in the tree.
    """

    def __init__(self) -> None:
        self.refusals: list[str] = []
        self.reads: list[tuple[str, str]] = []
        self._uses = itertools.count()

    def next_use(self) -> int:
        """Numbers the places that need a random key."""
        return next(self._uses)


@dataclass(frozen=True)
class Evaluation:
    """The settings of one evaluation of a jaxpr.

    Attributes:
        recorder: what is collected.
        dropout: rate for the input of A.
        key: PRNG key of dropout; None for no dropout.
        where: the user's line that the enclosing equation came from.
    """

    recorder: Recorder = field(default_factory=Recorder)
    dropout: float = 0.0
    key: Key[Array, ""] | None = None
    where: str = "an unknown line"

    def fold(self, data: Any) -> "Evaluation":
        return self if self.key is None else replace(self, key=jax.random.fold_in(self.key, data))

    def run(self, body: Body, values: Sequence[Any]) -> list[Any]:
        """Evaluates a jaxpr on arrays and adapted kernels; equations that no kernel enters are run as they stand."""
        env = dict(zip(body.jaxpr.constvars, body.consts, strict=True))
        env.update(zip(body.jaxpr.invars, values, strict=True))
        look = lambda var: var.val if jaxprs.is_literal(var) else env[var]
        for equation in body.jaxpr.eqns:
            operands = [look(var) for var in equation.invars]
            if any(isinstance(operand, AdaptedKernel) for operand in operands):
                outputs = Call(equation, self)._apply(operands)
            else:
                outputs = jaxprs.run(equation, operands)
            env.update(zip(equation.outvars, outputs, strict=True))
        return [look(var) for var in body.jaxpr.outvars]


@dataclass(frozen=True)
class Call:
    """One use of an operation that an adapted kernel enters: what a rule works with.

    Attributes:
        equation: of the jaxpr.
        evaluation: the settings of the enclosing evaluation.
    """

    equation: Equation
    evaluation: Evaluation

    def __call__(self, *arrays: Any) -> Any:
        """Runs the operation as it stands: its output, or a list of them where there are several."""
        outputs = self.outputs(*arrays)
        return outputs[0] if len(outputs) == 1 else outputs

    def outputs(self, *arrays: Any) -> list[Any]:
        """Runs the operation as it stands: a list of its outputs."""
        return jaxprs.run(self.equation, arrays)

    def refuse(self) -> NoReturn:
        """Ends the rule: this use has no low-rank form. It is reported with the kernel and the user's line."""
        raise NoLowRankForm

    def einsum(self, subscripts: str, x: Float[Array, "..."], w: AdaptedKernel, *, precision: Any = None) -> Any:
        """The low-rank term of `jnp.einsum(subscripts, x, w)`, (x A) B, with dropout where it is on.

        Args:
            subscripts: as of `jnp.einsum`, with both operands and the output; an ellipsis may stand in x and the
                output.
            x: the operand beside the kernel.
            w: the adapted kernel.
            precision: of the products.
        """
        labels, out = parse_einsum(subscripts, x.ndim, w.ndim)
        return self.contract(x, w, labels, out, precision=precision)

    def contract(
        self,
        x: Float[Array, "..."],
        w: AdaptedKernel,
        labels: Sequence[int],
        out: Sequence[int],
        *,
        precision: Any = None,
        dtype: Any = None,
    ) -> Any:
        """Multiplies x with one factor and the result with the other; the product of the factors is never formed.

        Source: Hu et al. 2021, arXiv:2106.09685, equation 3, for any labeling of the axes.

        Args:
            x: an array whose axes are labeled 0, 1, ...
            w: the adapted kernel.
            labels: one for every axis of w; an axis shared with x has the label of x's axis.
            out: labels of the result; a label of x that is missing here is contracted.
            precision: of the products.
            dtype: of the result; None for the promoted dtype of x and the kernel.
        """
        dtype = jnp.result_type(x, w.kernel) if dtype is None else dtype
        roles = ["o" if label >= x.ndim else "s" if label in out else "i" for label in labels]
        low_rank = lambda a, b: contract_factors(self.adapter_input(x, w, dtype), (a, b), labels, out, precision, dtype)
        return self.apply_factors(w, roles, low_rank)

    def apply_factors(self, w: AdaptedKernel, roles: Sequence[str], product: Callable[[Factor, Factor], Any]) -> Any:
        """The result of a contraction that `contract` can't express: `product(a, b)` of the aligned factors.

        Args:
            w: the adapted kernel.
            roles: for every axis of w "i" (contracted), "o" (produced), "s" (kept apart) or "v" (rows looked up).
            product: computes the low-rank term; may call `refuse`.
        """
        if w.factors:
            return product(*w.factors)
        self._record(w, roles)
        return 0

    def adapter_input(self, x: Any, w: AdaptedKernel, dtype: Any) -> Float[Array, "..."]:
        """What A reads: x with dropout. Beside integers and float8 the factors keep a dtype that can hold them."""
        floats = [v.dtype for v in (x, w.kernel) if jnp.issubdtype(v.dtype, jnp.floating) and v.dtype.itemsize > 1]
        x = x.astype(jnp.result_type(*floats) if floats else dtype)
        key, rate = self.evaluation.key, self.evaluation.dropout
        if key is None or rate == 0.0:
            return x
        key = jax.random.fold_in(
            jax.random.fold_in(key, zlib.crc32(w.path.encode())), self.evaluation.recorder.next_use()
        )
        kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
        return jnp.where(kept, x / (1.0 - rate), jnp.zeros((), x.dtype))

    def inside(self) -> Evaluation:
        """The settings for the body of this operation."""
        where = jaxprs.source(self.equation) or self.evaluation.where
        return replace(self.evaluation, where=where)

    def arrays(self, values: Sequence[Any]) -> list[Any]:
        """The values with every adapted kernel reported as refused and replaced by the dense one."""
        return [self._densify(value) if isinstance(value, AdaptedKernel) else value for value in values]

    def _apply(self, operands: Sequence[Any]) -> Sequence[Any]:
        rule = self._find_rule(operands)
        try:
            outputs = rule.apply(self, *operands) if rule else self.refuse()
        except NoLowRankForm:
            return self.outputs(*self.arrays(operands))
        return outputs if isinstance(outputs, list | tuple) else [outputs]

    def _find_rule(self, operands: Sequence[Any]) -> PrimitiveRule | None:
        source = jaxprs.custom_function(self.equation)
        rule = RULES.get(source) or RULES.get(self.equation.primitive.name)
        adapted = {n for n, operand in enumerate(operands) if isinstance(operand, AdaptedKernel)}
        return rule if rule and (rule.operands is None or adapted <= {*rule.operands}) else None

    def _densify(self, value: AdaptedKernel) -> Any:
        line = jaxprs.source(self.equation) or self.evaluation.where
        self.evaluation.recorder.refusals.append(f"{value.path!r} in `{self.equation.primitive.name}`  at {line}")
        return value.dense()

    def _record(self, w: AdaptedKernel, roles: Sequence[str]) -> None:
        """Notes how a kernel is contracted, with one letter for every axis it has in the tree."""
        letters: list[set[str]] = [set() for _ in range(w.tree_ndim)]
        for axes, role in zip(w.axes, roles, strict=True):
            for axis in axes:
                letters[axis].add(role)
        # An axis that no view contains any more was scanned or indexed away: the kernel is stacked along it.
        layout = "".join("s" if not found else "?" if len(found) > 1 else found.pop() for found in letters)
        self.evaluation.recorder.reads.append((w.path, layout))
