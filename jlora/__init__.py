"""LoRA fine-tuning for JAX and Flax as two pure functions on parameter trees and on the functions that read them."""

from jlora.core.adapt import adapt, infer_layout
from jlora.core.targets import Rule
from jlora.core.tree import Summary, attach, extract, join, mask, merge, split, summary, unwrap, wrap
from jlora.interop.huggingface import LoadedModel, load_model
from jlora.training.checkpoint import restore_adapter, save_adapter
from jlora.training.losses import cross_entropy
from jlora.training.optimizer import optimizer
from jlora.training.step import TrainState, make_train_step

__all__ = [
    "LoadedModel",
    "Rule",
    "Summary",
    "TrainState",
    "adapt",
    "attach",
    "cross_entropy",
    "extract",
    "infer_layout",
    "join",
    "load_model",
    "make_train_step",
    "mask",
    "merge",
    "optimizer",
    "restore_adapter",
    "save_adapter",
    "split",
    "summary",
    "unwrap",
    "wrap",
]
