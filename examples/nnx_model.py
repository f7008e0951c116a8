"""LoRA on an nnx model: split the module into graph and state, wrap the state, adapt the function that merges them."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jlora


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(16, 64, rngs=rngs)
        self.outer = nnx.Linear(64, 16, rngs=rngs)

    def __call__(self, x):
        return self.outer(nnx.relu(self.inner(x)))


graph, params = nnx.split(MLP(nnx.Rngs(0)))
x = jax.random.normal(jax.random.key(0), (128, 16))
y = jnp.roll(x, 1, axis=-1)

params = jlora.wrap(params, rank=8)
print(jlora.summary(params))
forward = jlora.adapt(lambda params, x: nnx.merge(graph, params)(x))


def loss_fn(params, batch, key):
    x, y = batch
    return jnp.mean((forward(params, x) - y) ** 2)


tx = optax.adam(5e-3)
adapters, base = jlora.split(params)
state = jlora.TrainState.create(adapters, tx, jax.random.key(1))
step = jlora.make_train_step(loss_fn, tx)
for number in range(1, 201):
    state, metrics = step(state, base, (x, y))
    if number in (1, 200):
        print(f"step {number:3d}  loss {metrics['loss']:.3f}")

model = nnx.merge(graph, jlora.merge(jlora.join(state.adapters, base)))  # a plain module again
print(f"loss of the merged module {jnp.mean((model(x) - y) ** 2):.3f}")
