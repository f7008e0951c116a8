"""Folders of sentence-transformers: a transformer, a pooling of its states, and a classifier as a Dense module.

::

    modules.json                              the modules, in the order that they are applied
    1_Pooling/config.json                     the mean of the states, or the first token's
    2_Dense/config.json, model.safetensors    the classifier: its outputs are the logits

Source:
    https://github.com/huggingface/sentence-transformers, modules/pooling.py and modules/dense.py. The names of modules
    and keys are the older ones, as in the folder of all-MiniLM-L6-v2; release 6.2 reads them too.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jlora.errors import JloraValueError
from jlora.hf.folder import check_fields, find_inside, read_json, show_field

MODULES, POOLING, DENSE, TENSORS = "modules.json", "1_Pooling", "2_Dense", "model.safetensors"
# The two ways to pool that jlora computes, by the older key and by the newer value of "pooling_mode".
FLAGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
IDENTITY = "torch.nn.modules.linear.Identity"


class Classifier(NamedTuple):
    """A linear layer over pooled states."""

    kernel: Float[np.ndarray, "hidden labels"]
    bias: Float[np.ndarray, "labels"]


def write_modules(folder: Path, pooling: str, classifier: Classifier) -> None:
    """Writes all but the transformer, which stands in the folder itself.

    Args:
        folder: the model's.
        pooling: "mean" or "cls".
        classifier: becomes the Dense module.
    """
    width, labels = classifier.kernel.shape
    kinds = {"": "Transformer", POOLING: "Pooling", DENSE: "Dense"}
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (path, kind) in enumerate(kinds.items())
    ]
    flags = {flag: mode == pooling for flag, mode in FLAGS.items()}
    others = ("pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens")
    configs = {
        POOLING: {"word_embedding_dimension": width, **flags, **dict.fromkeys(others, False)},
        DENSE: {"in_features": width, "out_features": labels, "bias": True, "activation_function": IDENTITY},
    }
    for path, config in configs.items():
        (folder / path).mkdir()
        _write_json(folder / path / "config.json", config)
    tensors = {"linear.weight": np.ascontiguousarray(classifier.kernel.T), "linear.bias": classifier.bias}
    save_file(tensors, folder / DENSE / TENSORS, metadata={"format": "pt"})
    _write_json(folder / MODULES, modules)


def read_modules(folder: Path) -> list[tuple[str, str]]:
    """The class and the path of each module of a folder, in their order.

    Raises:
        ValueError: modules.json is damaged, or names a path outside of the folder.
    """
    file = folder / MODULES
    modules = []
    for n, module in enumerate(read_json(file, list)):
        kind, path = (module.get("type"), module.get("path")) if isinstance(module, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(path, str) or find_inside(folder, path) is None:
            check_fields(file, [f"{show_field(f'module {n}', module)}  expected: a type, and a path inside the folder"])
        modules.append((str(kind).rpartition(".")[2], str(path)))
    return modules


def pooling_modes(config: Mapping[str, Any]) -> list[str]:
    """How a Pooling module pools, by its config: "mean" and "cls", others by their names there."""
    mode = config.get("pooling_mode")
    if mode is not None:
        return [mode] if isinstance(mode, str) else list(map(str, mode))
    chosen = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    return [FLAGS.get(name, name) for name in chosen]


def read_classifier(folder: Path) -> Classifier | None:
    """The classifier of a folder that `write_modules` wrote, None where the modules are others.

    Raises:
        ValueError: a file of it is damaged or missing.
    """
    path = find_classifier(folder)
    if path is None:
        return None
    try:
        tensors = load_file(path / TENSORS)
        return Classifier(tensors["linear.weight"].T, tensors["linear.bias"])
    except (OSError, SafetensorError, KeyError) as error:
        problem = f"{str(path / TENSORS)!r} is missing or damaged."
        raise JloraValueError("load_peft", problem, [str(error)], "write or fetch the folder again.") from error


def find_classifier(folder: Path) -> Path | None:
    """The folder of the Dense module that is a classifier of pooled states, None where there is none.

    A Dense module with an activation, or with others after it, makes embeddings and is no classifier.

    Raises:
        ValueError: a JSON file is damaged or missing.
    """
    if not (folder / MODULES).is_file():
        return None
    modules = read_modules(folder)
    if [kind for kind, _ in modules] != ["Transformer", "Pooling", "Dense"]:
        return None
    path = folder / modules[2][1]
    config = read_json(path / "config.json")
    linear = config.get("activation_function") == IDENTITY and config.get("bias") and not config.get("use_residual")
    return path if linear else None


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
