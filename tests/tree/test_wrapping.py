"""The wrapped tree: the leaves beside a kernel, their counts, and how the tree is split and joined."""

from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict, freeze

import jlora
from jlora.tree.paths import flatten, map_with_path
from jlora.tree.wrapping import uniform


def dense(fan_in: int, fan_out: int, dtype: Any = jnp.float32) -> dict[str, Any]:
    kernel = jax.random.normal(jax.random.key(1), (fan_in, fan_out), dtype)
    return {"dense": {"kernel": kernel, "bias": jnp.zeros(fan_out, dtype)}}


def tree() -> dict[str, Any]:
    return {
        "encoder": {f"layer_{n}": {"query": dense(6, 4)["dense"], "value": dense(6, 5)["dense"]} for n in range(2)},
        "embeddings": {"embedding": jnp.ones((11, 6))},
        "norm": {"scale": jnp.ones(6)},
        "nothing": {},
    }


class Net(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(4, 3, rngs=rngs)


TREES = {"dict": tree, "FrozenDict": lambda: freeze(tree()), "nnx.State": lambda: nnx.split(Net())[1]}


def same(left: Any, right: Any) -> bool:
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return jax.tree.structure(left) == jax.tree.structure(right) and all(x is y for x, y in pairs)


def with_b(params: Any) -> Any:
    """The tree with B random, as after some training."""
    draw = lambda path, x: jax.random.normal(jax.random.key(len(str(path))), x.shape, x.dtype)
    is_b = lambda path: any("_lora_b" in str(key) for key in path)
    return jax.tree_util.tree_map_with_path(lambda path, x: draw(path, x) if is_b(path) else x, params)


@pytest.mark.parametrize("make", TREES.values(), ids=TREES)
def test_unwrap_returns_the_tree_before_wrap(make: Any) -> None:
    params = make()
    assert same(jlora.unwrap(jlora.wrap(params, rank=2)), params)


@pytest.mark.parametrize("make", TREES.values(), ids=TREES)
def test_split_and_join_and_extract_and_attach_are_inverse(make: Any) -> None:
    wrapped = jlora.wrap(make(), rank=2)
    assert same(jlora.join(*jlora.split(wrapped)), wrapped)
    assert same(jlora.attach(jlora.extract(wrapped), jlora.unwrap(wrapped)), wrapped)


@pytest.mark.parametrize("make", TREES.values(), ids=TREES)
def test_containers_and_boxes_keep_their_kinds(make: Any) -> None:
    params = make()
    wrapped = jlora.wrap(params, rank=2)
    for result in (wrapped, jlora.merge(wrapped), jlora.mask(wrapped), *jlora.split(wrapped)):
        assert type(result) is type(params)
    assert isinstance(jlora.split(jlora.wrap(freeze(tree()), rank=2))[0]["encoder"], FrozenDict)


def test_new_leaves_have_the_documented_shapes_and_start_values() -> None:
    node = jlora.wrap(dense(64, 32), rank=8, alpha=16)["dense"]
    a, b, scaling = (node[f"kernel_lora_{name}"] for name in ("a", "b", "scaling"))
    assert (a.shape, b.shape, scaling.shape) == ((64, 8), (8, 32), ())
    assert not b.any() and scaling == 2.0
    bound = 1 / np.sqrt(64)
    # U(-bound, bound) has a standard deviation of bound / sqrt(3).
    assert np.abs(a).max() <= bound and np.isclose(np.std(a), bound / np.sqrt(3), rtol=0.1)


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    node = jlora.wrap(dense(64, 32), rank=16, alpha=8, rslora=True)["dense"]
    assert node["kernel_lora_scaling"] == 2.0


def test_alpha_is_the_rank_when_not_given() -> None:
    assert jlora.wrap(dense(8, 8), rank=4)["dense"]["kernel_lora_scaling"] == 1.0


def test_low_precision_kernels_get_float32_adapters() -> None:
    for dtype in (jnp.bfloat16, jnp.float16):
        node = jlora.wrap(dense(8, 8, dtype), rank=2)["dense"]
        assert node["kernel_lora_a"].dtype == jnp.float32 and node["kernel"].dtype == dtype
        assert jlora.merge({"dense": node})["dense"]["kernel"].dtype == dtype


def test_a_kernels_draw_depends_on_key_and_path_alone() -> None:
    some, more = (jlora.wrap(tree(), 2, targets=targets) for targets in (["query"], ["query", "value"]))
    for path, value in flatten(some).items():
        np.testing.assert_array_equal(value, flatten(more)[path])
    other = jlora.wrap(tree(), 2, targets=["query"], key=jax.random.key(5))
    path = "encoder/layer_0/query/kernel_lora_a"
    assert (flatten(some)[path] != flatten(other)[path]).any()
    assert (flatten(some)[path] != flatten(some)[path.replace("layer_0", "layer_1")]).any()


def test_stacked_kernels_get_a_pair_and_a_scaling_for_each_layer() -> None:
    node = jlora.wrap({"layers": {"kernel": jnp.ones((3, 6, 5))}}, 2, layout={"layers/kernel": "sio"})["layers"]
    assert node["kernel_lora_a"].shape == (3, 6, 2)
    assert node["kernel_lora_b"].shape == (3, 2, 5)
    assert node["kernel_lora_scaling"].shape == (3,)
    assert (node["kernel_lora_a"][0] != node["kernel_lora_a"][1]).all()


@pytest.mark.parametrize("layout", ["ioo", "iio", "sio", "oio", "osi", "ois", "iso", "soi"])
def test_merge_equals_numpy_for_every_order_of_axes(layout: str) -> None:
    kernel = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
    params = with_b(jlora.wrap({"kernel": jnp.asarray(kernel)}, 2, alpha=3, layout={"kernel": layout}))
    a, b, scaling = (np.asarray(params[f"kernel_lora_{n}"], np.float64) for n in ("a", "b", "scaling"))
    if layout in ("ioo", "iio", "sio"):
        rule = {"ioo": "ir,rjk,->ijk", "iio": "ijr,rk,->ijk", "sio": "sir,sro,s->sio"}[layout]
        delta = np.einsum(rule, a, b, scaling)
    else:
        where = [n if letter == "s" else 1 for n, letter in zip(kernel.shape, layout, strict=True)]
        delta = (a * b).sum(-1) * scaling.reshape(where)
    np.testing.assert_allclose(jlora.merge(params)["kernel"], kernel + delta, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("size, rank, count", [(1024, 8, 16_384), (4096, 8, 65_536)])
def test_square_kernels_train_twice_side_times_rank(size: int, rank: int, count: int) -> None:
    params = jax.eval_shape(lambda: {"kernel": jnp.zeros((size, size))})
    summary = jlora.summary(jlora.wrap(params, rank=rank))
    assert (summary.trainable, summary.total) == (count, size * size)
    assert round(summary.percent, 2) == {1024: 1.56, 4096: 0.39}[size]


def test_trained_parameters_are_linear_in_the_rank() -> None:
    params = jax.eval_shape(lambda: {"kernel": jnp.zeros((1024, 1024))})
    counts = [jlora.summary(jlora.wrap(params, rank=rank)).trainable for rank in (8, 16, 32, 64, 128)]
    assert counts == [16_384, 32_768, 65_536, 131_072, 262_144]


def test_abstract_trees_wrap_to_the_shapes_that_concrete_ones_have() -> None:
    abstract = jlora.wrap(jax.eval_shape(tree), rank=2)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), jlora.wrap(tree(), rank=2))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == shapes


def test_summary_prints_a_table_that_ends_in_trainable_and_total() -> None:
    lines = str(jlora.summary(jlora.wrap(tree(), rank=2), train=["norm"])).splitlines()
    assert lines[0].split() == ["path", "shape", "rank", "scaling", "parameters", "trained"]
    assert lines[1].split() == ["encoder/layer_0/query/kernel", "6", "x", "4", "2", "1", "20", "83.33", "%"]
    assert lines[5].split()[:4] == ["norm/scale", "6", "full", "6"]
    assert lines[-1] == "trainable 90 / total 198 (45.45 %)"


def test_mask_is_true_for_a_b_and_fully_trained_leaves_alone() -> None:
    mask = jlora.mask(jlora.wrap(tree(), rank=2, targets=["query"]), train=["norm"])
    chosen = set(jax.tree.leaves(map_with_path(lambda path, train: path if train else None, mask)))
    queries = {f"encoder/layer_{n}/query/kernel_lora_{side}" for n in range(2) for side in "ab"}
    assert chosen == queries | {"norm/scale"}


def test_scaling_stays_with_the_base_and_in_the_adapter() -> None:
    wrapped = jlora.wrap(dense(6, 4), rank=2)
    adapters, base = jlora.split(wrapped)
    assert set(adapters["dense"]) == {"kernel_lora_a", "kernel_lora_b"}
    assert "kernel_lora_scaling" in base["dense"]
    assert set(jlora.extract(wrapped)["dense"]) == {f"kernel_lora_{n}" for n in ("a", "b", "scaling")}


def test_targets_set_ranks_and_alphas_by_kernel_and_the_first_match_wins() -> None:
    rules = {
        ".*/layer_0/query/kernel": 1,
        ("query",): jlora.Rule(rank=3, alpha=6),
        ".*/value/kernel": jlora.Rule(alpha=4),
    }
    rows = {row.path: (row.rank, row.scaling) for row in jlora.summary(jlora.wrap(tree(), 2, targets=rules)).rows}
    assert rows == {
        "encoder/layer_0/query/kernel": (1, 1.0),
        "encoder/layer_1/query/kernel": (3, 2.0),
        "encoder/layer_0/value/kernel": (2, 2.0),
        "encoder/layer_1/value/kernel": (2, 2.0),
    }


def test_a_rank_is_capped_by_kernel_only_with_cap_rank_and_the_summary_marks_it() -> None:
    params = {"body": {"kernel": jnp.ones((32, 16))}, "score": {"kernel": jnp.ones((32, 2))}}
    with pytest.raises(
        ValueError, match=r"'score/kernel' float32\[32, 2\]  rank 8, allowed 1 to 2(.|\n)*cap_rank=True"
    ):
        jlora.wrap(params, rank=8)
    capped = jlora.wrap(params, rank=8, alpha=16, cap_rank=True)
    rows = {row.path: (row.rank, row.max_rank, row.scaling) for row in jlora.summary(capped).rows}
    assert rows == {"body/kernel": (8, 16, 2.0), "score/kernel": (2, 2, 8.0)}
    lines = str(jlora.summary(capped)).splitlines()
    assert " 8 " in lines[1] and "(max)" not in lines[1] and " 2 (max) " in lines[2]
    # The capped kernel's adapter is the one that its rank alone gives.
    alone = jlora.wrap(params, targets={("score",): jlora.Rule(rank=2, alpha=16)})
    jax.tree.map(np.testing.assert_array_equal, alone["score"], capped["score"])


def test_a_capped_rank_must_still_be_a_whole_number_from_1() -> None:
    for rank, kind in ((0, ValueError), (2.5, TypeError), (True, TypeError)):
        with pytest.raises(kind, match="rank"):
            jlora.wrap(dense(6, 4), rank=rank, cap_rank=True)


def test_embedding_tables_are_wrapped_only_when_named() -> None:
    plain, named = jlora.wrap(tree(), 2), jlora.wrap(tree(), 2, targets=["embeddings"])
    assert "embedding_lora_a" not in plain["embeddings"]
    assert named["embeddings"]["embedding_lora_a"].shape == (11, 2)


def test_flax_attention_is_known_and_a_stacked_dense_of_the_same_name_is_not() -> None:
    attention = nn.MultiHeadDotProductAttention(2, qkv_features=8)
    params = attention.init(jax.random.key(0), jnp.ones((1, 3, 6)))["params"]
    node = jlora.wrap(params, rank=2)
    assert node["query"]["kernel_lora_b"].shape == (2, 2, 4) and node["out"]["kernel_lora_a"].shape == (2, 4, 2)
    stacked = {name: {"kernel": jnp.ones((3, 6, 6))} for name in ("query", "key", "value", "out")}
    with pytest.raises(ValueError, match="layout of 4 kernels can't be determined"):
        jlora.wrap(stacked)


def test_partitioned_boxes_name_the_axes_of_the_new_leaves() -> None:
    box = nn.Partitioned(jnp.ones((6, 4)), names=("embed", "mlp"))
    node = jlora.wrap({"dense": {"kernel": box}}, rank=2)["dense"]
    assert node["kernel_lora_a"].names == ("embed", None)
    assert node["kernel_lora_b"].names == (None, "mlp")


def test_lists_of_layers_are_trees_too() -> None:
    params = {"layers": [dense(4, 4)["dense"], {"scale": jnp.ones(4)}, dense(4, 4)["dense"]]}
    wrapped = jlora.wrap(params, 2)
    assert same(jlora.join(*jlora.split(wrapped)), wrapped)
    assert same(jlora.unwrap(wrapped), params)


def test_subclasses_of_dict_and_leaves_that_are_not_arrays_stay_as_they_are() -> None:
    params = defaultdict(dict, dense(6, 4), eps=1e-5)
    wrapped = jlora.wrap(params, 2)
    assert isinstance(wrapped, defaultdict) and wrapped.default_factory is dict
    assert jlora.join(*jlora.split(wrapped))["eps"] == 1e-5
    assert same(jlora.unwrap(wrapped), params)


def test_a_layout_for_a_path_is_not_a_pattern_for_other_paths() -> None:
    stacked = {"l.0": {"w": jnp.ones((2, 4, 4))}, "l_0": {"w": jnp.ones((4, 4))}}
    wrapped = jlora.wrap(stacked, 2, layout={"l.0/w": "sio"})
    assert set(wrapped["l_0"]) == {"w"} and wrapped["l.0"]["w_lora_a"].shape == (2, 4, 2)


INTEGERS = {"dense": {"kernel": jnp.ones((4, 4), jnp.int8)}}
ERRORS = {
    "rank below 1": (lambda: jlora.wrap(dense(6, 4), 0), "rank 0, allowed 1 to 4"),
    "rank above both": (lambda: jlora.wrap(dense(6, 4), 5), "rank 5, allowed 1 to 4"),
    "alpha of zero": (lambda: jlora.wrap(dense(6, 4), 2, alpha=0), "alpha must be above 0"),
    "alpha below zero": (lambda: jlora.wrap(dense(6, 4), 2, alpha=-1.0), "alpha must be above 0"),
    "alpha not finite": (lambda: jlora.wrap(dense(6, 4), 2, alpha=float("nan")), "alpha must be above 0"),
    "target matching nothing": (
        lambda: jlora.wrap(tree(), 2, targets=["querry", "value", "foo"]),
        r"2 targets matched no kernel.\n  'querry'  nearest: 'encoder/layer_\d/query/kernel'(.|\n)*'foo'",
    ),
    "invalid regex": (lambda: jlora.wrap(tree(), 2, targets="*kernel"), "not a regular expression"),
    "unknown layout": (
        lambda: jlora.wrap({"conv": {"kernel": jnp.ones((3, 3, 4, 5))}}),
        r"'conv/kernel' float32\[3, 3, 4, 5\]\nFix: pass layout=jlora.infer_layout.*or layout=",
    ),
    "layout for nothing": (
        lambda: jlora.wrap(dense(6, 4), 2, layout={"dense/kernel": "io", "dense/kernle": "io"}),
        "1 layout matched no leaf.\n  'dense/kernle'  nearest: 'dense/kernel'",
    ),
    "kernel in a list": (
        lambda: jlora.wrap({"a": [jnp.ones((4, 4))], "b": {"kernel": jnp.ones((4, 4))}}, 2, targets=".*"),
        "1 kernel is directly in a list or tuple(.|\n)*'a/0'",
    ),
    "layout that does not fit": (
        lambda: jlora.wrap({"conv": {"kernel": jnp.ones((3, 3, 4))}}, 2, layout={"conv/kernel": "io"}),
        "layout 'io'(.|\n)*one letter per axis",
    ),
    "wrapped already": (lambda: jlora.wrap(jlora.wrap(dense(6, 4), 2)), "already wrapped"),
    "integer kernel": (
        lambda: jlora.wrap(INTEGERS, 2),
        "that is not floating.\n  'dense/kernel' int8",
    ),
    "empty tree": (lambda: jlora.wrap({}), "no arrays"),
    "nothing named kernel": (lambda: jlora.wrap({"w": jnp.ones((4, 4))}, 2), "no leaf is named 'kernel'(.|\n)*'w'"),
    "no adapter to merge": (lambda: jlora.merge(dense(6, 4)), "merge: the tree has no adapter"),
    "no adapter to split": (lambda: jlora.split(dense(6, 4)), "split: the tree has no adapter"),
    "train matching nothing": (
        lambda: jlora.split(jlora.wrap(tree(), 2), train=["hed"]),
        "1 train pattern matched no leaf.\n  'hed'  nearest: ",
    ),
    "base without the kernel": (
        lambda: jlora.attach(jlora.extract(jlora.wrap(dense(6, 4), 2)), {"other": {"kernel": jnp.ones((6, 4))}}),
        "base lacks 1 kernel.*\n  'dense/kernel'",
    ),
    "base of another shape": (
        lambda: jlora.attach(jlora.extract(jlora.wrap(dense(6, 4), 2)), dense(7, 4)),
        r"1 adapter doesn't fit its kernel.\n  'dense/kernel'  kernel \[7, 4\], lora_a \[6, 2\]",
    ),
    "base wrapped already": (
        lambda: jlora.attach(jlora.extract(jlora.wrap(dense(6, 4), 2)), jlora.wrap(dense(6, 4), 2)),
        "already wrapped",
    ),
    "leaf on both sides": (lambda: jlora.join({"x": jnp.ones(2)}, {"x": jnp.ones(2)}), "on both sides"),
}


@pytest.mark.parametrize("call, words", ERRORS.values(), ids=ERRORS)
def test_bad_input_is_one_error_that_names_it_and_the_fix(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\nFix: " in str(caught.value)


def test_a_rank_that_is_not_an_int_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="rank must be an int"):
        jlora.wrap(dense(6, 4), 2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("init", [uniform, jax.nn.initializers.orthogonal()], ids=["uniform", "orthogonal"])
@pytest.mark.parametrize("experts", [(), (2,)], ids=["dense", "experts"])
def test_a_marked_stack_is_drawn_as_its_layers_are_one_by_one(experts: tuple[int, ...], init: Any) -> None:
    kernel, key = jnp.ones((*experts, 6, 5)), jax.random.key(3)
    letters = "s" * len(experts) + "io"
    single = {"model": {f"block_{n}": {"up": {"kernel": kernel}} for n in range(3)}}
    stacked = {"model": {"block": {"up": {"kernel": jnp.stack([kernel] * 3)}}}}
    options: dict[str, Any] = {"key": key, "init": init}
    one_by_one = jlora.wrap(single, 2, layout={".*/kernel": letters}, **options)["model"]
    layout = {"(?P<stack>model/block)/.*/kernel": "s" + letters}
    together = jlora.wrap(stacked, 2, layout=layout, **options)["model"]["block"]["up"]["kernel_lora_a"]
    for n in range(3):
        expected = one_by_one[f"block_{n}"]["up"]["kernel_lora_a"]
        # A batch of QR decompositions may round otherwise than one does.
        np.testing.assert_allclose(together[n], expected, rtol=0, atol=0 if init is uniform else 1e-6)
    unmarked = jlora.wrap(stacked, 2, layout={"model/block/.*/kernel": "s" + letters}, **options)
    assert (unmarked["model"]["block"]["up"]["kernel_lora_a"] != together).any()


@pytest.mark.parametrize("targets", [[], {}, ()])
def test_targets_that_name_nothing_are_refused(targets: Any) -> None:
    with pytest.raises(ValueError, match=r"targets is empty(.|\n)*Fix: pass a regular expression"):
        jlora.wrap(dense(6, 4), 2, targets=targets)
    with pytest.raises(TypeError, match=r"wrap: targets is 5\.\nFix: "):
        jlora.wrap(dense(6, 4), 2, targets=5)  # type: ignore[arg-type]
