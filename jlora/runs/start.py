"""Where a run's training begins: at a new adapter, or at one that was trained before."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora.errors import JloraValueError, count
from jlora.hf.load import LoadedModel
from jlora.hf.peft import load_peft
from jlora.hf.tokenizer import use_tokenizer
from jlora.runs.config import Config
from jlora.runs.folder import ADAPTER, LABELS, TOKENIZER, read_labels, wrap_base
from jlora.runs.inspection import changed, find_kind
from jlora.training.checkpoint import restore_adapter
from jlora.tree.layouts import SCALING, A
from jlora.tree.paths import Tree, TreePath, flatten
from jlora.tree.splitting import split


def choose_tokenizer(config: Config, loaded: LoadedModel, *, resume: bool) -> LoadedModel:
    """The base with the tokenizer that the run trains with.

    A resumed run keeps the one in its folder, whatever the base's is now. A new run takes that of the adapter it
    starts from, or else the base's.

    Args:
        config: the job.
        loaded: the base.
        resume: whether the run was begun before.

    Raises:
        ValueError: the tokenizer is damaged.
    """
    if resume:
        return use_tokenizer(loaded, config.output.folder / TOKENIZER)
    folder = config.adapter.from_
    return loaded if folder is None else use_tokenizer(use_tokenizer(loaded, folder), folder / TOKENIZER)


def start_adapter(config: Config, loaded: LoadedModel, trained: tuple[str, ...], labels: tuple[str, ...]) -> Tree:
    """The base's parameters with the adapter that training starts from.

    Args:
        config: the job; `adapter.from` names the folder of an adapter, a new one is drawn without it.
        loaded: the base.
        trained: leaves that the task trains in full.
        labels: the task's labels, in the order of the logits.

    Raises:
        ValueError: the adapter does not fit the base, or its ranks, scalings or targets are not the config's.
        FileNotFoundError: the folder holds no adapter.
    """
    new = wrap_base(config, loaded)
    folder = config.adapter.from_
    if folder is None:
        return new
    params = _load(folder, loaded, labels)
    offenders = _misfits(flatten(new), flatten(params))
    if offenders:
        problem = f"the adapter in {folder} is not the one that the config describes."
        fix = f"set adapter.rank, alpha, rslora and targets as they are there: jlora inspect {folder} shows them."
        raise JloraValueError("train", problem, offenders[:20], fix)
    frozen = flatten(split(params, trained)[1])
    lost = [path for path in changed(loaded.params, params) if path in frozen]
    if lost:
        problem = f"{count(len(lost), 'leaf', 'leaves')} in {folder} would not be trained on, nor saved."
        fix = "merge the adapter first (jlora merge), and train a new one on the merged model."
        raise JloraValueError("train", problem, lost[:20], fix)
    return params


def _load(folder: Path, loaded: LoadedModel, labels: tuple[str, ...]) -> Tree:
    kind = find_kind(folder)
    if kind == "PEFT":
        return load_peft(folder, loaded.model, loaded.params)
    if kind == "run" and (folder / LABELS).is_file():
        earlier, _ = read_labels(folder / LABELS)
        if earlier != labels:
            offenders = [f"there: {', '.join(earlier) or 'none'}", f"in the data: {', '.join(labels) or 'none'}"]
            problem = f"the labels of {folder} are not those of the data."
            raise JloraValueError("train", problem, offenders, "use data with the same labels.")
    return restore_adapter(folder / ADAPTER if kind == "run" else folder, loaded.params, model=loaded.model)


def _misfits(new: Mapping[TreePath, Any], found: Mapping[TreePath, Any]) -> list[str]:
    """Where the adapters of two wrapped trees differ in place, rank or scaling."""
    offenders = []
    kernels = {path.removesuffix(A) for leaves in (new, found) for path in leaves if path.endswith(A)}
    for kernel in sorted(kernels):
        if kernel + A not in new:
            offenders.append(f"{kernel!r} has an adapter there, and none by the config")
        elif kernel + A not in found:
            offenders.append(f"{kernel!r} has no adapter there, and one by the config")
        else:
            ranks = [np.shape(leaves[kernel + A])[-1] for leaves in (found, new)]
            scalings = [np.asarray(leaves[kernel + SCALING], np.float64) for leaves in (found, new)]
            if ranks[0] != ranks[1]:
                offenders.append(f"{kernel!r} has rank {ranks[0]} there, and {ranks[1]} by the config")
            elif not np.allclose(scalings[0], scalings[1], rtol=1e-2):
                shown = [np.format_float_positional(scaling.max(), 4, trim="-") for scaling in scalings]
                offenders.append(f"{kernel!r} has scaling {shown[0]} there, and {shown[1]} by the config")
    return offenders
