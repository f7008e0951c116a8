"""LoRA fine-tuning for JAX and Flax as two pure functions on parameter trees and on the functions that read them."""

from jlora.core.adapt import adapt, infer_layout
from jlora.core.targets import Rule
from jlora.core.tree import (
    Summary,
    attach,
    extract,
    join,
    mask,
    merge,
    split,
    summary,
    unwrap,
    wrap,
)

__all__ = [
    "Rule",
    "Summary",
    "adapt",
    "attach",
    "extract",
    "infer_layout",
    "join",
    "mask",
    "merge",
    "split",
    "summary",
    "unwrap",
    "wrap",
]
