"""LoRA fine-tuning for JAX and Flax as two pure functions: one on parameter trees, one on the functions that read them.

`import jlora` imports nothing beyond the standard library; every public name is imported at its first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jlora.adapters.allocate import allocate, gradient_norms
    from jlora.adapters.resize import resize
    from jlora.adapters.spectrum import Spectrum, spectrum
    from jlora.errors import JloraError
    from jlora.hf.load import LoadedModel, load_model, save_model
    from jlora.hf.modules import PeftModule
    from jlora.hf.peft import load_peft, save_peft
    from jlora.models.generate import generate, stream
    from jlora.runs.advise import Advice, advise
    from jlora.runs.folder import load_run
    from jlora.runs.plan import Plan, plan
    from jlora.runs.sweep import SweepResult, sweep
    from jlora.runs.train import train
    from jlora.training.checkpoint import restore_adapter, save_adapter
    from jlora.training.losses import cross_entropy
    from jlora.training.optimizer import optimizer
    from jlora.training.step import TrainState, make_train_step
    from jlora.transform.adapt import adapt
    from jlora.transform.infer import infer_layout
    from jlora.transform.registry import register_rule
    from jlora.tree.splitting import attach, extract, join, mask, split
    from jlora.tree.summary import Summary, summary
    from jlora.tree.targets import Rule
    from jlora.tree.wrapping import merge, unwrap, wrap

__version__ = "0.1.0"

# Where each public name is defined.
HOMES = {
    "Advice": "runs.advise",
    "JloraError": "errors",
    "LoadedModel": "hf.load",
    "PeftModule": "hf.modules",
    "Plan": "runs.plan",
    "Rule": "tree.targets",
    "Spectrum": "adapters.spectrum",
    "Summary": "tree.summary",
    "SweepResult": "runs.sweep",
    "TrainState": "training.step",
    "adapt": "transform.adapt",
    "advise": "runs.advise",
    "allocate": "adapters.allocate",
    "attach": "tree.splitting",
    "cross_entropy": "training.losses",
    "extract": "tree.splitting",
    "generate": "models.generate",
    "gradient_norms": "adapters.allocate",
    "infer_layout": "transform.infer",
    "join": "tree.splitting",
    "load_model": "hf.load",
    "load_peft": "hf.peft",
    "load_run": "runs.folder",
    "make_train_step": "training.step",
    "mask": "tree.splitting",
    "merge": "tree.wrapping",
    "optimizer": "training.optimizer",
    "plan": "runs.plan",
    "register_rule": "transform.registry",
    "resize": "adapters.resize",
    "restore_adapter": "training.checkpoint",
    "save_adapter": "training.checkpoint",
    "save_model": "hf.load",
    "save_peft": "hf.peft",
    "spectrum": "adapters.spectrum",
    "split": "tree.splitting",
    "stream": "models.generate",
    "summary": "tree.summary",
    "sweep": "runs.sweep",
    "train": "runs.train",
    "unwrap": "tree.wrapping",
    "wrap": "tree.wrapping",
}
__all__ = sorted(HOMES)


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'jlora' has no attribute {name!r}")
    # Not at the top: `import jlora` imports no other module.
    from jlora.errors import JloraImportError

    try:
        value = getattr(importlib.import_module(f"jlora.{HOMES[name]}"), name)
    except JloraImportError as error:
        raise JloraImportError(f"jlora.{name}", error.problem, error.offenders, error.fix) from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES})
