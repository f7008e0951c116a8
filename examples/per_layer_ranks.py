"""Ranks by layer, dropout on the adapters' input, a saved adapter, and a second one swapped in over the same base."""

import tempfile

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import jlora


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        for n in range(3):
            x = x + nn.MultiHeadDotProductAttention(num_heads=2, name=f"attention_{n}")(x)
            x = x + nn.Dense(32, name=f"out_{n}")(nn.relu(nn.Dense(64, name=f"in_{n}")(x)))
        return x.mean(axis=1)


model = Encoder()
x = jax.random.normal(jax.random.key(0), (32, 10, 32))
base_params = model.init(jax.random.key(1), x)["params"]

# The first pattern that matches a kernel's path decides; a kernel that none matches stays frozen without an adapter.
ranks = {
    r"attention_0/(query|value)/kernel": 2,
    r"attention_2/(query|value)/kernel": jlora.Rule(rank=16, alpha=32),
    ("query", "value"): 8,
    r"in_\d/kernel": 4,
}
params = jlora.wrap(base_params, targets=ranks)
print(jlora.summary(params))

forward = jlora.adapt(model.apply, dropout=0.05)


def train(params, target):
    def loss_fn(params, batch, key):
        return jnp.mean((forward({"params": params}, batch, lora_key=key) - target) ** 2)

    tx = optax.adamw(3e-3)
    adapters, base = jlora.split(params)
    state = jlora.TrainState.create(adapters, tx, jax.random.key(2))
    step = jlora.make_train_step(loss_fn, tx, clip=1.0)
    for _ in range(100):
        state, metrics = step(state, base, x)
    print(f"loss {metrics['loss']:.3f}")
    return jlora.join(state.adapters, base)


first = train(params, jnp.tanh(x.mean(axis=1)))
second = train(params, jnp.sin(x.max(axis=1)))

with tempfile.TemporaryDirectory() as folder:
    jlora.save_adapter(folder, first)
    restored = jlora.restore_adapter(folder, base_params)

# Adapters of one shape swap without a new trace: the base is the same, only the small leaves change.
serve = jax.jit(lambda params: forward({"params": params}, x))
for params in (restored, jlora.attach(jlora.extract(second), base_params)):
    print(f"mean output {serve(params).mean():+.4f}")
assert (serve(restored) == serve(first)).all()
assert serve._cache_size() == 1
