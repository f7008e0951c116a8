"""A model family: all that jlora has to know of one kind of Hugging Face checkpoint, beside its Flax module.

Adding a family is one file in this folder, which holds the module, its config and its `FAMILIES`, and an entry in
`jlora/hf/families.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
from jax.typing import DTypeLike

from jlora.models.layers import Origin

LABELLED = ("classification", "token_classification")
# Heads that multiply by the table of words where the config ties them.
VOCABULARY = ("causal_lm", "masked_lm")


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of checkpoint.

    Args:
        module: the Flax model; it is made from `config.from_hf(...)`.
        config: its config.
        prefix: what stands before the names of the body's tensors, and not before the heads'.
        stack: the name of the layers' list.
        heads: each head with the architecture whose checkpoints carry it.
        default: the head of a checkpoint whose architecture is not among them; None for hidden states.
        bare: the architecture without a head; None where the model always has one.
        head_modules: the first component of every head's tensors; a head not asked for is left in the file.
        transpose: kernels are stored (out, in), as torch's Linear does, and not (in, out).
        spellings: (regex, replacement) pairs that turn an older checkpoint's names into today's.
        unread: regexes of tensors that may stand in the file though the model does not read them.
        unread_modules: modules of the bare form that no output reads. A tree holds them where an adapter is on them.
        copies: tensors that repeat another where the config ties them, with the one they repeat.
        vocabulary: the parameters with one row or column per token, each with the axis of the tokens.
        pooled: its classifier of texts reads pooled states, and the pooling can be chosen.
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
        """The model of transformers' config, with one of the family's heads.

        Args:
            config: transformers' config; it says how many labels there are.
            head: one of `heads`, or None where the family has a `bare` form.
            pooling: what a classifier of texts reads, where the family is `pooled`.
            dtype: what the model computes in.
            origin: the checkpoint it comes from.
            scan: one compiled body for all layers.
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
        """The copies that a model with this head has where its config ties them."""
        return self.copies if head in VOCABULARY else {}
