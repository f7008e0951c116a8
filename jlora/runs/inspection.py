"""What an adapter's folder holds: targets, ranks, scalings, sizes, how far it moves each kernel, and its base."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from jlora.adapters.spectrum import Trio, effective_rank, get_trio, kernel_norms, rank_for, singular_values, to_matrices
from jlora.errors import JloraFileNotFoundError, JloraValueError
from jlora.hf import peft, sentence_transformers
from jlora.hf.load import LoadedModel, find_family, find_folder, load_model, read_json, read_pooling, shapes
from jlora.hf.modules import Table
from jlora.hf.patterns import PatternMatcher
from jlora.hf.peft import CLASSIFIERS
from jlora.hf.peft_files import advise
from jlora.hf.tokenizer import use_tokenizer
from jlora.models.family import LABELLED
from jlora.runs.config import read as read_job
from jlora.runs.folder import ADAPTER, CONFIG, load_run
from jlora.training.checkpoint import METADATA, read_adapter, read_metadata, restore_adapter
from jlora.tree.layouts import Layout, read_layout
from jlora.tree.paths import Tree, TreePath, flatten
from jlora.tree.wrapping import is_adapter_leaf, read_layouts

COPY = 'copy?: a copy of the base that PEFT wrote, or trained in full; "--model BASE" compares it with the base.'
HEADS = {"SEQ_CLS": "classification", "TOKEN_CLS": "token_classification"}


@dataclass(frozen=True, kw_only=True)
class Used:
    """How much of its rank an adapter used.

    Attributes:
        singular_values: of scaling * AB, largest first.
        effective_rank: the entropy of the singular values, as a number of equal ones.
        rank_90: the smallest rank that keeps 90 % of the squared norm.
        rank_99: the same for 99 %.
    """

    singular_values: tuple[float, ...]
    effective_rank: float
    rank_90: int
    rank_99: int


@dataclass(frozen=True, kw_only=True)
class Target:
    """The adapter of one kernel; a stacked kernel has one for every layer.

    Attributes:
        path: slash path of the kernel; in a PEFT folder that is looked at without its base, the torch module's name.
        index: place in the stack, empty where the kernel is not stacked.
        rank: columns of A.
        alpha: numerator of the scaling.
        scaling: what AB is multiplied by.
        parameters: of A and B.
        bytes: of A, B and the scaling.
        norm: Frobenius norm of scaling * AB.
        ratio: that over the norm of the kernel; None where the base was not given, or is zero.
        used: how much of the rank was used; None where it was not asked for.
    """

    path: str
    index: tuple[int, ...]
    rank: int
    alpha: float
    scaling: float
    parameters: int
    bytes: int
    norm: float
    ratio: float | None = None
    used: Used | None = None

    @property
    def name(self) -> str:
        """The path with the place in the stack."""
        return self.path + (f"[{','.join(map(str, self.index))}]" if self.index else "")


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A leaf trained in full.

    Attributes:
        path: slash path; in a PEFT folder that is looked at without its base, torch's name.
        shape: of the leaf.
        bytes: of the leaf.
        trained: None for PEFT's `base_layer` of an adapted module that is looked at without its base: it is most often
            a copy of the base's weights, and the folder alone does not tell.
    """

    path: str
    shape: tuple[int, ...]
    bytes: int
    trained: Literal[True] | None = True


@dataclass(frozen=True, kw_only=True)
class Description:
    """What an adapter's folder holds; `str()` is a table.

    Attributes:
        folder: where it is.
        format: "jlora" or "PEFT".
        base: name or folder of the base it belongs to; None where the folder does not say.
        base_parameters: how many the base has; None where the folder does not say.
        libraries: versions it was written with, where they are known.
        targets: the adapters, one a kernel and layer.
        whole: leaves trained in full, and those that may be.
    """

    folder: str
    format: str
    base: str | None
    base_parameters: int | None
    libraries: dict[str, str]
    targets: tuple[Target, ...]
    whole: tuple[Whole, ...]

    @property
    def parameters(self) -> int:
        """Parameters that were trained, without those of which the folder does not tell."""
        whole = sum(math.prod(leaf.shape) for leaf in self.whole if leaf.trained)
        return sum(target.parameters for target in self.targets) + whole

    @property
    def bytes(self) -> int:
        """Bytes of all that the folder holds for the base."""
        return sum(target.bytes for target in self.targets) + sum(leaf.bytes for leaf in self.whole)

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self) | {"parameters": self.parameters, "bytes": self.bytes}

    def __str__(self) -> str:
        size = "" if self.base_parameters is None else f", {self.base_parameters:,} parameters"
        libraries = ", ".join(f"{name} {version}" for name, version in self.libraries.items())
        told = any(target.used for target in self.targets)
        rows: list[tuple[str, ...]] = [
            ("target", "rank", "alpha", "scaling", "parameters", "bytes", "|sAB|", "|sAB|/|W|")
        ]
        rows += [
            (
                *(target.name, str(target.rank), f"{target.alpha:g}", f"{target.scaling:g}"),
                *(f"{target.parameters:,}", f"{target.bytes:,}", f"{target.norm:.4g}"),
                "" if target.ratio is None else f"{target.ratio:.4g}",
            )
            for target in self.targets
        ]
        rows += [
            (
                *(leaf.path, "full" if leaf.trained else "copy?", "", ""),
                *(f"{math.prod(leaf.shape):,}", f"{leaf.bytes:,}", "", ""),
            )
            for leaf in self.whole
        ]
        if told:
            more = [("effective rank", "rank for 90 %", "for 99 %")]
            more += [used_cells(target.used) for target in self.targets] + [("", "", "")] * len(self.whole)
            rows = [(*row, *cells) for row, cells in zip(rows, more, strict=True)]
        wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join([row[0].ljust(wide[0]), *(cell.rjust(w) for cell, w in zip(row[1:], wide[1:], strict=True))])
            for row in rows
        ]
        return "\n".join(
            [
                f"{self.folder}: {self.format} adapter of {self.base or 'a base it does not name'}{size}",
                *([f"written with {libraries}"] if libraries else []),
                *(line.rstrip() for line in table),
                f"{self.parameters:,} parameters, {self.bytes:,} bytes",
                *([COPY] if not all(leaf.trained for leaf in self.whole) else []),
            ]
        )


def used_cells(used: Used | None) -> tuple[str, str, str]:
    return ("", "", "") if used is None else (f"{used.effective_rank:.1f}", str(used.rank_90), str(used.rank_99))


class Adapted(NamedTuple):
    """A base with an adapter from a folder.

    Attributes:
        loaded: the base; its parameters are without the adapter.
        params: with it.
        train: paths of leaves that were trained in full.
        dropout: share of the adapters' input that was dropped in training, 0 where it is not known.
        chat: whether it was trained to answer chats, as far as is known.
    """

    loaded: LoadedModel
    params: Tree
    train: tuple[TreePath, ...]
    dropout: float = 0.0
    chat: bool = False


def find_kind(folder: Path) -> str:
    """What a folder holds: "run" (of `jlora train`), "jlora" (of `save_adapter`) or "PEFT".

    Raises:
        FileNotFoundError: none of them.
    """
    signs = {"jlora": folder / METADATA, "PEFT": folder / peft.CONFIG, "run": folder / ADAPTER / METADATA}
    for kind, file in signs.items():
        if file.is_file():
            return kind
    if advice := advise(folder):
        problem, fix = advice
        raise JloraFileNotFoundError("adapter", problem, [], fix)
    offenders = [f"no {file.relative_to(folder)}  ({kind})" for kind, file in signs.items()]
    fix = "name the folder that `jlora train`, save_adapter or PEFT wrote."
    raise JloraFileNotFoundError("adapter", f"{folder} holds no adapter.", offenders, fix)


def load_adapted(
    folder: Path,
    model: str | None = None,
    *,
    dtype: str | None = "float32",
    untie: bool = False,
    vocab_size: int | None = None,
) -> Adapted:
    """Loads the base of an adapter, and puts the adapter on it.

    Args:
        folder: of a training run, of `save_adapter`, or of PEFT.
        model: folder or hub name of the base; needed for a folder of `save_adapter`, which does not name it; in place
            of the name in the folder otherwise.
        dtype: of the base under a PEFT adapter, None for the one it is stored in; jlora's own goes on a base of the
            dtype it was trained with alone.
        untie: load the base of a PEFT adapter with a separate output head; jlora's own adapters record what they need.
        vocab_size: number of tokens that the base of a PEFT adapter was resized to; recorded in the same way.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: the base is not named, can't be loaded or is another one; the adapter is damaged.
    """
    kind = find_kind(folder)
    if kind == "run":
        run = load_run(folder, model=model)
        loaded, params, dropout = run.task.loaded, run.params, run.config.adapter.dropout
        chat = run.config.data.task == "instruction"
        return Adapted(loaded, params, changed(loaded.params, params), dropout, chat)
    if kind == "jlora":
        metadata = read_metadata(folder)
        loaded = load_model(named(folder, model), **form_of(metadata, named(folder, model)))
        loaded = use_tokenizer(loaded, folder)
        loaded = with_unread_modules(loaded, [path.replace("/", ".") for path in metadata["base"]])
        params = restore_adapter(folder, loaded.params, model=loaded.model)
        return Adapted(loaded, params, changed(loaded.params, params))
    config = peft.read_config(folder)
    name = named(folder, model or config.get("base_model_name_or_path"))
    # The revision is that of the hub's name in the config.
    revision = config.get("revision") if model is None and not Path(name).is_dir() else None
    base = find_folder(name, revision)
    form: dict[str, Any] = {"dtype": dtype or stored_dtype(base), "untie": untie, "vocab_size": vocab_size}
    loaded = load_model(name, revision=revision, **form, **head_of(folder, config, base))
    loaded = use_tokenizer(loaded, folder)
    loaded = with_unread_modules(loaded, peft.read_tensors(folder))
    params = peft.load_peft(folder, loaded.model, loaded.params)
    return Adapted(loaded, params, changed(loaded.params, params), config.get("lora_dropout") or 0.0)


def with_unread_modules(loaded: LoadedModel, names: Iterable[str]) -> LoadedModel:
    """The base with the modules that no output reads, where `names`, with dots, name them."""
    return replace(loaded, params=peft.add_unread_modules(loaded.model, loaded.params, names))


def named(folder: Path, model: str | None) -> str:
    """The base's name.

    Raises:
        ValueError: nothing names it.
    """
    if model is None:
        problem = f"{folder} does not say which base it belongs to."
        raise JloraValueError("adapter", problem, [], "name the base: --model FOLDER, or its name on the hub.")
    return model


def form_of(metadata: Mapping[str, Any], name: str) -> dict[str, Any]:
    """How a base has to be loaded to have the leaves and the head that an adapter was trained on."""
    base, settings = metadata["base"], metadata.get("model") or {}
    family = find_family(find_folder(name, None))
    dtypes = {leaf["dtype"] for leaf in base.values()}
    form: dict[str, Any] = {"scan": any(family.stack in path.split("/") for path in base)}
    sizes = {path: base[path]["shape"][axis] for path, axis in family.vocabulary.items() if path in base}
    form |= {"vocab_size": next(iter(sizes.values())), "untie": any(path.endswith("/kernel") for path in sizes)}
    form |= {"dtype": next(iter(dtypes))} if len(dtypes) == 1 else {}
    form |= {name: settings[name] for name in ("head", "pooling") if name in settings}
    labels = [leaf["shape"][-1] for path, leaf in base.items() if path.split("/")[0] in CLASSIFIERS]
    if not labels:
        return form
    form["num_labels"] = labels[0]
    if "head" in form:
        return form
    # Heads of one name differ in their leaves: a bias, or a pooler before them.
    for head in (head for head in LABELLED if head in family.heads):
        model = load_model(name, abstract=True, head=head, **form).model
        if flatten(shapes(model)).keys() == base.keys():
            return form | {"head": head}
    return form


def stored_dtype(base: Path) -> str:
    """The dtype that the config in a base's folder names, float32 where it names none."""
    content = read_json(base / "config.json")
    stored = content.get("dtype") or content.get("torch_dtype")
    return stored if stored in ("bfloat16", "float16") else "float32"


def head_of(folder: Path, config: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """The head that a PEFT adapter was trained with on the base in another folder, as `load_model` takes it."""
    if classifier := sentence_transformers.read_classifier(folder):
        return {"head": "classification", "pooling": read_pooling(folder), "num_labels": len(classifier.bias)}
    head = HEADS.get(str(config.get("task_type")))
    if head is None:
        return {}
    ends = tuple(f"{name}.weight" for name in CLASSIFIERS)
    named = [value for name, value in peft.read_tensors(folder).items() if name.endswith(ends)]
    # Transformers' classifiers of texts, which PEFT adapts, read no other pooling.
    pooling = {"pooling": "pooler"} if find_family(base).pooled else {}
    return {"head": head, **pooling} | ({"num_labels": len(named[0])} if named else {})


def changed(base: Tree, params: Tree) -> tuple[TreePath, ...]:
    """The leaves of a base that loading an adapter replaced."""
    before = flatten(base)
    return tuple(p for p, leaf in flatten(params).items() if not is_adapter_leaf(p) and leaf is not before[p])


def describe_adapter(
    folder: str | Path,
    model: str | None = None,
    *,
    spectrum: bool = False,
    untie: bool = False,
    vocab_size: int | None = None,
) -> Description:
    """Says what an adapter's folder holds.

    Args:
        folder: of a training run, of `save_adapter`, or of PEFT.
        model: folder or hub name of the base, to hold every update against its kernel; None to read the adapter alone.
        spectrum: say how much of its rank each adapter used.
        untie: load the base of a PEFT adapter with a separate output head, as `load_model` does.
        vocab_size: number of tokens that the base of a PEFT adapter was resized to.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: it is damaged, or does not fit the base.
    """
    folder = Path(folder)
    kind = find_kind(folder)
    if kind == "PEFT":
        found = describe_peft(folder, spectrum)
    else:
        # Orbax reads from absolute paths alone.
        inner = (folder / ADAPTER if kind == "run" else folder).absolute()
        found = describe_own(inner, read_job(folder / CONFIG).model.name if kind == "run" else None, spectrum)
    values = {item: getattr(found, item) for item in found.__dataclass_fields__} | {"folder": str(folder)}
    if model is not None:
        adapted = load_adapted(folder, model, untie=untie, vocab_size=vocab_size)
        leaves, told = flatten(adapted.params), read_layouts("inspect", adapted.params)
        trios = {path: (get_trio(leaves, path), told[path]) for path in told}
        full = [Whole(path=p, shape=leaves[p].shape, bytes=leaves[p].nbytes) for p in adapted.train]
        norms = {path: kernel_norms(leaves[path], told[path]) for path in told}
        targets = targets_of(trios, norms, spectrum=spectrum)
        total = sum(leaf.size for path, leaf in flatten(adapted.loaded.params).items())
        values |= {"targets": targets, "whole": tuple(full), "base": model, "base_parameters": total}
    return Description(**values)


def describe_own(folder: Path, base: str | None, spectrum: bool) -> Description:
    """What a folder of `save_adapter` holds."""
    metadata, arrays = read_adapter(folder)
    leaves = metadata["base"]
    trios = {}
    for path in metadata["targets"]:
        trio = get_trio(arrays, path)
        layout = read_layout(tuple(leaves[path]["shape"]), *(leaf.shape for leaf in trio))
        assert layout is not None, "digests hold, so the shapes fit as they did when saved"
        trios[path] = trio, layout
    return Description(
        folder=str(folder),
        format="jlora",
        base=base,
        base_parameters=sum(math.prod(leaf["shape"]) for leaf in leaves.values()),
        libraries={name: version for name, version in metadata["libraries"].items() if version},
        targets=targets_of(trios, spectrum=spectrum),
        whole=tuple(Whole(path=p, shape=arrays[p].shape, bytes=arrays[p].nbytes) for p in metadata["train"]),
    )


def describe_peft(folder: Path, spectrum: bool) -> Description:
    """What a PEFT folder holds, by torch's names.

    Raises:
        ValueError: files missing or damaged, an adapter of another kind, or half of a pair missing.
    """
    config, tensors = peft.read_config(folder), peft.read_tensors(folder)
    pairs, plain, tokens, offenders = peft.sort_tensors(Table({}, {}, {}, frozenset(), str, False, []), tensors)
    alphas, whole = PatternMatcher("alpha_pattern"), plain | tokens
    if classifier := sentence_transformers.read_classifier(folder):
        whole |= {"classifier.weight": classifier.kernel.T, "classifier.bias": classifier.bias}
    for module, pair in pairs.items():
        shapes_ab = [pair.factors[name].shape for name in sorted(pair.factors)]
        if len(shapes_ab) != 2:
            offenders.append(f"{module!r} has no second half")
        elif min(map(len, shapes_ab)) < 2 or shapes_ab[0][0] != shapes_ab[1][1]:
            offenders.append(f"{module!r} has A {shapes_ab[0]} and B {shapes_ab[1]}, which are not of one rank")
    if offenders:
        problem = f"the adapter in {folder} is damaged."
        raise JloraValueError("inspect", problem, offenders, "save the adapter again with PEFT's save_pretrained.")
    targets = []
    for module, (written, factors) in pairs.items():
        a, b = (factors[name] for name in sorted(factors))
        rank = len(a)
        alpha = peft.resolve(config, alphas, written, config["lora_alpha"])
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        values = singular_values(a.reshape(rank, -1).T, b.reshape(-1, rank), np.asarray(scaling))
        targets.append(
            Target(
                path=module,
                index=(),
                rank=rank,
                alpha=float(alpha),
                scaling=scaling,
                parameters=a.size + b.size,
                bytes=a.nbytes + b.nbytes,
                norm=float(np.linalg.norm(values)),
                used=used_of(values) if spectrum else None,
            )
        )
    # A base layer's own tensors: PEFT writes those of an adapted embedding or head as they are in the base.
    kept = ("weight",) if config.get("bias", "none") != "none" else ("weight", "bias")
    copies = {name for name in plain for module, _, leaf in [name.rpartition(".")] if module in pairs and leaf in kept}
    return Description(
        folder=str(folder),
        format="PEFT",
        base=config.get("base_model_name_or_path"),
        base_parameters=None,
        libraries={"peft": config["peft_version"]} if config.get("peft_version") else {},
        targets=tuple(targets),
        whole=tuple(
            Whole(path=name, shape=value.shape, bytes=value.nbytes, trained=None if name in copies else True)
            for name, value in whole.items()
        ),
    )


def targets_of(
    trios: Mapping[TreePath, tuple[Trio, Layout]],
    bases: Mapping[TreePath, np.ndarray] | None = None,
    *,
    spectrum: bool,
) -> tuple[Target, ...]:
    """Every kernel's adapter, a stack's layer by layer."""
    found = []
    for path, (trio, layout) in trios.items():
        a, b, scaling = trio
        values, rank = singular_values(*to_matrices(trio, layout)), a.shape[-1]
        scalings = np.asarray(scaling, np.float64)
        norms = np.linalg.norm(values, axis=-1)
        for index in np.ndindex(*norms.shape):
            base = None if bases is None else float(bases[path][index])
            found.append(
                Target(
                    path=path,
                    index=index,
                    rank=rank,
                    alpha=float(scalings[index]) * rank,
                    scaling=float(scalings[index]),
                    parameters=(a.size + b.size) // norms.size,
                    bytes=(a.nbytes + b.nbytes + scaling.nbytes) // norms.size,
                    norm=float(norms[index]),
                    ratio=float(norms[index]) / base if base else None,
                    used=used_of(values[index]) if spectrum else None,
                )
            )
    return tuple(found)


def used_of(values: Float[np.ndarray, "rank"]) -> Used:
    """What the singular values of one update say."""
    return Used(
        singular_values=tuple(map(float, values)),
        effective_rank=float(effective_rank(values)),
        rank_90=int(rank_for(values, 0.9)),
        rank_99=int(rank_for(values, 0.99)),
    )
