"""LoRA fine-tuning for JAX and Flax as two pure functions on parameter trees and on the functions that read them."""

from jlora.core.spectrum import Spectrum, allocate, gradient_norms, resize, spectrum
from jlora.core.targets import Rule
from jlora.core.tree import Summary, attach, extract, join, mask, merge, split, summary, unwrap, wrap
from jlora.interop.huggingface import LoadedModel, load_model, save_model
from jlora.interop.modules import PeftModule
from jlora.interop.peft import load_peft, save_peft
from jlora.recipes.advise import Advice, advise
from jlora.recipes.generate import generate, stream
from jlora.recipes.plan import Plan, plan
from jlora.recipes.sweep import SweepResult, sweep
from jlora.training.checkpoint import restore_adapter, save_adapter
from jlora.training.losses import cross_entropy
from jlora.training.optimizer import optimizer
from jlora.training.step import TrainState, make_train_step
from jlora.transform.adapt import adapt
from jlora.transform.infer import infer_layout
from jlora.transform.registry import register_rule

__version__ = "0.1.0"

__all__ = [
    "Advice",
    "LoadedModel",
    "PeftModule",
    "Plan",
    "Rule",
    "Spectrum",
    "Summary",
    "SweepResult",
    "TrainState",
    "__version__",
    "adapt",
    "advise",
    "allocate",
    "attach",
    "cross_entropy",
    "extract",
    "generate",
    "gradient_norms",
    "infer_layout",
    "join",
    "load_model",
    "load_peft",
    "make_train_step",
    "mask",
    "merge",
    "optimizer",
    "plan",
    "register_rule",
    "resize",
    "restore_adapter",
    "save_adapter",
    "save_model",
    "save_peft",
    "spectrum",
    "split",
    "stream",
    "summary",
    "sweep",
    "unwrap",
    "wrap",
]
