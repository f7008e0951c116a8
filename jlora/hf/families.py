"""What tells one `model_type` of Hugging Face from another, and the map between their tensors and our parameters.

Flax modules are named as in the checkpoint, so one rule gives every tensor's name; only what differs between families
(a prefix, older spellings, tensors that go unread) stands in `FAMILIES`.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict
from jax.typing import DTypeLike

from jlora.errors import JloraValueError
from jlora.models.bert import Bert, BertConfig
from jlora.models.decoder import Decoder, DecoderConfig
from jlora.models.gpt2 import Gpt2, Gpt2Config
from jlora.models.layers import Origin

LABELLED = ("classification", "token_classification")
# Heads that multiply by the table of words where the config ties them.
VOCABULARY = ("causal_lm", "masked_lm")
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


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


def decoder(name: str, *, classifier: str | None = None, tokens: bool = True) -> Family:
    """A family that differs from its kin in the config alone.

    Args:
        name: of its architectures, as in "LlamaForCausalLM".
        classifier: the architecture that classifies texts, where it is not named as the others.
        tokens: transformers has one that classifies tokens.
    """
    heads = {
        "causal_lm": f"{name}ForCausalLM",
        "classification": classifier or f"{name}ForSequenceClassification",
    }
    return Family(
        module=Decoder,
        config=DecoderConfig,
        prefix="model.",
        stack="layers",
        heads=heads | ({"token_classification": f"{name}ForTokenClassification"} if tokens else {}),
        default="causal_lm",
        bare=None,
        head_modules=("lm_head", "score"),
        # A bare model is saved without the prefix.
        spellings=((r"^(embed_tokens|layers|norm)\.", r"model.\1."),),
        # Frequencies that older versions saved; they follow from the config.
        unread=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
        copies={"lm_head.weight": "model.embed_tokens.weight"},
        vocabulary={"embed_tokens/embedding": 0, "lm_head/kernel": 1},
    )


FAMILIES = {
    "llama": decoder("Llama"),
    "mistral": decoder("Mistral"),
    "qwen2": decoder("Qwen2"),
    "qwen3": decoder("Qwen3"),
    "gemma": decoder("Gemma"),
    "gemma2": decoder("Gemma2"),
    "gemma3_text": decoder("Gemma3", classifier="Gemma3TextForSequenceClassification", tokens=False),
    "gpt2": Family(
        module=Gpt2,
        config=Gpt2Config,
        prefix="transformer.",
        stack="h",
        heads={
            "causal_lm": "GPT2LMHeadModel",
            "classification": "GPT2ForSequenceClassification",
            "token_classification": "GPT2ForTokenClassification",
        },
        default="causal_lm",
        bare=None,
        head_modules=("lm_head", "score", "classifier"),
        # Conv1D stores (in, out).
        transpose=False,
        spellings=((r"^(wte|wpe|h|ln_f)\.", r"transformer.\1."),),
        # Causal masks that older versions saved.
        unread=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
        copies={"lm_head.weight": "transformer.wte.weight"},
        vocabulary={"wte/embedding": 0, "lm_head/kernel": 1},
    ),
    "bert": Family(
        module=Bert,
        config=BertConfig,
        prefix="bert.",
        stack="layer",
        heads={
            "classification": "BertForSequenceClassification",
            "token_classification": "BertForTokenClassification",
            "masked_lm": "BertForMaskedLM",
        },
        default=None,
        bare="BertModel",
        head_modules=("classifier", "cls", "qa_outputs"),
        spellings=(
            (r"^(embeddings|encoder|pooler)\.", r"bert.\1."),
            # The names of TensorFlow's LayerNorm, in checkpoints converted from the original release.
            (r"LayerNorm\.gamma$", "LayerNorm.weight"),
            (r"LayerNorm\.beta$", "LayerNorm.bias"),
        ),
        unread=(
            # Buffers of constants (0, 1, 2, ... and zeros) that older versions saved.
            r"bert\.embeddings\.(position|token_type)_ids",
            # Belongs to the body in the file, but only classification from the pooler reads it.
            r"bert\.pooler\.dense\.(weight|bias)",
            # The next-sentence head of the original release.
            r"cls\.seq_relationship\.(weight|bias)",
            # An untied head has another bias beside its decoder's, and adds that one only.
            r"cls\.predictions\.bias",
        ),
        unread_modules=("pooler",),
        copies={
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
        vocabulary={
            "embeddings/word_embeddings/embedding": 0,
            "cls/predictions/bias": 0,
            "cls/predictions/decoder/kernel": 1,
            "cls/predictions/decoder/bias": 0,
        },
        pooled=True,
    ),
}


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
