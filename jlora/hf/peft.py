"""PEFT adapter folders, written and read without torch: `adapter_model.safetensors` and `adapter_config.json`.

Source:
    https://github.com/huggingface/peft, src/peft/tuners/lora (layer.py, model.py), utils/other.py.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Float

from jlora.errors import JloraValueError
from jlora.hf import sentence_transformers
from jlora.hf.changes import changed_leaves, readers
from jlora.hf.families import FAMILIES, family_of
from jlora.hf.files import staged
from jlora.hf.load import stored_leaves, unread_weights
from jlora.hf.modules import (
    PLAIN,
    Names,
    Slot,
    Table,
    columns,
    fold,
    fold_pair,
    make_table,
    module_of,
    pair_shapes,
    rows,
    unfold,
    unfold_pair,
    whole_tensor,
)
from jlora.hf.patterns import PatternMatcher
from jlora.hf.peft_files import CONFIG, misfit_fields, read_config_file, read_tensors, write_files
from jlora.models.layers import check_choice
from jlora.training.checkpoint import place
from jlora.tree import layouts
from jlora.tree.layouts import AFFIXES, Layout
from jlora.tree.paths import Tree, TreePath, box, edit, flatten, join_path, partition, unbox, union
from jlora.tree.targets import Pattern, select_paths
from jlora.tree.wrapping import is_adapter_leaf, is_wrapped, merge, read_layouts

PREFIX = "base_model.model."
TARGETS = ("peft", "vllm")
TASKS = {
    "classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "masked_lm": None,
    "causal_lm": "CAUSAL_LM",
    None: "FEATURE_EXTRACTION",
}
# PEFT trains modules of these names in full for these tasks, asked or not, and fails without their tensors.
LABELLED, CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS"), ("classifier", "score")
# The way from another pooling to PEFT.
POOLER_FIX = (
    "load and train the model with pooling='pooler' (in a config, model.pooling = \"pooler\"), the form that PEFT has; "
    "jlora merge and jlora export write other poolings for sentence-transformers."
)
# PEFT ties the adapters of modules with these names, and of no others.
TIED_NAMES = ("embed_tokens", "lm_head")
# What changes the result and is not computed here.
VARIANTS = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "monteclora_config"),
    *("target_parameters", "use_bdlora", "use_dora", "use_qalora"),
)
# Initializations that take something out of the base's own weights, and those of them that PEFT turns into plain LoRA.
CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
CONVERTIBLE = ("pissa", "olora", "corda", "lora_ga")
# How the models call the tables and heads that have a row for each token.
VOCABULARIES = {name.split(".")[-2] for family in FAMILIES.values() for pair in family.copies.items() for name in pair}
# Keys may hold the adapter's name: lora_A.default.weight.
FACTOR = re.compile(r"(?P<module>.+)\.lora_((?P<linear>[AB])(\.[^.]+)?\.weight|embedding_(?P<table>[AB])(\.[^.]+)?)")
# What a module's own tensors may be named by besides.
INFIX = re.compile(r"\.(token_adapter|base_layer)(?=\.)")
# The adapter's name may follow, or what a module holds.
SAVED, SAVED_AS = re.compile(r"\.modules_to_save(?=\.)"), re.compile(r"\.modules_to_save(\.[^.]+)?(?=\.)")
ORIGINAL = re.compile(r"\.(original_module|trainable_tokens_original)(\.|$)")
TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(\.[^.]+)?")
# What stands before or within the names of a model that was compiled, sharded, or part of a larger one.
WRAPPERS = re.compile(r"(?:^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|language_model)\.")


class Adapter(NamedTuple):
    """One module's pair."""

    a: Float[np.ndarray, "fan_in rank"]
    b: Float[np.ndarray, "rank fan_out"]
    scaling: np.floating

    @property
    def rank(self) -> int:
        return self.a.shape[1]


class Trained(NamedTuple):
    """How the leaves trained in full are written.

    Args:
        modules: PEFT's modules_to_save.
        bases: adapted modules whose own weight is written as `base_layer`.
        bias: PEFT's option: the biases of no modules ("none"), of the adapted ones ("lora_only") or of "all".
    """

    modules: list[str]
    bases: list[str]
    bias: str


class Pair(NamedTuple):
    """The tensors of one module's adapter, by `lora_A` and so on; `written` is the module's name in the file."""

    written: str
    factors: dict[str, np.ndarray]


class Contents(NamedTuple):
    """The tensors of a file, by what they are.

    Args:
        pairs: adapters by module.
        plain: tensors in full by name.
        tokens: rows that replace those of a table, by module.
        offenders: what can't be any of them.
    """

    pairs: dict[str, Pair]
    plain: dict[str, np.ndarray]
    tokens: dict[str, np.ndarray]
    offenders: list[str]


def save_peft(
    folder: str | os.PathLike[str],
    model: nn.Module | None,
    params: Tree,
    *,
    target: str = "peft",
    train: Pattern | None = None,
    base: Tree | None = None,
    names: Names | None = None,
    layout: Mapping[str, Layout] | None = None,
    base_model: str | None = None,
    dropout: float = 0.0,
    task_type: str | None = "auto",
) -> None:
    """Writes the adapters of a wrapped tree as a PEFT folder.

    `PeftModel.from_pretrained(base, folder)` then computes what the wrapped tree computes. Each module gets its own
    rank and alpha (`rank_pattern`, `alpha_pattern`), so that alpha / rank is the tree's scaling exactly, whatever
    formula it was made by. Stacked layers become one entry a layer, and zeros that pad a rank are left out. A model's
    classifier goes along in full, as PEFT expects it to for its task. A table that is the output head too becomes two
    entries, one of them transposed; to merge those take `save_model`, as PEFT would add both to the one table.

    PEFT has no classifier with the pooling "mean" or "cls". Its adapter is one of the body, with the pooling and the
    classifier beside it as modules of sentence-transformers, which opens the folder and gives the logits. The form that
    PEFT opens alone is that of a model loaded, or trained, with the pooling "pooler".

    A tree of your own says by `names` which torch module holds each kernel::

        names = {
            "encoder/kernel": "encoder",                                        # Linear; (d, heads, k) is flattened
            "layers/up/kernel": "layers.{}.up",                                 # one a layer
            "qkv/kernel": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),        # fused: A shared, B's columns cut
            "conv/kernel": PeftModule("conv", kind="conv"),
        }

    Args:
        folder: made where it is missing; files of the same names are replaced, both or neither.
        model: one of jlora's models; None with `names`.
        params: a wrapped tree.
        target: "peft", or "vllm", which knows no patterns: ranks are padded with zeros to the largest, scalings folded
            into B in float32 at least, alpha is the rank.
        train: leaves trained in full beside the adapters, as in `save_adapter`; None for those that differ from the
            base. Their modules become modules_to_save, biases of adapted modules `bias="lora_only"` or "all", and an
            embedding or head that has an adapter too is written as PEFT's `base_layer`.
        base: the parameters before training, to find the leaves that differ; None to read them again from the folder
            that `load_model` read. A tree of your own has no such folder: without `base`, `train` alone decides.
        names: for a tree of your own, the torch module or modules of each leaf by path, or a function of the path. A
            bias is found beside its kernel.
        layout: layouts by path or regular expression, as `wrap` takes them, for leaves of `train` with more than two
            axes or in another order than (in, out). Adapters tell their own.
        base_model: name or folder of the base; None for where `load_model` had it from.
        dropout: written down for those who train on.
        task_type: PEFT's; "auto" for what the model's head says.

    Raises:
        ValueError: whatever the format can't express, and leaves that differ from the base but are not in `train`, all
            of it listed; nothing is written then.
    """
    check_choice("save_peft", target=(target, TARGETS))
    if model is not None and model.pools_apart:
        base = None if base is None else split_classifier(model, base)[1]
        body = partial(save_peft, base=base, base_model=base_model, dropout=dropout, task_type=task_type)
        return save_pooled(Path(folder), model, params, body, target=target, train=train, task_type=task_type)
    told = read_layouts("save_peft", params)
    leaves = flatten(params)
    plain = {path: leaf for path, leaf in leaves.items() if not is_adapter_leaf(path)}
    full = select_paths("save_peft", train, plain) if train else set()
    lost = changed_from_base(model, plain, base, required=train is None) - full
    if train is None:
        full, lost = lost, set()
    if model is not None and target == "peft":
        full |= resized_leaves(model, plain)
    table = make_table("save_peft", model, plain, names, {**(layout or {}), **told}, {*told, *full})
    turned = [
        f"{path!r} is wrapped with the layout {layout!r}, its own is {table.slots[path].layout!r}"
        for path, layout in told.items()
        if path in table.slots and layout != table.slots[path].layout.replace("v", "i")
    ]
    adapters = {} if turned else gather(table, list(told), leaves)
    if task_type == "auto":
        task_type = TASKS[model.head_type] if model is not None else None
        if target == "vllm" and task_type in LABELLED:
            task_type = None
    whole = sort_trained(table, full, adapters, task_type)
    offenders = [
        *table.offenders,
        *turned,
        *(f"{path!r} differs from the base, and is not in train=" for path in left_out(table, lost, whole)),
        *unsaveable(table, adapters, whole, target, task_type, dropout),
        *overwritten(table, plain, whole),
    ]
    if offenders:
        problem = f"this can't become an adapter for {'PEFT' if target == 'peft' else 'vLLM'}."
        fix = (
            "name in train= all that was trained, leave out the rest, or correct names=; save_adapter keeps every tree."
        )
        raise JloraValueError("save_peft", problem, offenders, fix)
    if target == "vllm":
        adapters = uniform(adapters)
    tensors = whole_tensors(table, plain, whole, adapters)
    for module, adapter in adapters.items():
        tensors |= pair_tensors(table, module, adapter)
    origin = getattr(model, "origin", None)
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model or (origin.name if origin else None),
        "revision": origin.revision if origin and base_model is None else None,
        "inference_mode": True,
        **ranks_and_alphas(adapters),
        "target_modules": target_modules(table, adapters),
        "use_rslora": False,
        "use_dora": False,
        "bias": whole.bias,
        "fan_in_fan_out": any(table.modules[m][0].kind == "conv1d" for m in adapters if m in table.modules),
        "modules_to_save": whole.modules or None,
        "lora_dropout": float(dropout),
        "init_lora_weights": True,
    }
    # PEFT knows tied heads by this name alone.
    if "lm_head.weight" in table.copies and "lm_head" in {*adapters, *whole.modules}:
        config["ensure_weight_tying"] = True
    write_files(Path(folder), config, {PREFIX + name: np.ascontiguousarray(value) for name, value in tensors.items()})


def load_peft(
    folder: str | os.PathLike[str],
    model: nn.Module | None,
    params: Tree,
    *,
    names: Names | None = None,
    layout: Mapping[str, Layout] | None = None,
) -> Tree:
    """Puts an adapter from a PEFT folder on its base.

    Scalings are PEFT's own, with its patterns and rsLoRA. Entries of stacked layers are stacked, padded with zeros to
    the largest rank; a layer without an entry gets zeros, which change nothing and stay zeros in training. Adapters of
    a fused kernel's parts share A where theirs is the same; else their ranks add up, and a scaling that differs is
    folded into B. Leaves trained in full, and biases, take the place of the base's, in the base's dtype.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors; a pickle is never read.
        model: one of jlora's models; None with `names`.
        params: its parameters, without an adapter.
        names: for a tree of your own, as in `save_peft`.
        layout: layouts by path or regular expression, as `wrap` takes them, for kernels of your own with more than two
            axes or in another order than (in, out).

    An adapter on a module that no output reads, as BERT's pooler beside hidden states, is kept: the tree gets that
    module from the model's checkpoint, and `save_peft` and `save_model` write it back.

    Returns:
        The wrapped tree. A and B are float32 where the kernel is narrower, else of the kernel's dtype.

    Raises:
        ValueError: no such files or damaged ones, a kind of adapter that is not computed here, tensors that are
            unknown, missing or misshapen; all of them listed, and nothing attached.
    """
    folder = Path(folder)
    base = flatten(params)
    if model is not None and model.pools_apart:
        return load_pooled(folder, model, params)
    if is_wrapped(base):
        fix = "pass the tree before wrap, or jlora.unwrap(params)."
        raise JloraValueError("load_peft", "params is already wrapped.", [], fix)
    config, tensors = read_config(folder), read_tensors(folder)
    if model is not None:
        params = add_unread_modules(model, params, tensors)
        base = flatten(params)
    table = make_table("load_peft", model, base, names, layout or {}, None)
    pairs, plain, tokens, offenders = sort_tensors(table, tensors)
    plain = {name: value for name, value in plain.items() if name not in table.unread}
    adapters, wrong = read_adapters(table, config, pairs)
    offenders += table.offenders + wrong
    offenders += misfits(table, config, pairs, plain)
    share_tied(table, config, plain)
    offenders += replace_rows(table, config, plain, tokens, base)
    fix, size = "load the adapter onto the base it was trained on.", vocabulary_size(table, pairs, plain)
    if size is not None:
        fix = (
            f"load the base with as many tokens as the adapter's had: load_model(..., vocab_size={size}), or with "
            f"--vocab-size {size} on the command line (jlora train: --model.vocab-size {size})."
        )
    if not offenders and (offenders := follow_ties(table, config, adapters, plain, base)):
        fix = (
            "load the base with load_model(..., untie=True), or with --untie on the command line (jlora train: "
            "--model.untie)."
        )
    if offenders:
        problem = f"the adapter in {str(folder)!r} does not fit the model."
        raise JloraValueError("load_peft", problem, offenders, fix)
    layout = {path: slot.layout for path, slot in table.slots.items()}
    return put(params, trios(table, adapters, base), whole_leaves(table, plain, base), layout)


def add_unread_modules(model: nn.Module, params: Tree, tensors: Iterable[str]) -> Tree:
    """The tree with the modules that an adapter is for but no output reads, from the model's own checkpoint.

    Args:
        model: one of jlora's models.
        params: its parameters.
        tensors: the names in the adapter's file. Modules that none of them names are left out.
    """
    unread = unread_weights(family_of(model), model)
    modules = {weight.path.split("/")[0] for weight in unread}
    named = any(f".{module}." in f".{name}" for name in tensors for module in modules)
    missing = [weight.path for weight in unread if named and weight.path not in flatten(params)]
    if not missing or model.origin is None:
        return params
    stored, dtype = stored_leaves(model), next(iter(flatten(params).values())).dtype
    found = {path: jnp.asarray(stored[path](dtype)) for path in missing if path in stored}
    return union(unflatten_dict(found, sep="/"), params) if found else params


def split_classifier(model: nn.Module, params: Tree) -> tuple[Tree, Tree]:
    """The classifier of a tree, and the rest of it."""
    return partition(params, lambda path, _: path.startswith(f"{model.label_module}/"))


def save_pooled(
    folder: Path,
    model: nn.Module,
    params: Tree,
    save_body: Callable[..., None],
    *,
    target: str,
    train: Pattern | None,
    task_type: str | None,
) -> None:
    """Writes a classifier that PEFT does not have: its body's adapter, and its head for sentence-transformers."""
    offenders = [] if target == "peft" else ["the classifier is trained in full, and vLLM takes no modules_to_save"]
    if task_type in LABELLED:
        offenders.append(f"task_type is {task_type!r}, but the classifier reads pooling={model.pooling!r}")
    if offenders:
        problem = f"this can't become an adapter for {'PEFT' if target == 'peft' else 'vLLM'}."
        raise JloraValueError("save_peft", problem, offenders, POOLER_FIX)
    head, body = split_classifier(model, params)
    paths = [path for path in flatten(params) if not is_adapter_leaf(path)]
    named = select_paths("save_peft", train, paths) - set(flatten(head)) if train else set()
    full = None if train is None else sorted(named)
    save_body(folder, model.clone(head=None), body, train=full)
    leaves = flatten(merge(head) if is_wrapped(flatten(head)) else head)
    kernel, bias = (np.asarray(leaves[f"{model.label_module}/{leaf}"]) for leaf in ("kernel", "bias"))
    with staged(folder, last=sentence_transformers.MODULES) as stage:
        sentence_transformers.write_modules(stage, model.pooling, sentence_transformers.Classifier(kernel, bias))


def load_pooled(folder: Path, model: nn.Module, params: Tree) -> Tree:
    """Puts an adapter of a body, and the classifier beside it, on a classifier that PEFT does not have."""
    task_type = read_config(folder).get("task_type")
    if task_type in LABELLED:
        problem = f"the adapter in {str(folder)!r} does not fit the model."
        offenders = [f"its classifier ({task_type}) reads the pooler, the model's pooling={model.pooling!r}"]
        raise JloraValueError("load_peft", problem, offenders, POOLER_FIX)
    head, body = split_classifier(model, params)
    stored = sentence_transformers.read_classifier(folder)
    if stored is None:
        return union(load_peft(folder, model.clone(head=None), body), head)
    values = {f"{model.label_module}/{leaf}": value for leaf, value in stored._asdict().items()}
    own = flatten(head)
    offenders = [
        f"{path!r} has shape {value.shape} in the folder, the model {own[path].shape}"
        for path, value in values.items()
        if value.shape != own[path].shape
    ]
    if offenders:
        problem = f"the classifier in {str(folder)!r} does not fit the model."
        raise JloraValueError("load_peft", problem, offenders, "load the model with the adapter's labels.")
    whole = {path: value.astype(own[path].dtype) for path, value in values.items()}
    return union(load_peft(folder, model.clone(head=None), body), put(head, {}, whole, {}))


def gather(table: Table, paths: Sequence[TreePath], leaves: Mapping[TreePath, Any]) -> dict[str, Adapter]:
    """Each module's adapter, without the zeros that pad its rank."""
    adapters = {}
    for path in paths:
        if slot := table.slots.get(path):
            a, b, scaling = (np.asarray(leaves[path + affix]) for affix in AFFIXES)
            a, b = fold_pair(slot, a, b)
            for module, layer, cut in slot.parts():
                # In a stack, a layer of zeros was never adapted.
                least = 1 if len(slot.modules) == 1 else 0
                adapters[module] = trim(Adapter(a[layer], b[layer][:, cut], scaling.reshape(-1)[layer]), least)
    for copy, source in table.copies.items():
        if (adapter := adapters.get(module_of(source))) and copy.endswith(".weight"):
            adapters[module_of(copy)] = flip(adapter)
    return {module: adapter for module, adapter in adapters.items() if adapter.rank}


def trim(adapter: Adapter, least: int) -> Adapter:
    """Cuts the last columns of A that are zero with their rows of B: they add nothing and never train."""
    used = np.flatnonzero((adapter.a != 0).any(0) | (adapter.b != 0).any(1))
    rank = max(least, int(used[-1]) + 1 if len(used) else 0)
    return Adapter(adapter.a[:, :rank], adapter.b[:rank], adapter.scaling)


def changed_from_base(
    model: nn.Module | None, leaves: Mapping[TreePath, Any], base: Tree | None, required: bool
) -> set[TreePath]:
    """The leaves that differ from the base; none where there is no base to compare with.

    Args:
        model: as in `save_peft`.
        leaves: the tree's, without adapters.
        base: as in `save_peft`.
        required: whether a base that can't be read is an error.

    Raises:
        ValueError: the folder that the model was loaded from can't be read.
    """
    if base is not None:
        return changed_leaves(leaves, readers(flatten(base)))
    folder = getattr(getattr(model, "origin", None), "folder", None)
    if model is None or folder is None:
        return set()
    try:
        stored = stored_leaves(model)
    except (ValueError, OSError) as error:
        if not required:
            return set()
        problem = f"the base in {folder!r} can't be read, so the leaves trained in full can't be found."
        fix = "pass base=, the parameters before training, or train=."
        raise JloraValueError("save_peft", problem, [str(error).splitlines()[0]], fix) from error
    return changed_leaves(leaves, stored)


def sort_trained(table: Table, full: set[TreePath], adapters: Mapping[str, Adapter], task_type: str | None) -> Trained:
    """How the leaves trained in full go into the file."""
    parts = [(module, table.slots[path]) for path in full if path in table.slots for module in modules_of(table, path)]
    outputs = {module_of(copy) for copy in table.copies} | {"lm_head"}
    has_form = lambda module, slot: slot.kind == "embedding" or (module in outputs and slot.tensor == "weight")
    bases = {module for module, slot in parts if module in adapters and has_form(module, slot)}
    chosen = {module for module, slot in parts if slot.tensor != "bias" and module not in bases}
    if task_type in LABELLED:
        paths = [module.split(".") for module in map(module_of, table.tensors)]
        chosen |= {".".join(path[: n + 1]) for path in paths for n, name in enumerate(path) if name in CLASSIFIERS}
    biases = {module for module, slot in parts if slot.tensor == "bias" and not inside(f"{module}.bias", chosen)}
    bias = "none" if biases.isdisjoint(adapters) else "lora_only" if biases <= adapters.keys() else "all"
    # Biases beside no adapter are saved with their module, unless PEFT's "all" covers them.
    chosen |= biases if bias == "none" else set()
    chosen |= {module_of(copy) for copy, source in table.copies.items() if inside(source, chosen)}
    return Trained(sorted(module for module in chosen if not inside(module, chosen)), sorted(bases), bias)


def left_out(table: Table, changed: set[TreePath], whole: Trained) -> list[TreePath]:
    """The changed leaves that are not written with a module that is saved anyway, as a classifier is."""
    saved = {slot.path for name, (slot, _, _) in table.tensors.items() if inside(name, whole.modules)}
    return sorted(changed - saved)


def modules_of(table: Table, path: TreePath) -> list[str]:
    """The modules that hold a leaf."""
    return [module for module, _, _ in table.slots[path].parts()]


def inside(name: str, modules: Iterable[str]) -> bool:
    """Whether a module or tensor belongs to one of the modules."""
    return any(name.startswith(f"{module}.") for module in modules)


def unsaveable(
    table: Table,
    adapters: Mapping[str, Adapter],
    whole: Trained,
    target: str,
    task_type: str | None,
    dropout: float,
) -> list[str]:
    """What the format can't express."""
    offenders, saved = [], whole.modules
    always = f", always so for the task {task_type}" if task_type in LABELLED else ""
    for module, adapter in adapters.items():
        if module in saved or inside(module, saved):
            offenders.append(
                f"{module!r} has an adapter and is saved in full{always}: PEFT has either the adapter (target_modules) "
                "or the whole module (modules_to_save)"
            )
        if not np.isfinite(adapter.scaling):
            offenders.append(f"{module!r} has the scaling {adapter.scaling}")
    for module in dict.fromkeys(map(module_of, table.tensors)):
        # PEFT compares the ends of the names as text.
        ends = [name for name in saved if module.endswith(name)]
        if ends and module not in saved and not inside(module, saved):
            offenders.append(f"{module!r} would be saved in full too, because its name ends with {ends[0]!r}")
    if not adapters and not table.offenders:
        offenders.append("every A and B is zero")
    if not 0 <= dropout < 1:
        offenders.append(f"dropout={dropout}: must be from 0 to below 1")
    return offenders + (unsaveable_for_vllm(table, adapters, whole) if target == "vllm" else [])


def unsaveable_for_vllm(table: Table, adapters: Mapping[str, Adapter], whole: Trained) -> list[str]:
    """What PEFT's format can express and vLLM does not read."""
    offenders = [
        f"{module!r} is trained in full, and vLLM takes no modules_to_save" for module in [*whole.modules, *whole.bases]
    ]
    if whole.bias != "none":
        offenders.append(f"biases are trained (bias={whole.bias!r}), and vLLM takes none")
    slots = {module: slot for module, (slot, _, _) in table.modules.items() if module in adapters}
    for module, slot in slots.items():
        if slot.kind in ("conv", "embedding"):
            offenders.append(f"{module!r} is an adapted {slot.kind}, and vLLM adapts projections only")
        elif module.rpartition(".")[2] == "lm_head":
            offenders.append(f"{module!r} is an adapted output head, which vLLM takes for few models")
    return offenders


def resized_leaves(model: nn.Module, leaves: Iterable[TreePath]) -> set[TreePath]:
    """The leaves with an axis of tokens, where the base was loaded with another vocabulary than its checkpoint's.

    Their new rows are in no checkpoint, so they go into the file, as PEFT writes them too.
    """
    origin = getattr(model, "origin", None)
    if origin is None or json.loads(origin.config).get("vocab_size") in (None, model.config.vocab_size):
        return set()
    return {path for path in family_of(model).vocabulary if path in leaves}


def overwritten(table: Table, leaves: Mapping[TreePath, Any], whole: Trained) -> list[str]:
    """The separate heads of a tied base whose values would be lost: PEFT keeps one tensor under both adapters."""

    def value(name: str) -> np.ndarray:
        slot, layer, cut = table.tensors[name]
        return whole_tensor(slot, fold(slot, leaves[slot.path])[layer][:, cut])

    return [
        f"{source!r} and {copy!r} differ and one has an adapter: for PEFT the base ties them, and keeps one of the two"
        for copy, source in table.untied.items()
        if not {module_of(copy), module_of(source)}.isdisjoint(whole.bases)
        and not np.array_equal(value(copy), value(source))
    ]


def uniform(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """All of one rank, and of scaling 1."""
    rank = max(adapter.rank for adapter in adapters.values())

    def change(adapter: Adapter) -> Adapter:
        more = rank - adapter.rank
        b = adapter.b.astype(np.promote_types(adapter.b.dtype, np.float32)) * adapter.scaling
        one = adapter.scaling.dtype.type(1)
        return Adapter(np.pad(adapter.a, ((0, 0), (0, more))), np.pad(b, ((0, more), (0, 0))), one)

    return {module: change(adapter) for module, adapter in adapters.items()}


def pair_tensors(table: Table, module: str, adapter: Adapter) -> dict[str, np.ndarray]:
    """An adapter's tensors; one of a tied head, which has no slot, is a Linear's."""
    slot = table.modules[module][0] if module in table.modules else None
    if slot and slot.kind == "embedding":
        return {f"{module}.lora_embedding_A": adapter.a.T, f"{module}.lora_embedding_B": adapter.b.T}
    a = rows(slot, adapter.a) if slot else adapter.a.T
    b = adapter.b.T.reshape(-1, adapter.rank, *(1 for _ in a.shape[2:]))
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def whole_tensors(
    table: Table, leaves: Mapping[TreePath, Any], whole: Trained, adapters: Mapping[str, Adapter]
) -> dict[str, np.ndarray]:
    """The tensors that are saved in full, by the file's names; tied ones of modules_to_save are repeated."""
    everything = {name: name for name in table.tensors} | table.copies
    written = {name: name for name in everything if inside(name, whole.modules)}
    written |= {f"{module}.weight": f"{module}.base_layer.weight" for module in whole.bases}
    for name in table.tensors if whole.bias != "none" else ():
        module, _, tensor = name.rpartition(".")
        if tensor == "bias" and module in adapters:
            written[name] = f"{module}.base_layer.bias"
        elif tensor == "bias" and whole.bias == "all":
            written[name] = name
    places = {key: table.tensors[everything[name]] for name, key in written.items()}
    matrices = {slot.path: fold(slot, leaves[slot.path]) for slot, _, _ in places.values()}
    return {key: whole_tensor(slot, matrices[slot.path][layer][:, cut]) for key, (slot, layer, cut) in places.items()}


def ranks_and_alphas(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """The most common rank and alpha, and patterns for all others."""
    ranks = {module: adapter.rank for module, adapter in adapters.items()}
    alphas = {module: alpha(adapter) for module, adapter in adapters.items()}
    (rank, _), (common, _) = (Counter(values.values()).most_common(1)[0] for values in (ranks, alphas))
    # Anchored: PEFT lets anything stand before a pattern.
    exactly = lambda module: f"^{re.escape(module)}"
    return {
        "r": rank,
        "lora_alpha": common,
        "rank_pattern": {exactly(module): value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {exactly(module): value for module, value in alphas.items() if value != common},
    }


def alpha(adapter: Adapter) -> int | float:
    """What gives the scaling back to the bit when it is divided by the rank; whole if one such is."""
    exact = float(adapter.scaling) * adapter.rank
    whole = round(exact)
    return whole if np.asarray(whole / adapter.rank, adapter.scaling.dtype) == adapter.scaling else exact


def target_modules(table: Table, adapters: Iterable[str]) -> list[str] | str:
    """Names of modules that PEFT matches with the adapted ones and no others."""
    adapted = set(adapters)
    known = {
        ".".join(path[: n + 1])
        for path in (m.split(".") for m in map(module_of, table.tensors))
        for n in range(len(path))
    }
    known |= adapted
    matcher = PatternMatcher("target_modules")
    reach = lambda names: {module for module in known if named_in(names, module, matcher)}
    # Of a tree of the user's, torch may have more modules than are named here.
    short = sorted({module.rpartition(".")[2] for module in adapted})
    if table.complete and reach(short) == adapted:
        return short
    return sorted(adapted) if reach(adapted) == adapted else "|".join(map(re.escape, sorted(adapted)))


def named_in(names: str | Iterable[str], module: str, matcher: PatternMatcher) -> bool:
    """PEFT's test of a module against target_modules or exclude_modules."""
    if isinstance(names, str):
        return matcher.match(names, module, whole=True) is not None
    return any(f".{module}".endswith(f".{name}") for name in names)


def read_config(folder: Path) -> dict[str, Any]:
    """PEFT's config.

    Raises:
        ValueError: none there, or one that asks for what is not computed here.
    """
    config = read_config_file(folder)
    offenders = [f"{name} = {json.dumps(config[name])}" for name in VARIANTS if config.get(name)]
    if config.get("peft_type") != "LORA":
        offenders.append(f"peft_type = {json.dumps(config.get('peft_type'))}, known: LORA")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGED_BASE):
        convert = "merge it in PEFT"
        if init.lower().startswith(CONVERTIBLE):
            convert = (
                "save it from PEFT with save_pretrained(..., path_initial_model_for_weight_conversion=FOLDER), "
                "which makes it plain LoRA"
            )
        offenders.append(
            f"init_lora_weights = {init!r}, which changed the base: {convert}, or write true there if params is the "
            "base as it was changed"
        )
    offenders += misfit_fields(config)
    if offenders:
        problem = f"{str(folder / CONFIG)!r} asks for what is not computed here."
        raise JloraValueError(
            "load_peft", problem, offenders, "merge the adapter in PEFT, or convert it to plain LoRA."
        )
    return config


def sort_tensors(table: Table, tensors: Mapping[str, np.ndarray]) -> Contents:
    """The tensors of a file by what they are."""
    pairs: dict[str, Pair] = {}
    plain: dict[str, np.ndarray] = {}
    tokens: dict[str, np.ndarray] = {}
    offenders = []
    group: dict[str, np.ndarray]
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX)
        if ORIGINAL.search(name):
            # PEFT's copy of the base's own weights, which the adapter does not use.
            continue
        if found := FACTOR.fullmatch(name):
            written, factor = found["module"], found["linear"] or found["table"]
            pair = pairs.setdefault(module_of(table_name(table, f"{written}.weight")), Pair(written, {}))
            group, name = pair.factors, f"lora_{'embedding_' if found['table'] else ''}{factor}"
        elif found := TOKENS.fullmatch(name):
            group, name = tokens, module_of(table_name(table, f"{found['module']}.weight"))
        else:
            group, name = plain, table_name(table, INFIX.sub("", name))
        if name in group and not (group is plain and np.array_equal(group[name], value)):
            offenders.append(f"{key!r} is there twice, under another spelling too")
        if not jnp.issubdtype(value.dtype, jnp.floating):
            offenders.append(f"{key!r} is stored as {value.dtype}, not as floats")
        group[name] = value
    return Contents(pairs, plain, tokens, offenders)


def table_name(table: Table, name: str) -> str:
    """A tensor's name as the table has it, without what wrapped the model or the module when it was saved."""
    bare = WRAPPERS.sub("", name)
    inner = bare.removeprefix("module.").removeprefix(PREFIX)
    forms = [form for own in (name, bare, inner) for form in (own, SAVED.sub("", own), SAVED_AS.sub("", own))]
    spelled = [table.spell(form) for form in dict.fromkeys(forms)]
    return next((form for form in spelled if form in table.tensors or form in table.copies), spelled[-1])


def read_adapters(
    table: Table, config: Mapping[str, Any], pairs: Mapping[str, Pair]
) -> tuple[dict[str, Adapter], list[str]]:
    """The adapters of a file, and what keeps others from being one."""
    places, adapters, offenders = table.modules, {}, []
    ranks, alphas = PatternMatcher("rank_pattern"), PatternMatcher("alpha_pattern")
    heads = {module_of(c): table.tensors[source][0] for c, source in table.copies.items() if c.endswith(".weight")}
    for module, (written, factors) in pairs.items():
        if module not in places and module not in heads:
            offenders.append(f"{written!r} is no module of the model that can have an adapter")
            continue
        rank = resolve(config, ranks, written, config["r"])
        if module in places:
            slot, _, cut = places[module]
            wide = pair_shapes(slot, cut.stop - cut.start, rank)
        else:
            slot = heads[module]._replace(kind="linear")
            wide = (rank, slot.shape[1]), (slot.shape[0], rank)
        prefix = "lora_embedding_" if slot.kind == "embedding" else "lora_"
        wanted = dict(zip((f"{prefix}A", f"{prefix}B"), wide, strict=True))
        offenders += [f"{written!r} lacks its {name}" for name in wanted if name not in factors]
        offenders += [
            f"{written!r} has a {name}, but is {slot.kind} in the model" for name in factors if name not in wanted
        ]
        wrong = [
            f"{written!r} has {name} {factors[name].shape}, the model and rank {rank} ask for {shape}"
            for name, shape in wanted.items()
            if name in factors and factors[name].shape != shape
        ]
        offenders += wrong
        if not wrong and wanted.keys() == factors.keys():
            a, b = (factors[name] for name in wanted)
            scaling = resolve(config, alphas, written, config["lora_alpha"])
            scaling /= math.sqrt(rank) if config.get("use_rslora") else rank
            adapters[module] = Adapter(columns(slot, a), b.reshape(len(b), -1).T, np.float64(scaling))
    return adapters, offenders


def resolve(config: Mapping[str, Any], matcher: PatternMatcher, module: str, default: Any) -> Any:
    """A module's own rank or alpha: that of the first pattern that matches."""
    patterns = config.get(matcher.field) or {}
    return next((value for key, value in patterns.items() if matcher.match(rf"(.*\.)?({key})$", module)), default)


def vocabulary_size(table: Table, pairs: Mapping[str, Pair], plain: Mapping[str, np.ndarray]) -> int | None:
    """The number of tokens that the adapter's base had, None where it is the model's or the file does not say."""
    rows = {module_of(name): len(value) for name, value in plain.items() if value.ndim == 2}
    for module, (_, factors) in pairs.items():
        if "lora_embedding_A" in factors:
            rows[module] = factors["lora_embedding_A"].shape[-1]
        elif "lora_B" in factors:
            rows[module] = len(factors["lora_B"])
    places = {module: table.tensors.get(table.copies.get(f"{module}.weight", f"{module}.weight")) for module in rows}
    sizes = {
        rows[module]
        for module, place in places.items()
        if place and module.rpartition(".")[2] in VOCABULARIES and rows[module] != whole_shape(place)[0]
    }
    return sizes.pop() if len(sizes) == 1 else None


def replace_rows(
    table: Table,
    config: Mapping[str, Any],
    plain: dict[str, np.ndarray],
    tokens: Mapping[str, np.ndarray],
    base: Mapping[TreePath, Any],
) -> list[str]:
    """Puts the rows of `trainable_token_indices` into the tables of `plain`; what does not fit is named."""
    chosen: Any = config.get("trainable_token_indices") or []
    offenders = []
    if chosen and not tokens:
        offenders.append("trainable_token_indices are given, but the file has no trainable_tokens_delta")
    for module, values in tokens.items():
        name = f"{module}.weight"
        place = table.tensors.get(table.copies.get(name, name))
        ids = chosen
        if isinstance(chosen, dict):
            ids = next((ids for key, ids in chosen.items() if f".{module}".endswith(f".{key}")), [])
        if place is None or place[0].kind not in ("embedding", "linear"):
            offenders.append(f"{module!r} is no table of the model, but has trainable_tokens_delta")
            continue
        slot, layer, cut = place
        size, width = whole_shape(place)
        if values.shape != (len(ids), width) or any(index >= size for index in ids):
            offenders.append(
                f"{module!r} has trainable_tokens_delta {values.shape} for {len(ids)} token ids up to "
                f"{max(ids, default=-1)}, the model a table of {(size, width)}"
            )
            continue
        own = whole_tensor(slot, fold(slot, base[slot.path])[layer][:, cut])
        table_values = plain.get(name, own)
        if table_values.shape != own.shape:
            continue  # `misfits` names it
        rows = np.array(table_values, np.promote_types(own.dtype, values.dtype))
        rows[np.asarray(ids, int)] = values
        plain[name] = rows
        # PEFT ties the rows of a tied head to those of its table.
        copies = {**table.copies, **table.untied}
        tied = [copy for copy, source in copies.items() if source == name and module_of(copy) not in tokens]
        plain |= dict.fromkeys(tied, rows)
        heads = [module_of(copy) for copy in tied] + ([module] if slot.kind == "linear" else [])
        offenders += [
            f"{head!r} has a bias, which PEFT leaves out where trainable_token_indices reach a head"
            for head in heads
            if f"{head}.bias" in table.tensors or f"{head}.bias" in table.copies
        ]
    return offenders


def misfits(
    table: Table, config: Mapping[str, Any], pairs: Mapping[str, Pair], plain: Mapping[str, np.ndarray]
) -> list[str]:
    """What is missing in the file, and tensors in full that are not the model's."""
    targets = PatternMatcher("target_modules, exclude_modules, layers_pattern or modules_to_save")
    offenders = [] if pairs else ["the file holds no lora_A and no lora_B"]
    offenders += [
        f"{module!r} is one of target_modules, but has no lora_A and lora_B"
        for module in table.modules
        if pairs and module not in pairs and targeted(config, module, targets)
    ]
    offenders += [
        f"{name!r} is missing, its module is one of modules_to_save"
        for name in table.tensors
        if name not in plain and saved_in_full(config, name)
    ]
    for name, value in plain.items():
        place = table.tensors.get(table.copies.get(name, name))
        if place is None:
            offenders.append(f"{name!r} is not used by the model")
        elif value.shape != (shape := whole_shape(place)):
            offenders.append(f"{name!r} has shape {value.shape}, the model {shape}")
    return offenders


def saved_in_full(config: Mapping[str, Any], name: str) -> bool:
    """PEFT's test of whether a tensor belongs to one of modules_to_save."""
    saved = tuple(config.get("modules_to_save") or ())
    return any(name[: dot.start()].endswith(saved) for dot in re.finditer(r"\.", name) if saved)


def whole_shape(place: tuple[Slot, int, slice]) -> tuple[int, ...]:
    slot, _, cut = place
    return whole_tensor(slot, np.empty((slot.fan_in, cut.stop - cut.start), bool)).shape


def targeted(config: Mapping[str, Any], module: str, matcher: PatternMatcher) -> bool:
    """PEFT's test of whether a module gets an adapter."""
    names, saved = config.get("target_modules") or (), config.get("modules_to_save") or ()
    if named_in(config.get("exclude_modules") or (), module, matcher):
        return False
    if not named_in(names, module, matcher):
        return False
    if any(matcher.match(rf"(^|.*\.){name}($|\..*)", module) for name in saved):
        return False
    layers = config.get("layers_to_transform")
    if isinstance(names, str) or module in names or layers in (None, []):
        return True
    pattern = config.get("layers_pattern") or r"[^.]*"
    patterns = [pattern] if isinstance(pattern, str) else pattern
    found = next(filter(None, (matcher.match(rf"(?:^|.*?\.){p}\.(\d+)\.", module) for p in patterns)), None)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def follows(config: Mapping[str, Any], head: str) -> bool:
    """PEFT's test of whether the adapter of a tied head follows that of its table.

    Source: peft/tuners/tuners_utils.py, `BaseTuner._check_tied_modules`; tuners/lora/model.py, `_create_and_replace`,
    which finds a head by the last part of its name among full names, so it finds no head inside another module.
    """
    names, saved = config.get("target_modules") or (), config.get("modules_to_save") or ()
    if not config.get("ensure_weight_tying") or "." in head:
        return False
    if any(name.rpartition(".")[2] in TIED_NAMES for name in saved):
        return True
    if isinstance(names, str):
        return any(re.fullmatch(names, name) for name in TIED_NAMES)
    return any(name.rpartition(".")[2] in TIED_NAMES for name in names)


def share_tied(table: Table, config: Mapping[str, Any], plain: dict[str, np.ndarray]) -> None:
    """Gives both tensors of a tied pair the value of the one in the file, where PEFT writes it into what they share.

    It does so outside modules_to_save, whose copies are separate.
    """
    for copy, source in {**table.copies, **table.untied}.items():
        for name, other in ((copy, source), (source, copy)):
            if name in plain and not saved_in_full(config, name):
                plain.setdefault(other, plain[name])


def follow_ties(
    table: Table,
    config: Mapping[str, Any],
    adapters: dict[str, Adapter],
    plain: dict[str, np.ndarray],
    base: Mapping[TreePath, Any],
) -> list[str]:
    """Makes the tensors of tied heads those that PEFT would have.

    A head that is tied in the model is taken out of `adapters` and `plain`. One with separate leaves gets what its
    table has, where PEFT ties the two and the file lacks the head's tensors.

    Returns:
        The tied heads that the adapter changes apart from their tables.
    """
    offenders = []
    for copy, source in table.untied.items():
        if follows(config, module_of(copy)):
            if source in plain:
                plain.setdefault(copy, plain[source])
            if ours := adapters.get(module_of(source)):
                adapters.setdefault(module_of(copy), flip(ours))
    for copy, source in table.copies.items():
        apart, tied = False, follows(config, module_of(copy))
        if copy in plain or source in plain:
            slot, layer, cut = table.tensors[source]
            own = whole_tensor(slot, fold(slot, base[slot.path])[layer][:, cut])
            value = plain.get(source, own).astype(own.dtype)
            apart = not np.array_equal(plain.pop(copy, value if tied else own).astype(own.dtype), value)
        if copy.endswith(".weight"):
            ours = adapters.get(module_of(source))
            wanted = ours and flip(ours)
            apart |= not alike(wanted, adapters.pop(module_of(copy), wanted if tied else None))
        if apart:
            offenders.append(f"{copy!r} and {source!r} are one in the model, but the adapter changes them apart")
    return offenders


def alike(one: Adapter | None, other: Adapter | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(one.a, other.a) and np.array_equal(one.b, other.b) and one.scaling == other.scaling


def flip(adapter: Adapter) -> Adapter:
    """A table's adapter as that of the head that is tied to it."""
    return Adapter(adapter.b.T, adapter.a.T, adapter.scaling)


def trios(
    table: Table, adapters: Mapping[str, Adapter], base: Mapping[TreePath, Any]
) -> dict[TreePath, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """A, B and scaling of every adapted leaf."""
    out = {}
    for path, slot in table.slots.items():
        layers = [join_parts([adapters.get(module) for module in modules], slot) for modules in slot.modules]
        if any(layers) and slot.kind != PLAIN:
            dtype = np.dtype(jnp.promote_types(base[path].dtype, jnp.float32))
            rank = max(layer.rank for layer in layers if layer)
            fan_out = sum(slot.widths)
            a = np.zeros((len(layers), slot.fan_in, rank), dtype)
            b = np.zeros((len(layers), rank, fan_out), dtype)
            scaling = np.full(len(layers), next(layer.scaling for layer in layers if layer), dtype)
            for n, layer in enumerate(layers):
                if layer:
                    a[n, :, : layer.rank], b[n, : layer.rank], scaling[n] = layer
            out[path] = (*unfold_pair(slot, a, b), scaling.reshape(slot.sizes("s")))
    return out


def join_parts(parts: Sequence[Adapter | None], slot: Slot) -> Adapter | None:
    """The adapter of a layer's kernel from those of the modules that it is fused of."""
    found = [part for part in parts if part]
    if len(parts) == 1 or not found:
        return parts[0]
    if len({part.scaling for part in found}) > 1:
        found = [Adapter(p.a, p.b.astype(np.float32) * np.float32(p.scaling), np.float64(1)) for p in found]
    first = found[0]
    shared = all(np.array_equal(part.a, first.a) for part in found)
    a = first.a if shared else np.concatenate([part.a for part in found], axis=1)
    b = np.zeros((a.shape[1], sum(slot.widths)), np.result_type(*(part.b for part in found)))
    column = row = 0
    rest = iter(found)
    for part, width in zip(parts, slot.widths, strict=True):
        if part:
            part = next(rest)
            b[row : row + part.rank, column : column + width] = part.b
            row += 0 if shared else part.rank
        column += width
    return Adapter(a, b, first.scaling)


def whole_leaves(
    table: Table, plain: Mapping[str, np.ndarray], base: Mapping[TreePath, Any]
) -> dict[TreePath, np.ndarray]:
    """The leaves that the file has other values for; layers and parts that it has none for are the base's."""
    places = {name: table.tensors[name] for name in plain}
    own = {slot.path: fold(slot, base[slot.path]) for slot, _, _ in places.values()}
    out = {path: matrices.copy() for path, matrices in own.items()}
    for name, (slot, layer, cut) in places.items():
        value = plain[name]
        if slot.kind in ("linear", "conv"):
            value = columns(slot, value)
        out[slot.path][layer, :, cut] = value
    # PEFT writes unchanged copies too: of adapted embeddings, and of whatever modules_to_save names.
    changed = {path: matrices for path, matrices in out.items() if not np.array_equal(matrices, own[path])}
    return {path: unfold(table.slots[path], matrices) for path, matrices in changed.items()}


def put(
    params: Tree,
    new: Mapping[TreePath, tuple[np.ndarray, ...]],
    full: Mapping[TreePath, np.ndarray],
    told: Mapping[TreePath, Layout],
) -> Tree:
    """The tree with adapters beside its kernels, and some of its leaves replaced."""

    def change(path: TreePath, nodes: dict[Any, Any]) -> dict[Any, Any]:
        out: dict[Any, Any] = {}
        for name, node in nodes.items():
            where, leaf = join_path(path, name), unbox(node)
            out[name] = node
            if where in full:
                out[name] = box(node, place(full[where], leaf, tuple(range(leaf.ndim))), tuple(range(leaf.ndim)))
            if where in new:
                for affix, value, axes in zip(AFFIXES, new[where], layouts.pair_axes(told[where]), strict=True):
                    out[f"{name}{affix}"] = box(node, place(value, leaf, axes), axes)
        return out

    return edit(params, change)
