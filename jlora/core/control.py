"""Evaluating a jaxpr whose kernels may be adapted, through jit, remat, scan, while and cond.

A body that receives an adapted kernel is rebuilt with the kernel and its pair as one pytree argument, so a stacked
kernel is scanned together with its A and B, and remat and its policy see them as it sees any other array.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jlora.core import versions
from jlora.core.rules import RULES, Adapted, Context, Rule, otherwise, refuse
from jlora.core.versions import Body, Equation


def evaluate(context: Context, body: Body, values: Sequence[Any]) -> list[Any]:
    """Runs a jaxpr on arrays and adapted kernels; equations that no kernel enters are run as they stand."""
    env = dict(zip(body.jaxpr.constvars, body.consts, strict=True))
    env.update(zip(body.jaxpr.invars, values, strict=True))
    look = lambda var: var.val if versions.is_literal(var) else env[var]
    for equation in body.jaxpr.eqns:
        inputs = [look(var) for var in equation.invars]
        if any(isinstance(value, Adapted) for value in inputs):
            name = equation.primitive.name
            if name in CONTROL:
                inner = replace(context, where=versions.source(equation) or context.where)
                outputs = CONTROL[name](inner, equation, inputs)
            else:
                outputs = RULES.get(name, otherwise)(context, equation, inputs)
        else:
            outputs = versions.run(equation, inputs)
        env.update(zip(equation.outvars, outputs, strict=True))
    return [look(var) for var in body.jaxpr.outvars]


def _arrays(context: Context, equation: Equation, values: Sequence[Any]) -> list[Any]:
    """Outputs of a loop or a branch, which cannot be adapted kernels."""
    return [refuse(context, equation, value) for value in values]


def _jit(context: Context, equation: Equation, values: list[Any]) -> list[Any]:
    inner = versions.jit(equation)

    def run(*values: Any) -> list[Any]:
        placed = [_place(v, sharding) for v, sharding in zip(values, inner.in_shardings, strict=True)]
        outs = evaluate(context, inner.body, placed)
        return [_place(out, sharding) for out, sharding in zip(outs, inner.out_shardings, strict=True)]

    run.__name__ = inner.name
    return jax.jit(run)(*values)


def _place(value: Any, sharding: Any) -> Any:
    if not isinstance(sharding, jax.sharding.Sharding):
        return value
    if isinstance(value, Adapted):
        return replace(value, kernel=jax.lax.with_sharding_constraint(value.kernel, sharding))
    return jax.lax.with_sharding_constraint(value, sharding)


def _closed_call(context: Context, equation: Equation, values: list[Any]) -> list[Any]:
    return evaluate(context, versions.closed_call(equation), values)


def _remat(context: Context, equation: Equation, values: list[Any]) -> list[Any]:
    inner = versions.remat(equation)
    run = lambda *values: evaluate(context, inner.body, values)
    return jax.checkpoint(run, policy=inner.policy, prevent_cse=inner.prevent_cse)(*values)


def _cond(context: Context, equation: Equation, values: list[Any]) -> list[Any]:
    index, *operands = values
    runs = [
        lambda *operands, body=body: _arrays(context, equation, evaluate(context, body, operands))
        for body in versions.branches(equation)
    ]
    return jax.lax.switch(index, runs, *operands)


def _while(context: Context, equation: Equation, values: list[Any]) -> list[Any]:
    loop = versions.while_(equation)
    context = context.fold(next(context.uses))
    checks, steps = loop.condition_consts, loop.condition_consts + loop.body_consts
    for_check, for_step, init = values[:checks], values[checks:steps], values[steps:]
    carry = Carry(context, equation, loop.body, loop.body_consts, init)

    def check(state: tuple[Any, list[Any]]) -> Any:
        return evaluate(context, loop.condition, [*for_check, *carry.whole(state[1])])[0]

    def step(state: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
        turn, moving = state
        outs = evaluate(context.fold(turn), loop.body, [*for_step, *carry.whole(moving)])
        return turn + 1, carry.moving(outs)

    _, last = jax.lax.while_loop(check, step, (jnp.zeros((), jnp.uint32), carry.moving(init)))
    return carry.whole(last)


def _scan(context: Context, equation: Equation, values: list[Any]) -> list[Any]:
    loop = versions.scan(equation)
    context = context.fold(next(context.uses))
    first, second = loop.num_consts, loop.num_consts + loop.num_carry
    consts, init, stacked = values[:first], values[first:second], values[second:]
    carry = Carry(context, equation, loop.body, loop.num_consts, init)
    sliced = [_moving_part(x) if isinstance(x, Adapted) else x for x in stacked]
    turns = None if context.key is None else jnp.arange(loop.length)

    def step(moving: list[Any], slices: tuple[Any, list[Any]]) -> tuple[list[Any], list[Any]]:
        turn, xs = slices
        xs = [_layer(whole, x) if isinstance(whole, Adapted) else x for whole, x in zip(stacked, xs, strict=True)]
        inner = context if turn is None else context.fold(turn)
        outs = evaluate(inner, loop.body, [*consts, *carry.whole(moving), *xs])
        return carry.moving(outs[: loop.num_carry]), _arrays(context, equation, outs[loop.num_carry :])

    last, ys = jax.lax.scan(
        step, carry.moving(init), (turns, sliced), loop.length, reverse=loop.reverse, unroll=loop.unroll
    )
    return [*carry.whole(last), *ys]


def _moving_part(w: Adapted) -> tuple[Any, Any]:
    """What of a stacked kernel is scanned: a factor shared by all layers stays outside."""
    stacked = lambda factor: factor if len(factor) == len(w.kernel) else None
    return w.kernel, w.pair and (stacked(w.pair[0]), stacked(w.pair[1]))


def _layer(whole: Adapted, part: tuple[Any, Any]) -> Adapted:
    kernel, factors = part
    layer = lambda n: whole.pair[n][0] if factors[n] is None else factors[n]  # type: ignore[index]
    return replace(whole, kernel=kernel, pair=factors and (layer(0), layer(1)), labels=whole.labels[1:])


class Carry:
    """A loop's carry. A kernel that every turn hands on unchanged is held outside; any other use of one is refused."""

    def __init__(self, context: Context, equation: Equation, body: Body, consts: int, init: Sequence[Any]) -> None:
        inputs = body.jaxpr.invars[consts:]
        same = [out is var for out, var in zip(body.jaxpr.outvars, inputs, strict=False)]
        self.fixed = {n: v for n, v in enumerate(init) if isinstance(v, Adapted) and same[n]}
        self.arrays: Callable[[Sequence[Any]], list[Any]] = lambda values: _arrays(context, equation, values)

    def moving(self, values: Sequence[Any]) -> list[Any]:
        return self.arrays([value for n, value in enumerate(values) if n not in self.fixed])

    def whole(self, moving: Sequence[Any]) -> list[Any]:
        rest = iter(moving)
        return [self.fixed[n] if n in self.fixed else next(rest) for n in range(len(moving) + len(self.fixed))]


CONTROL: dict[str, Rule] = {
    "jit": _jit,
    "pjit": _jit,
    "closed_call": _closed_call,
    versions.REMAT: _remat,
    "cond": _cond,
    "while": _while,
    "scan": _scan,
}
