"""Control flow: a body that receives an adapted kernel is rebuilt with the kernel and its factors as one argument.

So a stacked kernel is scanned together with its A and B, and remat and its policy treat them as any other array.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jlora.transform import jaxprs
from jlora.transform.jaxprs import Body
from jlora.transform.kernel import AdaptedKernel
from jlora.transform.registry import Call, register_rule


@register_rule("jit")
@register_rule("pjit")
def jit(call: Call, *operands: Any) -> list[Any]:
    """The body is evaluated by the rules and jitted again under its own name."""
    inner, evaluation = jaxprs.jit(call.equation), call.inside()

    def run(*values: Any) -> list[Any]:
        placed = [_place(v, sharding) for v, sharding in zip(values, inner.in_shardings, strict=True)]
        outs = evaluation.run(inner.body, placed)
        return [_place(out, sharding) for out, sharding in zip(outs, inner.out_shardings, strict=True)]

    run.__name__ = inner.name
    return jax.jit(run)(*operands)


def _place(value: Any, sharding: Any) -> Any:
    if not isinstance(sharding, jax.sharding.Sharding):
        return value
    if isinstance(value, AdaptedKernel):
        return replace(value, kernel=jax.lax.with_sharding_constraint(value.kernel, sharding))
    return jax.lax.with_sharding_constraint(value, sharding)


@register_rule("closed_call")
def closed_call(call: Call, *operands: Any) -> list[Any]:
    """The body is evaluated by the rules."""
    return call.inside().run(jaxprs.closed_call(call.equation), operands)


@register_rule(jaxprs.REMAT)
def remat(call: Call, *operands: Any) -> list[Any]:
    """The body is evaluated by the rules under the same policy."""
    inner, evaluation = jaxprs.remat(call.equation), call.inside()
    run = lambda *values: evaluation.run(inner.body, values)
    return jax.checkpoint(run, policy=inner.policy, prevent_cse=inner.prevent_cse)(*operands)


@register_rule("cond")
def cond(call: Call, index: Any, *operands: Any) -> list[Any]:
    """Every branch is evaluated by the rules; a kernel that a branch returns is refused."""
    evaluation = call.inside()
    runs = [
        lambda *values, body=body: call.arrays(evaluation.run(body, values)) for body in jaxprs.branches(call.equation)
    ]
    return jax.lax.switch(index, runs, *operands)


@register_rule("while")
def while_loop(call: Call, *operands: Any) -> list[Any]:
    """Kernels may be read by the condition and the body; one that the body changes is refused."""
    loop = jaxprs.while_(call.equation)
    evaluation = call.inside()
    evaluation = evaluation.fold(evaluation.recorder.next_use())
    checks, steps = loop.condition_consts, loop.condition_consts + loop.body_consts
    for_check, for_step, init = operands[:checks], operands[checks:steps], operands[steps:]
    carry = _Carry(call, loop.body, loop.body_consts, init)

    def check(state: tuple[Any, list[Any]]) -> Any:
        return evaluation.run(loop.condition, [*for_check, *carry.whole(state[1])])[0]

    def step(state: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
        turn, moving = state
        outs = evaluation.fold(turn).run(loop.body, [*for_step, *carry.whole(moving)])
        return turn + 1, carry.moving(outs)

    _, last = jax.lax.while_loop(check, step, (jnp.zeros((), jnp.uint32), carry.moving(init)))
    return carry.whole(last)


@register_rule("scan")
def scan(call: Call, *operands: Any) -> list[Any]:
    """A stacked kernel is scanned together with its factors; a factor that all layers share stays outside."""
    loop = jaxprs.scan(call.equation)
    evaluation = call.inside()
    evaluation = evaluation.fold(evaluation.recorder.next_use())
    first, second = loop.num_consts, loop.num_consts + loop.num_carry
    consts, init, stacked = operands[:first], operands[first:second], operands[second:]
    carry = _Carry(call, loop.body, loop.num_consts, init)
    slices = [x.split_stack() if isinstance(x, AdaptedKernel) else x for x in stacked]
    turns = None if evaluation.key is None else jnp.arange(loop.length)

    def step(moving: list[Any], sliced: tuple[Any, list[Any]]) -> tuple[list[Any], list[Any]]:
        turn, xs = sliced
        xs = [whole.layer(x) if isinstance(whole, AdaptedKernel) else x for whole, x in zip(stacked, xs, strict=True)]
        inner = evaluation if turn is None else evaluation.fold(turn)
        outs = inner.run(loop.body, [*consts, *carry.whole(moving), *xs])
        return carry.moving(outs[: loop.num_carry]), call.arrays(outs[loop.num_carry :])

    last, ys = jax.lax.scan(
        step, carry.moving(init), (turns, slices), loop.length, reverse=loop.reverse, unroll=loop.unroll
    )
    return [*carry.whole(last), *ys]


class _Carry:
    """A loop's carry. A kernel that every turn returns unchanged stays outside; any other use of one is refused."""

    def __init__(self, call: Call, body: Body, consts: int, init: Sequence[Any]) -> None:
        inputs = body.jaxpr.invars[consts:]
        same = [out is var for out, var in zip(body.jaxpr.outvars, inputs, strict=False)]
        self.call = call
        self.fixed = {n: v for n, v in enumerate(init) if isinstance(v, AdaptedKernel) and same[n]}

    def moving(self, values: Sequence[Any]) -> list[Any]:
        return self.call.arrays([value for n, value in enumerate(values) if n not in self.fixed])

    def whole(self, moving: Sequence[Any]) -> list[Any]:
        rest = iter(moving)
        return [self.fixed[n] if n in self.fixed else next(rest) for n in range(len(moving) + len(self.fixed))]
