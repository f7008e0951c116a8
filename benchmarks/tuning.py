"""The ways to fine-tune a model that `methods.py` compares, on jlora's BERT and on its decoder.

Each builder gives a `Method`: a tree {"model": the base's parameters, "added": the method's own}, a pattern for what of
it trains, and a forward pass over all of it. What a method adds to a model it adds from outside, by intercepting calls
of the model's modules (`flax.linen.intercept_methods`): the models know nothing of it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jlora
from jlora.models.bert import Bert
from jlora.models.layers import gelu, split_heads
from jlora.runs.config import Optimisation
from jlora.runs.engine import named_optimizer
from jlora.tree.layouts import A, B
from jlora.tree.paths import Tree, flatten, map_with_path, partition

NOTHING = "(?!)"
RANK, TOKENS = 8, 20


class Sites(NamedTuple):
    """Where a model has what the methods attach to.

    Attributes:
        outputs: pattern of the projections back to the residual stream.
        attention: pattern of the attention modules.
        key: name of the projection to keys in them.
        value: name of that to values.
        words: the module that embeds tokens.
        norms: pattern of the parameters of normalisations.
        head: pattern of the parameters of a head that is new, and trained by every method.
    """

    outputs: str
    attention: str
    key: str
    value: str
    words: str
    norms: str
    head: str


BERT = Sites(
    outputs=r"encoder/layer_\d+/(attention/)?output/dense",
    attention=r"encoder/layer_\d+/attention/self",
    key="key",
    value="value",
    words="embeddings/word_embeddings",
    norms=r".*/LayerNorm/.*",
    head=r"classifier/.*",
)
DECODER = Sites(
    outputs=r"layers_\d+/(self_attn/o_proj|mlp/down_proj)",
    attention=r"layers_\d+/self_attn",
    key="k_proj",
    value="v_proj",
    words="embed_tokens",
    norms=r".*norm/scale",
    head=NOTHING,
)


def sites_of(model: nn.Module) -> Sites:
    return BERT if isinstance(model, Bert) else DECODER


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Attributes:
        tree: {"model": the base's parameters, "added": the method's own}.
        trains: pattern of the paths that train; a new head trains too.
        head: pattern of the paths of that.
        apply: `apply(tree, input_ids, attention_mask)` gives what the model gives, for the text's own tokens.
        whole: what is kept is the whole model, whatever of it trained.
    """

    tree: Tree
    trains: str
    head: str
    apply: Callable[[Tree, Any, Any], Any]
    whole: bool = False

    def split(self) -> tuple[Tree, Tree]:
        """What trains, and the rest."""
        pattern = f"{self.trains}|{self.head}"
        return partition(self.tree, lambda path, _: re.fullmatch(pattern, path) is not None)


def base(model: nn.Module, params: Tree, key: Any) -> Method:
    """The model as it is; a new head trains."""
    return make(model, params, trains=NOTHING)


def full(model: nn.Module, params: Tree, key: Any) -> Method:
    """Every parameter trains."""
    return make(model, params, trains=r"model/.*")


def houlsby(model: nn.Module, params: Tree, key: Any, *, width: int) -> Method:
    """Two bottlenecks a layer, each after a projection back to the residual stream and before the sum; norms train too.

    The projection up from the bottleneck begins at zero, so the model begins as it was.

    Source: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP" (arXiv:1902.00751), section 2.1.
    """
    sites, added = sites_of(model), {}
    for n, (path, kernel) in enumerate(kernels(params, sites.outputs).items()):
        d = kernel.shape[1]
        down = jax.random.normal(jax.random.fold_in(key, n), (d, width)) * d**-0.5
        added[path] = {
            "down": {"kernel": down, "bias": jnp.zeros(width)},
            "up": {"kernel": jnp.zeros((width, d)), "bias": jnp.zeros(d)},
        }

    def attach(added: Tree, call: Call) -> Any:
        y = call.go()
        return y + bottleneck(added[call.path], y) if call.path in added else y

    return make(model, params, added, attach, trains=f"added/.*|model/({sites.norms})")


def bottleneck(adapter: Tree, x: Any) -> Any:
    down, up = adapter["down"], adapter["up"]
    return gelu(x @ down["kernel"] + down["bias"]) @ up["kernel"] + up["bias"]


def prefix(model: nn.Module, params: Tree, key: Any, *, tokens: int = TOKENS) -> Method:
    """Keys and values in every layer that all tokens attend to, before those of the text.

    They are trained as they are, without a network that makes them, and begin as the keys and values of random words.
    The decoder's are not rotated: a rotation is one more map that training could absorb, and so are the places of the
    text, which begin at 0 as without a prefix.

    Source: Li & Liang 2021, "Prefix-Tuning" (arXiv:2101.00190), section 4 and, for how they begin, 7.4.
    """
    sites = sites_of(model)
    ids = jax.random.randint(key, (1, tokens), 0, model.config.vocab_size)
    added = keys_and_values(model, params, ids)

    def attach(added: Tree, call: Call) -> Any:
        parent, _, name = call.path.rpartition("/")
        if call.path in added and isinstance(model, Bert):
            hidden, bias = call.args
            return call.go(hidden, widen(bias, tokens))
        if call.path in added:
            x, _, (rope, bias) = call.args
            past = tuple(split_heads(rows(added[call.path][part], x), model.config.kv_heads) for part in PARTS)
            return call.go(x, past, (rope, widen(bias, tokens)))
        y = call.go()
        if parent in added and isinstance(model, Bert) and name in (sites.key, sites.value):
            part = "keys" if name == sites.key else "values"
            return jnp.concatenate([rows(added[parent][part], y), y], axis=1)
        return y

    return make(model, params, added, attach, trains="added/.*")


PARTS = ("keys", "values")


def keys_and_values(model: nn.Module, params: Tree, ids: Any) -> Tree:
    """What the keys' and values' projections of every layer give for one row of tokens: (tokens, features) each."""
    sites = sites_of(model)

    @jax.jit
    def listen(params: Tree, ids: Any) -> Tree:
        found: Tree = {}

        def note(_: Tree, call: Call) -> Any:
            y = call.go()
            parent, _, name = call.path.rpartition("/")
            if re.fullmatch(sites.attention, parent) and name in (sites.key, sites.value):
                found.setdefault(parent, {})["keys" if name == sites.key else "values"] = y[0]
            return y

        intercepted(model, note, {"model": params, "added": {}}, ids, jnp.ones_like(ids))
        return found

    return listen(params, ids)


def rows(leaf: Any, like: Any) -> Any:
    """The same for every row of a batch."""
    return jnp.broadcast_to(leaf.astype(like.dtype), (len(like), *leaf.shape))


def widen(bias: Any, tokens: int) -> Any:
    """The bias of scores with keys in front that every query sees."""
    return None if bias is None else jnp.pad(bias, [(0, 0)] * 3 + [(tokens, 0)])


def prompt(model: nn.Module, params: Tree, key: Any, *, tokens: int = TOKENS) -> Method:
    """Embeddings that stand before those of the text, and begin as those of random words.

    Source: Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning" (arXiv:2104.08691),
        section 2.
    """
    words = sites_of(model).words
    table = flatten(params)[f"{words}/embedding"]
    added = {"embedding": table[jax.random.randint(key, (tokens,), 0, len(table))]}

    def attach(added: Tree, call: Call) -> Any:
        if call.path != words:
            return call.go()
        text = call.go(call.args[0][:, tokens:])
        return jnp.concatenate([rows(added["embedding"], text), text], axis=1)

    def apply(tree: Tree, ids: Any, mask: Any) -> Any:
        before = [(0, 0), (tokens, 0)]
        out = intercepted(model, attach, tree, jnp.pad(ids, before), jnp.pad(mask, before, constant_values=1))
        # A class is of the whole input; anything else is of its tokens, in order.
        return out[:, tokens:] if out.ndim == 3 else out

    return make(model, params, added, trains="added/.*", apply=apply)


def lora(model: nn.Module, params: Tree, key: Any, *, rank: int = RANK) -> Method:
    """An adapter of jlora's on every linear layer but the head, not merged."""
    wrapped = jlora.wrap(params, rank, targets=model.lora_targets, layout=model.lora_layout, key=key)
    adapted = jlora.adapt(lambda params, ids, mask: model.apply({"params": params}, ids, mask))
    return make(model, wrapped, trains=f".*({A}|{B})", apply=lambda tree, ids, mask: adapted(tree["model"], ids, mask))


def merged(model: nn.Module, tree: Tree) -> Method:
    """What `lora` has learnt, in the base's own kernels; there is nothing left to train."""
    return replace(base(model, jlora.merge(tree["model"]), None), whole=True)


METHODS: dict[str, Callable[..., Method]] = {
    "base": base,
    "full": full,
    "houlsby-64": functools.partial(houlsby, width=64),
    "houlsby-8": functools.partial(houlsby, width=8),
    "prefix": prefix,
    "prompt": prompt,
    "lora": lora,
}


class Call(NamedTuple):
    """A call of one of the model's modules.

    Attributes:
        path: of the module.
        args: of the call.
        inner: makes the call.
    """

    path: str
    args: tuple[Any, ...]
    inner: Callable[..., Any]

    def go(self, *args: Any) -> Any:
        """Makes the call, with its own arguments or with others."""
        return self.inner(*(args or self.args))


Attach = Callable[[Tree, Call], Any]


def make(
    model: nn.Module,
    params: Tree,
    added: Tree | None = None,
    attach: Attach = lambda added, call: call.go(),
    *,
    trains: str,
    apply: Callable[[Tree, Any, Any], Any] | None = None,
) -> Method:
    tree = {"model": params, "added": {} if added is None else added}
    forward = apply or functools.partial(intercepted, model, attach)
    return Method(tree, trains, f"model/({sites_of(model).head})", forward)


def intercepted(model: nn.Module, attach: Attach, tree: Tree, ids: Any, mask: Any) -> Any:
    """The model's forward pass in which `attach(tree["added"], call)` stands for each call of a module."""

    def intercept(inner: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != "__call__" or kwargs:
            return inner(*args, **kwargs)
        return attach(tree["added"], Call("/".join(context.module.path), args, inner))

    with nn.intercept_methods(intercept):
        return model.apply({"params": tree["model"]}, ids, mask)


def kernels(params: Tree, modules: str) -> dict[str, Any]:
    """The kernels of the modules of a pattern, by the module's path."""
    named = {path.removesuffix("/kernel"): leaf for path, leaf in flatten(params).items() if path.endswith("/kernel")}
    return {path: kernel for path, kernel in named.items() if re.fullmatch(modules, path)}


def loss_fn(method: Method) -> Callable[[Tree, Any, Any], Any]:
    """Mean cross entropy of a batch's targets, of texts or of tokens."""

    def loss(tree: Tree, batch: Any, key: Any) -> Any:
        logits = method.apply(tree, batch["input_ids"], batch["attention_mask"]).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return (losses * batch["weights"]).sum() / batch["weights"].sum()

    return loss


def optimizer(method: Method, rate: float, head_rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW with warm-up and linear decay as in jlora's recipe; a new head has a rate of its own."""

    def scale(updates: Tree, _: Any) -> Tree:
        ratio = lambda path, leaf: leaf * (head_rate / rate) if re.fullmatch(method.head, path) else leaf
        return map_with_path(ratio, updates)

    return optax.chain(named_optimizer(Optimisation(learning_rate=rate), steps), optax.stateless(scale))
