"""`infer_layout`: one letter for every axis, read off from how a function contracts its parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import core, nnx
from flax import linen as nn

from jlora import adapt, infer_layout, merge, wrap
from jlora.tree.paths import flatten

X = jnp.zeros((2, 7, 6))
IMAGE = jnp.zeros((2, 8, 8, 4))
IDS = jnp.zeros((2, 3), int)


def linen(module, *args, method=None):
    params = module.init(jax.random.key(0), *args)["params"]
    return infer_layout(lambda params, *args: module.apply({"params": params}, *args), params, *args)


def einsum(equation, left=False):
    """The layout of the second operand's letters, on either side."""
    x, rest = equation.split(",")
    w, out = rest.split("->")
    shapes = dict(zip("abcdef", (2, 3, 4, 5, 6, 7), strict=True))
    x_, w_ = (jnp.zeros([shapes[n] for n in labels]) for labels in (x, w))
    order = lambda params, x: (params["w"], x) if left else (x, params["w"])
    text = f"{w},{x}->{out}" if left else equation
    return infer_layout(lambda params, x: jnp.einsum(text, *order(params, x)), {"w": w_}, x_)


@pytest.mark.parametrize(
    "module, args, expected",
    [
        (nn.Dense(5), (X,), {"kernel": "io"}),
        (nn.DenseGeneral((3, 4)), (X,), {"kernel": "ioo"}),
        (nn.DenseGeneral(5, axis=(-2, -1)), (X,), {"kernel": "iio"}),
        (nn.DenseGeneral((3, 4), axis=(-2, -1)), (X,), {"kernel": "iioo"}),
        (nn.DenseGeneral(5, axis=-1, batch_dims=0), (X,), {"kernel": "sio"}),
        (nn.Einsum((7, 6, 5), "btd,tdo->bto"), (X,), {"kernel": "sio"}),
        (nn.Conv(8, (3,)), (X,), {"kernel": "iio"}),
        (nn.Conv(8, (3, 3), strides=2, kernel_dilation=2), (IMAGE,), {"kernel": "iiio"}),
        (nn.Conv(8, (1, 1)), (IMAGE,), {"kernel": "iiio"}),
        (nn.Conv(8, (3, 2), feature_group_count=2), (IMAGE,), {"kernel": "iiio"}),
        (nn.Conv(8, (3, 3), feature_group_count=4), (IMAGE,), {"kernel": "iiio"}),
        (nn.ConvTranspose(8, (3, 3), strides=(2, 2)), (IMAGE,), {"kernel": "iiio"}),
        (nn.Embed(11, 6), (IDS,), {"embedding": "vo"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_flax_layers(module, args, expected):
    assert linen(module, *args) == expected


def test_attention_and_the_names_of_all_its_kernels():
    found = linen(nn.MultiHeadDotProductAttention(2, qkv_features=8), X)
    assert found == {"query/kernel": "ioo", "key/kernel": "ioo", "value/kernel": "ioo", "out/kernel": "iio"}


def test_layers_stacked_by_scan_with_and_without_remat():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(6)(nn.MultiHeadDotProductAttention(2, name="attend")(x)), None

    for block in (Block, nn.remat(Block, prevent_cse=False)):
        stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
        found = linen(stack, X, None)
        assert found["Dense_0/kernel"] == "sio" and found["attend/query/kernel"] == "sioo"
        assert found["attend/out/kernel"] == "siio"


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    "equation, expected",
    [
        ("ab,bc->ac", "io"),
        ("ab,cb->ac", "oi"),
        ("abc,cde->abde", "ioo"),
        ("abc,dce->abde", "oio"),
        ("abc,dec->abde", "ooi"),
        ("abc,bcd->ad", "iio"),
        ("abc,cdb->ad", "ioi"),
        ("abc,acd->abd", "sio"),
        ("abc,cad->abd", "iso"),
        ("abc,dac->abd", "osi"),
        ("abcd,dbea->acbe", "isos"),
        ("ab,bc->ca", "io"),
    ],
)
def test_einsum_in_every_order_of_axes_and_operands(equation, expected, left):
    assert einsum(equation, left) == {"w": expected}


def kernel(*shape):
    return {"w": jnp.zeros(shape)}


def scan(step):
    return lambda params, x: jax.lax.scan(lambda c, w: (step(w, c), None), x, params["w"])[0]


@pytest.mark.parametrize(
    "fn, params, expected",
    [
        (lambda p, x: x @ p["w"].T, kernel(5, 6), "oi"),
        (lambda p, x: jnp.einsum("btd,dhk->bthk", x, p["w"].reshape(6, 2, 4)), kernel(6, 8), "io"),
        (lambda p, x: x @ p["w"].reshape(6, 8), kernel(2, 3, 8), "iio"),
        (lambda p, x: [x @ w for w in jnp.split(p["w"].astype("bfloat16") * 2.0, 2, 1)], kernel(6, 8), "io"),
        (lambda p, x: x @ p["w"][:, ::2], kernel(6, 8), "io"),
        (lambda p, x: x @ p["w"][0] @ p["w"][jnp.array(1)], kernel(3, 6, 6), "sio"),
        # x is the same for all of them, so this is one product with three times the columns.
        (lambda p, x: jax.vmap(lambda w: x @ w)(p["w"]), kernel(3, 6, 5), "oio"),
        (lambda p, x: jax.vmap(lambda x, w: x @ w)(x, p["w"]), kernel(2, 6, 5), "sio"),
        (lambda p, x: jax.vmap(lambda row: row @ p["w"])(x), kernel(6, 5), "io"),
        (lambda p, x: jax.vmap(lambda x, w: x @ w, (0, 2))(x, p["w"]), kernel(6, 5, 2), "ios"),
        (lambda p, x: jax.lax.ragged_dot(x[0], p["w"], jnp.array([3, 4])), kernel(2, 6, 5), "sio"),
        (lambda p, x: jnp.einsum("td,tdo->to", x[0], p["w"][jnp.arange(7) % 3]), kernel(3, 6, 5), "sio"),
        (scan(lambda w, c: c @ w), kernel(4, 6, 6), "sio"),
        (scan(lambda w, c: c @ w.T), kernel(4, 6, 6), "soi"),
        (scan(jax.checkpoint(lambda w, c: c @ w)), kernel(4, 6, 6), "sio"),
        (scan(lambda w, c: jax.lax.scan(lambda c, w: (c @ w, None), c, w)[0]), kernel(2, 4, 6, 6), "ssio"),
        (lambda p, x: jax.lax.fori_loop(0, 3, lambda _, c: c @ p["w"], x), kernel(6, 6), "io"),
        (lambda p, x: jax.lax.while_loop(lambda c: c.sum() > 0, lambda c: c @ p["w"], x), kernel(6, 6), "io"),
        (lambda p, x: jax.lax.cond(x.sum() > 0, lambda: x @ p["w"].T, lambda: x @ p["w"].T + 1), kernel(6, 6), "oi"),
        (lambda p, x: jax.jit(lambda w: x @ w)(p["w"]), kernel(6, 5), "io"),
        (lambda p, x: jax.grad(lambda x: jnp.sin(x @ p["w"]).sum())(x), kernel(6, 5), "io"),
    ],
)  # fmt: skip
def test_views_control_flow_and_transforms(fn, params, expected):
    assert infer_layout(fn, params, X) == {"w": expected}


@pytest.mark.parametrize("lookup_first", [True, False])
def test_a_tied_table_is_a_table_whichever_use_comes_first(lookup_first):
    def fn(params, ids):
        table = params["embedding"]
        if lookup_first:
            return table[ids] @ table.T
        return (jnp.ones((2, 6)) @ table.T), table[ids]

    assert infer_layout(fn, {"embedding": jnp.zeros((11, 6))}, IDS) == {"embedding": "vo"}


def test_what_is_not_contracted_is_left_out():
    fn = lambda p, x: (x + p["position"]) * p["scale"] @ p["kernel"] + p["bias"]
    params = {n: jnp.zeros(s) for n, s in {"position": (7, 6), "scale": (6,), "kernel": (6, 5), "bias": (5,)}.items()}
    params["unread"] = jnp.zeros((3, 3))
    assert infer_layout(fn, params, X) == {"kernel": "io"}


def test_abstract_parameters_and_arguments_do():
    fn = lambda p, x: x @ p["a"]["kernel"].T
    params, x = jax.eval_shape(lambda: ({"a": {"kernel": jnp.zeros((5, 6), jnp.bfloat16)}}, X))
    assert infer_layout(fn, params, x) == {"a/kernel": "oi"}
    tree = wrap(params, 2, layout=infer_layout(fn, params, x))
    assert {path: leaf.shape for path, leaf in flatten(tree).items()} == {
        "a/kernel": (5, 6), "a/kernel_lora_a": (1, 6, 2), "a/kernel_lora_b": (5, 1, 2), "a/kernel_lora_scaling": (),
    }  # fmt: skip
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in flatten(tree).values())


def test_nothing_is_computed_and_static_arguments_stay_as_they_are():
    def fn(params, x, mode, times):
        jax.debug.callback(lambda: pytest.fail("computed"))
        return (x @ params["kernel"]) * times if mode == "plain" else None

    assert infer_layout(fn, {"kernel": jnp.zeros((6, 5))}, X, "plain", 3) == {"kernel": "io"}


@pytest.mark.parametrize("kind", [core.freeze, nnx.State])
def test_frozen_dicts_and_nnx_states_do(kind):
    params = kind({"dense": {"kernel": jnp.zeros((6, 5))}})
    fn = lambda p, x: x @ p["dense"]["kernel"]
    assert infer_layout(fn, params, X) == {"dense/kernel": "io"}


def test_wrap_uses_the_layouts_and_leaves_tables_out_unless_named():
    model = lambda p, ids: jnp.einsum("btd,hkd->bthk", p["embedding"][ids], p["heads"]) @ p["last"]
    shapes = {"embedding": (11, 6), "heads": (2, 4, 6), "last": (4, 3)}
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    layout = infer_layout(model, params, IDS)
    assert layout == {"embedding": "vo", "heads": "ooi", "last": "io"}
    tree = wrap(params, 2, layout=layout)
    assert {n: v.shape for n, v in tree.items() if n.endswith(("_a", "_b"))} == {
        "heads_lora_a": (1, 1, 6, 2), "heads_lora_b": (2, 4, 1, 2), "last_lora_a": (4, 2), "last_lora_b": (2, 3),
    }  # fmt: skip
    tree = wrap(params, 2, layout=layout, targets=["embedding", "heads"])
    assert tree["embedding_lora_a"].shape == (11, 2) and "last_lora_a" not in tree
    tree = {n: jnp.asarray(rng.normal(size=v.shape), v.dtype) for n, v in tree.items()}
    np.testing.assert_allclose(adapt(model)(tree, IDS), model(merge(tree), IDS), rtol=1e-4, atol=1e-4)


def test_axes_that_cannot_be_told_apart_are_absent_and_wrap_names_both_ways_out():
    # An axis that is contracted in part and kept in part: the reshape runs through it.
    fn = lambda p, x: jnp.einsum("btd,hdk->bthk", x[..., :3], p["kernel"].reshape(2, 3, 4)[:, :, :])
    params = {"kernel": jnp.zeros((6, 2, 2))}
    assert infer_layout(fn, params, X) == {}
    with pytest.raises(ValueError) as error:
        wrap(params, 2, layout=infer_layout(fn, params, X), targets="kernel")
    first, offender, fix = str(error.value).splitlines()
    assert first == "wrap: the layout of 1 kernel can't be determined from name and shape."
    assert offender == "  'kernel' float32[6, 2, 2]"
    assert fix.startswith("Fix: ") and "layout=jlora.infer_layout(fn, params, *args)" in fix
    assert "layout={path: letters}" in fix
