"""The registry of model families by Hugging Face's `model_type`, and the map between tensors and parameters.

Flax modules are named as in the checkpoint, so one rule gives every tensor's name; only what differs between families
(a prefix, older spellings, tensors that are not read) is part of a `Family`.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict

from jlora.errors import JloraValueError
from jlora.models import bert, decoder, gpt2
from jlora.models.family import Family

# Each file of a model names its families; a new file is one more entry here.
FAMILIES: dict[str, Family] = decoder.FAMILIES | gpt2.FAMILIES | bert.FAMILIES
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def family_of(model: nn.Module) -> Family:
    """The family of one of jlora's models: that of its checkpoint, or the first that its module computes.

    Raises:
        ValueError: another model.
    """
    origin = getattr(model, "origin", None)
    own = FAMILIES.get(json.loads(origin.config).get("model_type")) if origin else None
    if own is not None and isinstance(model, own.module):
        return own
    for family in FAMILIES.values():
        if isinstance(model, family.module):
            return family
    known = sorted({family.module.__name__ for family in FAMILIES.values()})
    problem = f"{type(model).__name__} is none of jlora's models."
    raise JloraValueError("jlora", problem, known, "take one of these models, or say how its modules are named.")


class Weight(NamedTuple):
    """One parameter on both sides: its path and shape in the tree, its tensors in the file.

    Args:
        path: `layers_0/self_attn/q_proj/kernel`, or `layers/self_attn/q_proj/kernel` where layers are stacked.
        shape: of the parameter.
        tensors: their names, one a layer where layers are stacked, else one.
        transpose: the tensor is stored (out, in), the parameter (in, out).
        stacked: axis 0 counts the layers.
    """

    path: str
    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    transpose: bool
    stacked: bool

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each tensor."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transpose else shape

    def read(self, tensor: Callable[[str], np.ndarray], dtype: np.dtype) -> np.ndarray:
        """The parameter of its tensors, one of them in memory beside it at a time."""
        array = np.empty(self.shape, dtype)
        for part, name in zip(array if self.stacked else [array], self.tensors, strict=True):
            value = tensor(name)
            part[...] = value.T if self.transpose else value
        return array


def weights(family: Family, params: Mapping[str, Any]) -> list[Weight]:
    """The weight map of a model, for reading and for writing.

        pooler/dense/kernel (in, out)                <->  bert.pooler.dense.weight (out, in)
        layers/mlp/up_proj/kernel (layers, in, out)  <->  model.layers.0.mlp.up_proj.weight (out, in), ...

    Args:
        family: the rules.
        params: the model's parameters, or their abstract form.
    """
    table = []
    for path, leaf in flatten_dict(params, sep="/").items():
        *modules, kind = path.split("/")
        prefix = "" if modules[0] in family.head_modules else family.prefix
        stacked = family.stack in modules
        template = prefix + ".".join([*(spell_module(family, name) for name in modules), LEAVES[kind]])
        names = tuple(template.format(i) for i in range(leaf.shape[0])) if stacked else (template,)
        transpose = kind == "kernel" and (family.transpose or modules[0] in family.head_modules)
        table.append(Weight(path, leaf.shape, names, transpose, stacked))
    return table


def spell_module(family: Family, name: str) -> str:
    """A module's name in the checkpoint: `layers_3` is `layers.3`, `layers` is every one of them."""
    return f"{name}.{{}}" if name == family.stack else re.sub(rf"^{family.stack}_(\d+)$", rf"{family.stack}.\1", name)
