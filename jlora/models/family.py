"""A model family: the description of one kind of Hugging Face checkpoint, in addition to its Flax module.

To add a family, add one file to this folder with the module, its config and its `FAMILIES`, and an entry in
`jlora/hf/families.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
from jax.typing import DTypeLike

from jlora.models.layers import Origin

LABELLED = ("classification", "token_classification")
# Heads that use the table of word embeddings as their kernel if the config ties them.
VOCABULARY = ("causal_lm", "masked_lm")


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of checkpoint.

    Args:
        module: class of the Flax model, which is created from `config.from_hf(...)`.
        config: class of the config.
        prefix: prefix of the names of the body's tensors, which the heads' tensors don't have.
        stack: name of the list of layers.
        heads: the architecture of each head, as in the config.json of its checkpoints.
        default: the head of a checkpoint with any other architecture; None for hidden states.
        bare: the architecture without a head; None if the model always has a head.
        head_modules: the first component of every head's tensors; the tensors of a head that is not requested are not
            read.
        transpose: kernels are stored (out, in), as torch's Linear does, and not (in, out).
        spellings: (regex, replacement) pairs that convert the names of older checkpoints to the current ones.
        unread: regexes of tensors that may be in the file although the model does not read them.
        unread_modules: modules of the bare form that no output depends on. A tree has them if they have an adapter.
        copies: tensors that are equal to another one if the config ties them, with the name of the other one.
        vocabulary: the parameters with one row or column per token, each with the axis of the tokens.
        pooled: sequence classification reads pooled states, and the pooling can be chosen.
    """

    module: type[nn.Module]
    config: Any
    prefix: str
    stack: str
    heads: Mapping[str, str]
    default: str | None
    bare: str | None
    head_modules: tuple[str, ...]
    transpose: bool = True
    spellings: tuple[tuple[str, str], ...] = ()
    unread: tuple[str, ...] = ()
    unread_modules: tuple[str, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    vocabulary: Mapping[str, int] = field(default_factory=dict)
    pooled: bool = False

    def build(
        self,
        config: Any,
        *,
        head: str | None,
        pooling: str,
        dtype: DTypeLike,
        origin: Origin | None,
        scan: bool = False,
        remat: bool = False,
    ) -> nn.Module:
        """Creates the model of transformers' config, with one of the family's heads.

        Args:
            config: transformers' config, with the number of labels.
            head: one of `heads`, or None if the family has a `bare` form.
            pooling: pooling for sequence classification, if the family is `pooled`.
            dtype: dtype of the computation.
            origin: the checkpoint of the model.
            scan: compile one body for all layers.
            remat: recompute each layer in the backward pass.
        """
        labels = config.num_labels
        if self.pooled:
            shape = self.config.from_hf(config, scan=scan, remat=remat)
            return self.module(shape, head=head, pooling=pooling, num_labels=labels, dtype=dtype, origin=origin)
        shape = self.config.from_hf(config, dtype=dtype, scan=scan, remat=remat)
        pad = config.pad_token_id
        return self.module(shape, origin=origin, head_type=head, num_labels=labels, pad_token_id=pad)

    def tied(self, head: str | None) -> Mapping[str, str]:
        """The copies that a model with this head has if its config ties them."""
        return self.copies if head in VOCABULARY else {}
