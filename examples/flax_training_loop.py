"""LoRA in a training loop that is there already: flax's TrainState over the whole tree, with two lines changed.

`jlora.optimizer` freezes everything but the adapters, so the optimizer holds no moments for the base, and XLA drops
the base's gradients; `jlora.adapt` makes the model's own apply read the adapters.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

import jlora


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(128)(x))
        x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(4, name="head")(x)


@jax.jit
def train_step(state, x, y):
    def loss_fn(params):
        logits = state.apply_fn({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


x = jax.random.normal(jax.random.key(0), (256, 32))
y = jnp.argmax(x[:, :4] * x[:, 4:8], axis=-1)
model = Classifier()
base = model.init(jax.random.key(1), x)["params"]

params = jlora.wrap(base, rank=4, targets=["Dense_0", "Dense_1"])
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
state = TrainState.create(
    apply_fn=jlora.adapt(model.apply), params=params, tx=jlora.optimizer(tx, params, train=["head"])
)
print(jlora.summary(params, train=["head"]))

for number in range(1, 201):
    state, loss = train_step(state, x, y)
    if number in (1, 200):
        print(f"step {number:3d}  loss {loss:.3f}")

for name in ("Dense_0", "Dense_1"):
    assert (state.params[name]["kernel"] == base[name]["kernel"]).all(), "the base stays bit for bit as it was"
predicted = model.apply({"params": jlora.merge(state.params)}, x).argmax(-1)
print(f"accuracy of the merged model {jnp.mean(predicted == y):.3f}")
