"""A Flax MLP fine-tuned with LoRA: wrap the tree, adapt the function, train what splits off, merge."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import jlora

model = nn.Sequential([nn.Dense(256), nn.relu, nn.Dense(1)])
x = jax.random.normal(jax.random.key(0), (512, 64))
y = jnp.sin(x.sum(-1, keepdims=True))
params = model.init(jax.random.key(1), x)["params"]

params = jlora.wrap(params, rank=8, targets={".*layers_0/kernel": 8, ".*layers_2/kernel": 1})
print(jlora.summary(params))
forward = jlora.adapt(model.apply)


def loss_fn(params, batch, key):
    x, y = batch
    return jnp.mean((forward({"params": params}, x) - y) ** 2)


tx = optax.adam(1e-2)
adapters, base = jlora.split(params)
state = jlora.TrainState.create(adapters, tx, jax.random.key(2))
step = jlora.make_train_step(loss_fn, tx)
for _ in range(100):
    state, metrics = step(state, base, (x, y))
print(f"loss {metrics['loss']:.4f}")

merged = jlora.merge(jlora.join(state.adapters, base))  # the tree the model had before: free at inference
print(f"loss merged {jnp.mean((model.apply({'params': merged}, x) - y) ** 2):.4f}")
