"""The ways to do one training step that `step.py` compares.

Each builder makes its model, compiles its step and gives back a function that takes one step and waits for
it, with what is known about the step. A builder runs in a process of its own and imports what it needs there,
so a library that is missing hinders nobody else.
"""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What every method trains: a Llama-style decoder, adapted on all its projections.

    Args:
        vocab_size: tokens in the vocabulary.
        hidden_size: width of the residual stream.
        intermediate_size: width inside the gated MLP.
        num_layers: decoder blocks.
        num_heads: attention heads.
        batch: rows of a batch.
        time: tokens of a row; each of them is an input and has a target.
        rank: rank of every adapter; alpha is the same, so the scaling is 1.
        dtype: of the base and of the matmuls; adapters and their optimizer state are float32.
        remat: recompute each block in the backward pass.
        learning_rate: of AdamW.
    """

    vocab_size: int = 32_000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_layers: int = 12
    num_heads: int = 12
    batch: int = 4
    time: int = 128
    rank: int = 8
    dtype: str = "float32"
    remat: bool = False
    learning_rate: float = 1e-4

    @property
    def tokens(self) -> int:
        return self.batch * self.time

    def useful_flops(self, passes: int) -> float:
        """Floating-point operations of the matmuls, each of `passes` costing what the forward pass costs.

        2 for adapters alone, 3 for full fine-tuning; what is computed twice or for nothing does not count.
        """
        block = 4 * self.hidden_size**2 + 3 * self.hidden_size * self.intermediate_size
        kernels = self.num_layers * block + self.hidden_size * self.vocab_size
        scores = self.num_layers * 2 * self.time * self.hidden_size
        # The scores of attention have two operands that need a gradient, whatever is frozen.
        return 2.0 * self.tokens * (passes * kernels + 3 * scores)


SIZES = {
    "small": Case(),
    "7b": Case(
        hidden_size=4096,
        intermediate_size=11_008,
        num_layers=32,
        num_heads=32,
        time=2048,
        dtype="bfloat16",
        remat=True,
    ),
}


class Method(NamedTuple):
    """One way to train, ready to go: `step()` returns the loss when everything has been computed."""

    step: Callable[[], float]
    facts: dict[str, Any]


def full(case: Case) -> Method:
    """Every parameter trains."""
    import jax
    import optax

    model, params, batch = _flax(case, scan=False)
    tx = optax.adamw(case.learning_rate)

    def step(state: Any, batch: Any) -> Any:
        params, opt_state = state
        loss, grads = jax.value_and_grad(_plain_loss(model))(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return _compiled(case, step, (params, jax.jit(tx.init)(params)), batch, passes=3)


def merge(case: Case) -> Method:
    """The loss is taken on `jlora.merge(params)`, inside the step."""
    import jlora

    model, params, batch = _flax(case, scan=case.remat)
    plain = _plain_loss(model)
    return _adapters_only(case, model, params, lambda params, batch, key: plain(jlora.merge(params), batch), batch)


def qwix(case: Case) -> Method:
    """LoRA by qwix on the same Flax model, its LoRA parameters alone differentiated."""
    import jax
    import optax
    from flax import traverse_util
    from qwix import LoraProvider, apply_lora_to_model

    model, base, batch = _flax(case, scan=case.remat)
    pattern = f".*({'|'.join(PROJECTIONS)})"
    provider = LoraProvider(module_path=pattern, rank=case.rank, alpha=float(case.rank))
    model = apply_lora_to_model(model, provider)
    tx = optax.adamw(case.learning_rate)
    flatten, unflatten = traverse_util.flatten_dict, traverse_util.unflatten_dict

    @jax.jit
    def init() -> Any:
        params = flatten(model.init(jax.random.key(2), batch[0])["params"])
        return {path: leaf for path, leaf in params.items() if "_lora_" in path[-1]}

    made = init()
    if not made:
        raise RuntimeError("qwix adapted nothing")
    base = flatten(base)
    plain = _plain_loss(model)

    def step(state: Any, base: Any, batch: Any) -> Any:
        adapters, opt_state = state

        def loss_of(adapters: Any) -> Any:
            return plain(unflatten(base | adapters), batch)

        loss, grads = jax.value_and_grad(loss_of)(adapters)
        updates, opt_state = tx.update(grads, opt_state, adapters)
        return (optax.apply_updates(adapters, updates), opt_state), loss

    return _compiled(case, step, (made, tx.init(made)), base, batch)


def jlora(case: Case) -> Method:
    """jlora, one block after the other."""
    return _jlora(case, scan=False)


def jlora_scan(case: Case) -> Method:
    """jlora, one compiled block scanned over stacked kernels."""
    return _jlora(case, scan=True)


def _jlora(case: Case, *, scan: bool) -> Method:
    import jlora
    from jlora.training.losses import cross_entropy

    model, params, batch = _flax(case, scan=scan)
    hidden = jlora.adapt(lambda params, ids: model.apply({"params": params}, ids, method="hidden"))

    def head(params: Any, hidden: Any) -> Any:
        return model.apply({"params": {"lm_head": params}}, hidden, method="head")

    def loss_fn(params: Any, batch: Any, key: Any) -> Any:
        ids, targets = batch
        return cross_entropy(head, params["lm_head"], hidden(params, ids), targets)

    return _adapters_only(case, model, params, loss_fn, batch)


def _adapters_only(case: Case, model: Any, params: Any, loss_fn: Any, batch: Any) -> Method:
    """A step of jlora's own making over what `split` says trains."""
    import jax
    import optax

    from jlora import infer_layout, split, wrap
    from jlora.training.step import TrainState, make_train_step

    tx = optax.adamw(case.learning_rate)
    layout = infer_layout(lambda params: model.apply({"params": params}, batch[0]), params)
    adapters, base = split(wrap(params, rank=case.rank, targets=PROJECTIONS, layout=layout))
    state = TrainState.create(adapters, tx, jax.random.key(3))
    made = make_train_step(loss_fn, tx)

    def step(state: Any, base: Any, batch: Any) -> Any:
        state, metrics = made(state, base, batch)
        return state, metrics["loss"]

    return _compiled(case, step, state, base, batch)


def peft(case: Case) -> Method:
    """PEFT on transformers' Llama in torch, with as many threads as there are cores."""
    import os

    import torch
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(
        vocab_size=case.vocab_size,
        hidden_size=case.hidden_size,
        intermediate_size=case.intermediate_size,
        num_hidden_layers=case.num_layers,
        num_attention_heads=case.num_heads,
        max_position_embeddings=case.time,
        rms_norm_eps=1e-5,
        use_cache=False,
    )
    torch.set_default_dtype(getattr(torch, case.dtype))
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if not case.remat:
        _copy_weights(case, model)
    if case.remat:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    lora = LoraConfig(r=case.rank, lora_alpha=case.rank, target_modules=list(PROJECTIONS), lora_dropout=0.0)
    model = get_peft_model(model, lora).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=case.learning_rate, weight_decay=1e-4)
    ids, targets = (torch.as_tensor(part, device=device).long() for part in _batch(case))

    def step() -> float:
        optimizer.zero_grad()
        logits = model(input_ids=ids).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return float(loss)

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    with FlopCounterMode(display=False) as counted:
        loss = step()
    return Method(
        step,
        {
            "initial_loss": loss,
            "flops": float(counted.get_total_flops()),
            "useful_flops": case.useful_flops(2),
            "temp_bytes": torch.cuda.max_memory_allocated() - held if device == "cuda" else None,
            "compile_s": None,
            "trained": sum(p.numel() for p in trained),
        },
    )


METHODS: dict[str, Callable[[Case], Method]] = {
    "full": full,
    "merge": merge,
    "qwix": qwix,
    "peft": peft,
    "jlora": jlora,
    "jlora_scan": jlora_scan,
}


def _plain_loss(model: Any) -> Callable[[Any, Any], Any]:
    """Mean cross entropy of the next token, from the logits of the whole batch."""
    import jax.numpy as jnp
    import optax

    def loss(params: Any, batch: Any) -> Any:
        ids, targets = batch
        logits = model.apply({"params": params}, ids).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    return loss


def _compiled(case: Case, step: Any, state: Any, *rest: Any, passes: int = 2) -> Method:
    """Compiles `step(state, *rest) -> (state, loss)` and takes the first step."""
    import jax

    lowered = jax.jit(step, donate_argnums=0).lower(state, *rest)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    trained = state.adapters if hasattr(state, "adapters") else state[0]
    facts = {
        "flops": compiled.cost_analysis()["flops"],
        "useful_flops": case.useful_flops(passes),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "compile_s": seconds,
        "trained": sum(leaf.size for leaf in jax.tree.leaves(trained)),
    }
    held = [state]
    del state

    def take() -> float:
        held[0], loss = compiled(held[0], *rest)
        return float(jax.block_until_ready((held[0], loss))[1])

    return Method(take, {"initial_loss": take(), **facts})


def _batch(case: Case) -> tuple[Any, Any]:
    """Token ids and, one place on, their targets: (batch, time) each."""
    import numpy as np

    tokens = np.random.default_rng(1).integers(0, case.vocab_size, (case.batch, case.time + 1), dtype=np.int32)
    return tokens[:, :-1].copy(), tokens[:, 1:].copy()


def _flax(case: Case, *, scan: bool) -> tuple[Any, Any, Any]:
    """The Flax model, its random parameters made on the device, and the batch."""
    import jax

    from jlora.models.decoder import Decoder, DecoderConfig

    model = Decoder(
        DecoderConfig(
            vocab_size=case.vocab_size,
            hidden_size=case.hidden_size,
            intermediate_size=case.intermediate_size,
            num_layers=case.num_layers,
            num_heads=case.num_heads,
            dtype=case.dtype,
            param_dtype=case.dtype,
            scan=scan,
            remat=case.remat,
        )
    )
    batch = jax.device_put(_batch(case))
    return model, _random_params(model, batch[0]), batch


def _random_params(model: Any, ids: Any) -> Any:
    """The same numbers in the same layer, whether layers are stacked or not."""
    import jax
    import jax.numpy as jnp

    def draw(key: Any, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        if name.endswith("scale"):
            return jnp.ones(shape, dtype)
        spread = 1.0 if name.endswith("embedding") else shape[0] ** -0.5
        return jax.random.normal(key, shape, dtype) * jnp.asarray(spread, dtype)

    def leaf(path: Any, like: Any) -> Any:
        top, *rest = (part.key for part in path)
        number = re.fullmatch(r"layers_(\d+)", top)
        name = "/".join(["layers" if number else top, *rest])
        key = jax.random.fold_in(jax.random.key(0), zlib.crc32(name.encode()))
        if top == "layers":
            keys = jax.vmap(lambda n: jax.random.fold_in(key, n))(jnp.arange(like.shape[0]))
            return jax.vmap(lambda key: draw(key, name, like.shape[1:], like.dtype))(keys)
        return draw(jax.random.fold_in(key, int(number[1])) if number else key, name, like.shape, like.dtype)

    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    return jax.jit(lambda: jax.tree_util.tree_map_with_path(leaf, shapes))()


def _copy_weights(case: Case, model: Any) -> None:
    """Gives the torch model the weights every Flax method starts from."""
    import jax
    import numpy as np
    import torch
    from flax import traverse_util

    with jax.default_device(jax.devices("cpu")[0]):
        params = traverse_util.flatten_dict(_flax(case, scan=False)[1], sep=".")
    ours = {re.sub(r"layers_(\d+)", r"layers.\1", name): np.asarray(leaf) for name, leaf in params.items()}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            name = name.removeprefix("model.").removesuffix(".weight")
            found = [ours[f"{name}.{last}"] for last in ("kernel", "scale", "embedding") if f"{name}.{last}" in ours]
            (array,) = found
            weight.copy_(torch.from_numpy(array.T.copy() if f"{name}.kernel" in ours else array.copy()))


def matmul_peak(dtype: str) -> float:
    """Operations per second of a large square matmul here, the best of several."""
    import jax
    import jax.numpy as jnp

    n = 2048 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (n, n), dtype)
    times = 8 if jax.default_backend() == "cpu" else 32

    @jax.jit
    def chain(a: Any, b: Any) -> Any:
        return jax.lax.fori_loop(0, times, lambda _, b: (a @ b) * jnp.asarray(n**-0.5, dtype), b)

    chain(a, a).block_until_ready()
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        chain(a, a).block_until_ready()
        best = max(best, times * 2.0 * n**3 / (time.perf_counter() - start))
    return best
