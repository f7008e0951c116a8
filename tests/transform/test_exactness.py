"""`adapt(fn)(wrapped)` is `fn(merge(wrapped))`, with all gradients, and the merged kernel is never formed on the way.

Everything here is float64, so a difference is a fault and not a rounding.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.ad_checkpoint import checkpoint_name

from jlora import adapt, infer_layout, join, merge, split, wrap
from jlora.tree.paths import flatten

# Each example compiles programs, so few are drawn in a run and drawing one takes long.
bounded = lambda examples: settings(max_examples=examples, suppress_health_check=list(HealthCheck))
sizes = st.integers(2, 5)
flags = st.booleans()


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def draw_tree(tree, seed):
    """The tree with every array drawn anew, adapters' b and scaling too."""
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(treedef, [jnp.asarray(rng.normal(size=leaf.shape)) for leaf in leaves])


def linen(module, *args, method=None):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    return lambda params, *args: module.apply({"params": params}, *args), shapes


def shaped(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float64)


def inputs(*shape):
    return jnp.asarray(np.random.default_rng(7).normal(size=shape))


# Programs: each draws a function, the shapes of its parameters, and its arguments.


def dense(draw):
    class Network(nn.Module):
        hidden: int
        out: int
        bias: bool

        @nn.compact
        def __call__(self, x):
            return nn.Dense(self.out)(nn.gelu(nn.Dense(self.hidden, use_bias=self.bias)(x)))

    x = inputs(*draw(st.lists(sizes, max_size=2)), draw(sizes))
    return (*linen(Network(draw(sizes), draw(sizes), draw(flags)), x), (x,))


def dense_general(draw):
    shape = draw(st.lists(sizes, min_size=2, max_size=3))
    axis = draw(st.sampled_from([-1, (-1,), (-2, -1), (-1, -2), (0, -1)]))
    x = inputs(2, *shape)
    features = tuple(draw(st.lists(sizes, min_size=1, max_size=2)))
    return (*linen(nn.DenseGeneral(features, axis=axis), x), (x,))


def attention(draw):
    heads, width = draw(st.integers(2, 3)), draw(sizes)
    x, y = inputs(2, draw(sizes), draw(sizes)), inputs(2, draw(sizes), draw(sizes))
    module = nn.MultiHeadDotProductAttention(heads, qkv_features=heads * width, use_bias=draw(flags))
    return (*linen(module, x, y), (x, y))


def conv(draw):
    dims, channels, groups = draw(st.integers(1, 2)), draw(sizes), draw(st.integers(1, 3))
    groups, channels = draw(st.sampled_from([(1, channels), (groups, groups * 2), (channels, channels)]))
    window = tuple(draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims)))
    module = nn.Conv(
        groups * draw(st.integers(1, 2)) * (1 if groups > 1 else 3),
        window,
        strides=draw(st.integers(1, 2)),
        kernel_dilation=draw(st.integers(1, 2)),
        padding=draw(st.sampled_from(["SAME", "VALID", "CIRCULAR"])),
        feature_group_count=groups,
    )
    x = inputs(2, *([7] * dims), channels)
    return (*linen(module, x), (x,))


def conv_transpose(draw):
    x = inputs(2, 4, 5, draw(sizes))
    module = nn.ConvTranspose(draw(sizes), (3, draw(st.integers(1, 3))), strides=(draw(st.integers(1, 2)), 1))
    return (*linen(module, x), (x,))


def embedding(draw):
    tied, scaled = draw(flags), draw(flags)
    module = nn.Embed(draw(st.integers(5, 11)), draw(sizes))
    ids = jnp.array([[1, 0, 3], [2, 4, 4]])

    def fn(params, ids):
        if scaled:
            params = {"embedding": params["embedding"] * 3.0}
        h = jnp.tanh(module.apply({"params": params}, ids))
        return module.apply({"params": params}, h, method="attend") if tied else h

    return fn, linen(module, ids)[1], (ids,)


def einsum(draw):
    """Any labels on any side: batch, contracted and free axes of x and the kernel, each order permuted."""
    batch, contracted, free, own = (draw(st.integers(low, 2)) for low in (0, 1, 1, 0))
    names = iter("abcdefgh")
    batch, contracted, free, own = ([next(names) for _ in range(n)] for n in (batch, contracted, free, own))
    size = {name: draw(sizes) for name in batch + contracted + free + own}
    order = lambda labels: "".join(draw(st.permutations(labels)))
    x, w, y = order(batch + contracted + own), order(batch + contracted + free), order(batch + free + own)
    left = draw(flags)

    def fn(params, value):
        pair = (params["kernel"], value) if left else (value, params["kernel"])
        return jnp.einsum(f"{w},{x}->{y}" if left else f"{x},{w}->{y}", *pair)

    return fn, {"kernel": shaped(*(size[n] for n in w))}, (inputs(*(size[n] for n in x)),)


POLICIES = [None, jax.checkpoint_policies.nothing_saveable, jax.checkpoint_policies.dots_with_no_batch_dims_saveable]


def stacked_scan(draw):
    width, layers = draw(sizes), draw(st.integers(1, 4))
    reverse, unroll, remat = draw(flags), draw(st.integers(1, 3)), draw(flags)
    policy = draw(st.sampled_from(POLICIES))

    def fn(params, x):
        def step(c, layer):
            y = jnp.tanh(c @ layer["kernel"] + layer["bias"])
            return y @ params["shared"].T, y.sum()

        step = jax.checkpoint(step, policy=policy, prevent_cse=False) if remat else step
        return jax.lax.scan(step, x, params["layers"], reverse=reverse, unroll=unroll)

    layer = {"kernel": shaped(layers, width, width), "bias": shaped(layers, width)}
    return fn, {"layers": layer, "shared": shaped(width, width)}, (inputs(3, width),)


def linen_scan(draw):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.Dense(x.shape[-1])(nn.tanh(nn.Dense(5)(x))), None

    block = nn.remat(Block, prevent_cse=False) if draw(flags) else Block
    stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=draw(st.integers(2, 3)))
    x = inputs(2, draw(sizes))
    return (*linen(stack(), x, None), (x, None))


def experts(draw):
    count, rows, inner, out = draw(st.integers(2, 4)), 7, draw(sizes), draw(sizes)
    how = draw(st.sampled_from(["ragged", "batched", "gathered", "indexed", "mapped"]))
    which = jnp.array(draw(st.lists(st.integers(0, count - 1), min_size=rows, max_size=rows)))

    def fn(params, x):
        w = params["kernel"]
        if how == "ragged":
            return jax.lax.ragged_dot(x, w, jnp.bincount(which, length=count))
        if how == "batched":
            return jnp.einsum("td,edo->teo", x, w) * jax.nn.softmax(x[:, :1])[..., None]
        if how == "gathered":
            return jnp.einsum("td,tdo->to", x, w[which])
        if how == "indexed":
            return jnp.tanh(x @ w[which[0]]) + x @ w[-1]
        return jax.vmap(lambda kernel: x @ kernel)(w)

    return fn, {"kernel": shaped(count, inner, out)}, (inputs(rows, inner),)


WRAPPERS = {
    "jit": jax.jit,
    "remat": lambda f: jax.checkpoint(f, policy=POLICIES[2]),
    "remat of arguments": lambda f: jax.checkpoint(f, prevent_cse=(False, True)),
    "scan": lambda f: lambda w, x: jax.lax.scan(lambda c, _: (f(w, c), None), x, None, length=2)[0],
    "carried": lambda f: lambda w, x: jax.lax.scan(lambda c, _: ((c[0], f(*c)), c[1]), (w, x), None, 2)[0][1],
    "fori": lambda f: lambda w, x: jax.lax.fori_loop(0, 2, lambda _, c: f(w, c), x),
    "cond": lambda f: lambda w, x: jax.lax.cond(x.sum() > 0, f, lambda w, x: x @ w.T, w, x),
    "switch": lambda f: (
        lambda w, x: jax.lax.switch(jnp.int32(x[0, 0] * 5) % 3, [f, lambda w, x: x, lambda w, x: x @ w], w, x)
    ),
    "vmap": lambda f: lambda w, x: jax.vmap(lambda row: f(w, row[None])[0])(x),
    "grad": lambda f: lambda w, x: jax.grad(lambda x: jnp.sin(f(w, x)).sum())(x),
    "custom rule": lambda f: lambda w, x: jax.nn.relu(f(w, x)) + jax.nn.logsumexp(x),
}
FORWARD = {
    "while": lambda f: lambda w, x: jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, f(w, c[1])), (0, x))[1],
    "while condition": lambda f: (
        lambda w, x: jax.lax.while_loop(
            lambda c: (c[0] < 2) & ((c[1] @ w).sum() < 1e9), lambda c: (c[0] + 1, f(w, c[1])), (0, x)
        )[1]
    ),
}


def nested(draw, wrappers=WRAPPERS):
    """Control flow in control flow, around one kernel."""
    fn = lambda w, x: jnp.tanh(x @ w)
    for name in draw(st.lists(st.sampled_from(list(wrappers)), min_size=1, max_size=3)):
        fn = wrappers[name](fn)
    width = draw(sizes)
    return lambda params, x: fn(params["kernel"], x), {"kernel": shaped(width, width)}, (inputs(3, width),)


def views(draw):
    """What may stand between a kernel and its product."""
    steps = {
        "scale": lambda w: w * 0.5,
        "divide": lambda w: w / jnp.exp(jnp.float64(1)),
        "negate": lambda w: -w,
        "flip": lambda w: jnp.flip(w, (0, 2)),
        "cut in": lambda w: w[1:3],
        "every other": lambda w: w[:, ::2],
        "last": lambda w: w[..., -2:],
        "dynamic": lambda w: jax.lax.dynamic_slice_in_dim(w, jnp.int32(1), 1, axis=2),
        "half": lambda w: jnp.split(w, 2, axis=0)[1],
        "new axis": lambda w: w[:, None].squeeze(1),
        "turn and back": lambda w: w.T.reshape(w.shape[2], w.shape[1], -1).T,
        "stop": jax.lax.stop_gradient,
        "named": lambda w: checkpoint_name(w, "w"),
        "barrier": jax.lax.optimization_barrier,
    }
    chosen = draw(st.lists(st.sampled_from(list(steps)), min_size=1, max_size=3, unique=True))

    def fn(params, x):
        w = params["kernel"].reshape(6, 2, 3)
        for name in chosen:
            w = steps[name](w)
        return jnp.einsum("td,dhk->thk", x[:, : w.shape[0]], w)

    return fn, {"kernel": shaped(6, 6)}, (inputs(3, 6),)


def grad_inside(draw):
    """A gradient with respect to the input, taken inside the function."""
    program = draw(st.sampled_from([dense, dense_general, attention, stacked_scan, linen_scan, conv_transpose]))
    fn, shapes, (x, *rest) = program(draw)
    total = lambda x, params: sum(jnp.sin(y).sum() for y in jax.tree.leaves(fn(params, x, *rest)))
    return lambda params, x: jax.grad(total)(x, params), shapes, (x,)


def two_trees(draw):
    """Two wrapped kernels that meet in one function, one of them in a list."""
    width, inner = draw(sizes), draw(sizes)
    fn = lambda params, x: x @ params["list"][0]["kernel"] @ params["second"]["kernel"].T
    shapes = {"list": [{"kernel": shaped(width, inner)}], "second": {"kernel": shaped(3, inner)}}
    return fn, shapes, (inputs(2, width),)


PROGRAMS = {
    p.__name__: p
    for p in (
        dense, dense_general, attention, conv, conv_transpose, embedding, einsum, stacked_scan, linen_scan,
        experts, nested, views, grad_inside, two_trees,
    )
}  # fmt: skip


def fan(shape, layout, kind):
    """The product of a kernel's in axes, or of its out axes."""
    return int(np.prod([n for n, letter in zip(shape, layout, strict=True) if letter in kind]))


def wrapped_at_random(draw, fn, shapes, args):
    """A wrapped tree of any rank and scaling that its kernels allow, all leaves random."""
    layout = infer_layout(fn, shapes, *args)
    leaves = flatten(shapes)
    fans = [fan(leaves[path].shape, letters, kind) for path, letters in layout.items() for kind in ("iv", "o")]
    tree = wrap(shapes, draw(st.integers(1, min(fans))), layout=layout, targets=".*")
    return draw_tree(tree, draw(st.integers(0, 99)))


def compiled(fn):
    """Jitted with few of XLA's optimisations: a program runs once here, so compiling is what takes the time."""
    return jax.jit(
        fn, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    )


def assert_close(found, expected, tolerance=1e-10):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype == jnp.float64 and one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * (1 + float(jnp.abs(other).max())))


def total(tree):
    return sum(jnp.sum(jnp.sin(leaf + n)) for n, leaf in enumerate(jax.tree.leaves(tree)))


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
@bounded(4)
@given(data=st.data())
def test_outputs_and_all_gradients_equal_those_of_the_merged_tree(program, data):
    fn, shapes, args = PROGRAMS[program](data.draw)
    params = wrapped_at_random(data.draw, fn, shapes, args)

    def both(params, *args):
        results = []
        for run in (adapt(fn), lambda params, *args: fn(merge(params), *args)):
            loss = lambda params, run=run: (total(out := run(params, *args)), out)
            results.append(jax.value_and_grad(loss, has_aux=True)(params))
        return results

    ((_, found), gradient), ((_, expected), true_gradient) = compiled(both)(params, *args)
    assert_close(found, expected)
    assert_close(gradient, true_gradient)


@bounded(4)
@given(data=st.data())
def test_while_loops_equal_those_of_the_merged_tree_in_value_and_tangent(data):
    fn, shapes, args = nested(data.draw, FORWARD)
    params = wrapped_at_random(data.draw, fn, shapes, args)
    tangent = draw_tree(params, 3)
    both = lambda params, tangent: [
        jax.jvp(run, (params,), (tangent,)) for run in (lambda p: adapt(fn)(p, *args), lambda p: fn(merge(p), *args))
    ]
    found, expected = compiled(both)(params, tangent)
    assert_close(found, expected)


def pair(w):
    return jnp.array([1.0, -0.5]).reshape(2, *[1] * w.ndim)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bool, jnp.float8_e4m3fn, jnp.bfloat16])
def test_an_input_of_a_narrower_kind_than_the_kernels_does_not_round_the_adapter(dtype):
    numbers = (((1,), (0,)), ((), ()))
    fn = lambda params, x: jax.lax.dot_general(x, params["kernel"], numbers, preferred_element_type=jnp.float64)
    params = draw_tree(wrap({"kernel": shaped(6, 5)}, 2), 0)
    x = (inputs(3, 6) * 4).astype(dtype)
    assert_close(adapt(fn)(params, x), fn(merge(params), x))


@pytest.mark.parametrize("options", [{"mode": "fill"}, {"mode": "fill", "fill_value": 7.0}, {"mode": "clip"}])
def test_rows_looked_up_outside_the_table_are_what_the_lookup_says(options):
    fn = lambda params, ids: params["embedding"].at[ids].get(**options)
    params = draw_tree(wrap({"embedding": shaped(5, 3)}, 2, targets="embedding"), 0)
    ids = jnp.array([1, -1, 4, 5, 99])
    np.testing.assert_allclose(adapt(fn)(params, ids), fn(merge(params), ids), atol=1e-12)


def scanned(f, params, x):
    return jax.lax.scan(lambda c, _: (f(params, c), None), x, None, length=3)[0]


OUTER = {
    "nothing": lambda f, params, x: f(params, x),
    "jit": lambda f, params, x: jax.jit(f)(params, x),
    "vmap over x": lambda f, params, x: jax.vmap(f, (None, 0))(params, x),
    "vmap over trees": lambda f, params, x: jax.vmap(f, (0, None))(jax.tree.map(lambda w: w * pair(w), params), x),
    "scan": scanned,
    "scan over trees": lambda f, params, x: jax.lax.scan(
        lambda c, p: (f(p, c), None), x, jax.tree.map(lambda w: w * pair(w), params)
    )[0],
    "grad": lambda f, params, x: jax.grad(lambda p, x: jnp.sin(f(p, x)).sum(), (0, 1))(params, x)[1],
    "hessian product": lambda f, params, x: jax.jvp(jax.grad(lambda x: jnp.sin(f(params, x)).sum()), (x,), (x,))[1],
    "remat": lambda f, params, x: jax.checkpoint(f)(params, x),
    "cond": lambda f, params, x: jax.lax.cond(x.sum() > 9, lambda: x, lambda: f(params, x)),
    "adapt": lambda f, params, x: adapt(lambda x, scale: f(params, x) * scale)(x, 2.0),
}  # fmt: skip


@pytest.mark.parametrize("outer", OUTER)
def test_an_adapted_function_may_stand_inside_anothers_transform(outer):
    fn = lambda params, x: jnp.tanh(x @ params["kernel"] + params["bias"])
    params = draw_tree(wrap({"kernel": shaped(4, 4), "bias": shaped(4)}, 2), 0)
    x = inputs(3, 4)
    run = jax.jit(
        lambda f, params: jax.value_and_grad(lambda p: total(OUTER[outer](f, p, x)))(params), static_argnums=0
    )
    assert_close(run(adapt(fn), params), run(lambda p, x: fn(merge(p), x), params))


# merge, by hand in NumPy: the einsum of A and B for each layout, in both forms.
BY_HAND = {
    "io": "ir,ro->io",
    "vo": "vr,ro->vo",
    "ioo": "ir,ruw->iuw",
    "iio": "ijr,ro->ijo",
    "iiio": "ijkr,ro->ijko",
    "sio": "sir,sro->sio",
    "ssio": "stir,stro->stio",
    "sioo": "sir,sruw->siuw",
    "oi": "xir,oyr->oi",
    "oio": "xiyr,ozpr->oip",
    "iso": "isxr,ysor->iso",
    "soi": "sxir,soyr->soi",
    "ios": "ixsr,yosr->ios",
    "oisi": "xisjr,oyszr->oisj",
}
SCALING = {"ssio": np.s_[:, :, None, None], "sio": np.s_[:, None, None], "sioo": np.s_[:, None, None, None],
           "iso": np.s_[None, :, None], "soi": np.s_[:, None, None], "ios": np.s_[None, None, :],
           "oisi": np.s_[None, None, :, None]}  # fmt: skip


@pytest.mark.parametrize("layout", BY_HAND)
@bounded(4)
@given(shape=st.lists(st.integers(1, 5), min_size=4, max_size=4), data=st.data())
def test_merge_is_the_kernel_plus_the_scaled_product_in_numpy(layout, shape, data):
    shape = tuple(shape[: len(layout)])
    rank = data.draw(st.integers(1, min(fan(shape, layout, "iv"), fan(shape, layout, "o"))))
    tree = draw_tree(wrap({"w": shaped(*shape)}, rank, layout={"w": layout}, targets="w"), rank)
    kernel, a, b, scaling = (np.asarray(tree[f"w{affix}"]) for affix in ("", "_lora_a", "_lora_b", "_lora_scaling"))
    expected = kernel + np.einsum(BY_HAND[layout], a, b) * scaling[SCALING.get(layout, ())]
    np.testing.assert_allclose(merge(tree)["w"], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options, scaling", [({}, 1), ({"alpha": 6}, 1.5), ({"alpha": 6, "rslora": True}, 3)])
def test_the_update_is_scaled_by_alpha_over_rank_or_over_its_root(options, scaling):
    tree = wrap({"kernel": inputs(6, 5)}, 4, **options)
    tree["kernel_lora_b"] = inputs(4, 5)
    update = scaling * np.asarray(tree["kernel_lora_a"]) @ np.asarray(tree["kernel_lora_b"])
    np.testing.assert_allclose(merge(tree)["kernel"], tree["kernel"] + update, rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        adapt(lambda p, x: x @ p["kernel"])(tree, jnp.eye(6)), tree["kernel"] + update, atol=1e-12
    )


# Nothing of a kernel's size exists but the kernel and views of it.

VIEWS = {
    "transpose", "reshape", "slice", "dynamic_slice", "split", "squeeze", "broadcast_in_dim", "convert_element_type",
    "rev", "copy", "name", "optimization_barrier", "stop_gradient",
}  # fmt: skip
CALLS = {"jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "scan"}
CALLS.add(jax.make_jaxpr(jax.checkpoint(jnp.sin))(1.0).eqns[0].primitive.name)


class Walk:
    """Follows kernels through a jaxpr; collects the sizes of their views, and whatever else is computed."""

    def __init__(self, closed, kernels):
        self.views, self.others = set(), []
        jaxpr = getattr(closed, "jaxpr", closed)
        for var, kernel in zip(jaxpr.invars, kernels, strict=True):
            if kernel:
                self.views.add(var.aval.size)
        self.walk(jaxpr, kernels)

    def walk(self, jaxpr, kernels):
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        tagged = {var for var, kernel in zip(jaxpr.invars, kernels, strict=True) if kernel}
        is_kernel = lambda var: not hasattr(var, "val") and var in tagged
        for equation in jaxpr.eqns:
            name, reads = equation.primitive.name, [is_kernel(var) for var in equation.invars]
            if name in CALLS:
                body = equation.params.get("jaxpr") or equation.params["call_jaxpr"]
                outs = self.walk(body, reads)
                # A scan that hands out what it reads stacks a copy, which is no view.
                tagged |= {v for v, kernel in zip(equation.outvars, outs, strict=True) if kernel and name != "scan"}
            elif name == "cond":
                for branch in equation.params["branches"]:
                    self.walk(branch, reads[1:])
            elif name == "while":
                checks, steps = equation.params["cond_nconsts"], equation.params["body_nconsts"]
                carry = reads[checks + steps :]
                self.walk(equation.params["cond_jaxpr"], reads[:checks] + carry)
                self.walk(equation.params["body_jaxpr"], reads[checks : checks + steps] + carry)
            elif name in VIEWS and any(reads):
                tagged |= set(equation.outvars)
                self.views |= {v.aval.size for v in equation.outvars}
            if name not in CALLS or name == "scan":
                self.others += [(name, v.aval) for v in equation.outvars if v not in tagged]
        return [is_kernel(var) for var in jaxpr.outvars]

    @property
    def materialised(self):
        return [f"{name} {aval}" for name, aval in self.others if aval.size in self.views]


def chain(params, x):
    for kernel in params.values():
        x = jnp.tanh(x @ kernel)
    return x


def layers(step):
    def fn(params, x):
        return jax.lax.scan(lambda c, w: (step(w, c), None), x, params["kernel"])[0]

    return fn


def tied(params, ids):
    return jnp.tanh(params["kernel"][ids]) @ params["kernel"].T


def block(w, x):
    return jnp.tanh(x @ w)


# Kernels' sizes are products of primes that no activation here shares.
NHWC, NWC = ("NHWC", "HWIO", "NHWC"), ("NWC", "WIO", "NWC")
LARGE = {
    "dense": (lambda p, x: jnp.tanh(x @ p["kernel"]), {"kernel": (29, 31)}, (3, 29)),
    "bfloat16": (lambda p, x: x.astype("bfloat16") @ p["kernel"].astype("bfloat16"), {"kernel": (29, 31)}, (3, 29)),
    "transposed": (lambda p, x: x @ p["kernel"].T, {"kernel": (31, 29)}, (3, 29)),
    "kernel on the left": (lambda p, x: jnp.einsum("hdk,td->htk", p["kernel"], x), {"kernel": (2, 29, 31)}, (3, 29)),
    "heads": (lambda p, x: jnp.einsum("td,dhk->thk", x, p["kernel"]), {"kernel": (29, 2, 31)}, (3, 29)),
    "reshaped": (
        lambda p, x: jnp.einsum("td,dhk->thk", x, p["kernel"].reshape(29, 2, 31)), {"kernel": (29, 62)}, (3, 29),
    ),
    "halves": (lambda p, x: [x @ w for w in jnp.split(p["kernel"], 2, axis=1)], {"kernel": (29, 62)}, (3, 29)),
    "conv": (
        lambda p, x: jax.lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=NHWC),
        {"kernel": (3, 3, 29, 31)}, (1, 2, 2, 29),
    ),
    "grouped conv": (
        lambda p, x: jax.lax.conv_general_dilated(
            x, p["kernel"], (2,), "VALID", dimension_numbers=NWC, feature_group_count=2
        ),
        {"kernel": (5, 29, 62)}, (1, 7, 58),
    ),
    "embedding": (tied, {"kernel": (37, 29)}, None),
    "scan": (layers(block), {"kernel": (5, 29, 29)}, (3, 29)),
    "scan with remat": (layers(jax.checkpoint(block)), {"kernel": (5, 29, 29)}, (3, 29)),
    "scan with remat and a policy": (
        layers(jax.checkpoint(block, policy=POLICIES[2], prevent_cse=False)), {"kernel": (5, 29, 29)}, (3, 29),
    ),
    "remat": (lambda p, x: jax.checkpoint(chain)(p, x), {"kernel": (29, 31), "second": (31, 29)}, (3, 29)),
    "loop": (
        lambda p, x: jax.lax.fori_loop(0, 3, lambda _, c: block(p["kernel"], c), x), {"kernel": (29, 29)}, (3, 29),
    ),
    "cond": (
        lambda p, x: jax.lax.cond(x.sum() > 0, block, lambda w, x: x @ w.T, p["kernel"], x),
        {"kernel": (29, 29)}, (3, 29),
    ),
    "jit": (lambda p, x: jax.jit(jax.jit(block))(p["kernel"], x), {"kernel": (29, 31)}, (3, 29)),
    "ragged": (
        lambda p, x: jax.lax.ragged_dot(x, p["kernel"], jnp.array([2, 3, 2])), {"kernel": (3, 29, 31)}, (7, 29),
    ),
    "experts": (lambda p, x: jnp.einsum("ted,edo->teo", x, p["kernel"]), {"kernel": (3, 29, 31)}, (2, 3, 29)),
    "vmap": (lambda p, x: jax.vmap(lambda r: block(p["kernel"], r))(x), {"kernel": (29, 31)}, (3, 29)),
    "grad inside": (
        lambda p, x: jax.grad(lambda x: jnp.sin(chain(p, x)).sum())(x),
        {"kernel": (29, 31), "second": (31, 29)}, (3, 29),
    ),
}  # fmt: skip


def large(name):
    fn, shapes, x = LARGE[name]
    x = jnp.array([[1, 2, 30]]) if x is None else jnp.zeros(x)
    params = draw_tree({name: shaped(*shape) for name, shape in shapes.items()}, 0)
    layout = infer_layout(fn, params, x)
    return fn, wrap(params, 2, layout=layout, targets=".*"), x


def walk(fn, base, *args):
    """Walks fn(base, *args), where every array of base is a kernel (a scaling is none)."""
    closed = jax.make_jaxpr(lambda base, args: fn(base, *args))(base, args)
    kernels = [leaf.ndim > 1 for leaf in jax.tree.leaves(base)]
    return Walk(closed, kernels + [False] * len(jax.tree.leaves(args)))


@pytest.mark.parametrize("name", LARGE)
def test_nothing_of_a_kernels_size_is_computed_forward_or_backward(name):
    fn, params, x = large(name)
    adapters, base = split(params)
    forward = lambda base, adapters, x: adapt(fn)(join(adapters, base), x)
    backward = jax.grad(lambda adapters, base, x: total(forward(base, adapters, x)).astype(float))
    assert walk(forward, base, adapters, x).materialised == []
    assert walk(lambda base, adapters, x: backward(adapters, base, x), base, adapters, x).materialised == []


@pytest.mark.parametrize("name", LARGE)
def test_the_walk_finds_the_kernel_that_merging_first_forms(name):
    fn, params, x = large(name)
    adapters, base = split(params)
    merging = lambda base, adapters, x: fn(merge(join(adapters, base)), x)
    assert walk(merging, base, adapters, x).materialised
