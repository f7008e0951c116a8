"""Which torch modules hold a leaf of a tree, and the leaf as they store it.

Between the tree and a PEFT file every leaf is matrices, one for each layer of a stack: a kernel is (in, out), its pair
(in, rank) and (rank, out); `rows` and `columns` turn them into what torch stores and back.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from jaxtyping import Float

from jlora.errors import JloraValueError, count, nearest
from jlora.hf.families import family_of, weights
from jlora.hf.load import shapes, spell, unread_weights
from jlora.tree import layouts
from jlora.tree.layouts import Layout
from jlora.tree.paths import TreePath

KINDS = ("linear", "conv1d", "conv", "embedding")
PLAIN = "plain"  # the kind of a bias or a norm's scale


@dataclass(frozen=True)
class PeftModule:
    """A torch module that holds a kernel.

    Args:
        path: its path in the torch model, with one `{}` for each stacked axis of the kernel, in their order.
        kind: "linear" (`nn.Linear`), "conv1d" (transformers' `Conv1D`, which stores (in, out)), "conv" (`nn.Conv1d` to
            `nn.Conv3d`, one group) or "embedding"; None for "embedding" where the leaf is named so, else "linear".
        width: its output columns where it holds a part of the kernel; None for an equal share.
    """

    path: str
    kind: str | None = None
    width: int | None = None


Name = str | PeftModule | Sequence[str | PeftModule]
Names = Mapping[TreePath, Name] | Callable[[TreePath], Name | None]


class Slot(NamedTuple):
    """A leaf and the torch modules that hold it.

    Args:
        path: the leaf's.
        shape: the leaf's.
        layout: of its axes; a bias has only stacked and out axes.
        kind: of KINDS, or PLAIN.
        modules: of every layer of the stack, in order; several a layer where the kernel is fused of them.
        widths: the output columns of each module of a layer.
        tensor: "weight" or "bias".
    """

    path: TreePath
    shape: tuple[int, ...]
    layout: Layout
    kind: str
    modules: tuple[tuple[str, ...], ...]
    widths: tuple[int, ...]
    tensor: str

    def sizes(self, letters: str) -> tuple[int, ...]:
        return tuple(n for n, letter in zip(self.shape, self.layout, strict=True) if letter in letters)

    @property
    def fan_in(self) -> int:
        return math.prod(self.sizes("iv"))

    def parts(self) -> Iterable[tuple[str, int, slice]]:
        """Every module, with its layer and its columns of it."""
        ends = np.cumsum(self.widths)
        for layer, modules in enumerate(self.modules):
            for module, width, end in zip(modules, self.widths, ends, strict=True):
                yield module, layer, slice(int(end) - width, int(end))


@dataclass(frozen=True)
class Table:
    """All that is known of a model's modules.

    Args:
        slots: by the leaf's path.
        copies: tensors of torch that repeat a leaf's, with the name of the one they repeat: tied heads.
        untied: the same for a head that the base's config ties, but that has separate leaves here.
        unread: tensors that stand beside an untied head in torch, and that no output reads.
        spell: turns an older name of a tensor, or one of the model without its head, into the table's.
        complete: whether these are all modules that torch's model has.
        offenders: what is wrong with the names.
    """

    slots: dict[TreePath, Slot]
    copies: dict[str, str]
    untied: dict[str, str]
    unread: frozenset[str]
    spell: Callable[[str], str]
    complete: bool
    offenders: list[str]

    @cached_property
    def modules(self) -> dict[str, tuple[Slot, int, slice]]:
        """Modules that can have an adapter."""
        slots = [slot for slot in self.slots.values() if slot.kind != PLAIN]
        return {module: (slot, layer, cut) for slot in slots for module, layer, cut in slot.parts()}

    @cached_property
    def tensors(self) -> dict[str, tuple[Slot, int, slice]]:
        return {
            f"{module}.{slot.tensor}": (slot, layer, cut)
            for slot in self.slots.values()
            for module, layer, cut in slot.parts()
        }


def module_of(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def make_table(
    who: str,
    model: nn.Module | None,
    base: Mapping[TreePath, Any],
    names: Names | None,
    told: Mapping[str, Layout],
    used: set[TreePath] | None,
) -> Table:
    """The modules of a tree.

    Args:
        who: for errors.
        model: one of jlora's, or None.
        base: the tree's leaves, without adapters.
        names: of a user's own tree.
        told: layouts by path or regular expression.
        used: the leaves that must have a module; None for those that are named.

    Raises:
        ValueError: neither a model nor names, or both.
    """
    if (model is None) == (names is None):
        fix = "pass one of jlora's models, or None and names= for a tree of your own."
        raise JloraValueError(who, "the model or names= says what the modules are called, one of them.", [], fix)
    if names is None:
        assert model is not None
        return model_table(model, base)
    return named_table(base, names, told, used)


def model_table(model: nn.Module, base: Mapping[TreePath, Any]) -> Table:
    """The modules of one of jlora's models, as `weights` has them."""
    family = family_of(model)
    # A model without a head is torch's bare one, which knows its modules without the prefix.
    head = model.head_type
    cut = family.prefix if head is None else ""
    slots, offenders = {}, []
    beside = [weight for weight in unread_weights(family, model) if weight.path in base]
    for weight in [*weights(family, shapes(model)), *beside]:
        leaf = weight.path.rpartition("/")[2]
        kind = {"kernel": "linear" if weight.transpose else "conv1d", "embedding": "embedding"}.get(leaf, PLAIN)
        layout = "s" * weight.stacked + {"kernel": "io", "embedding": "vo"}.get(leaf, "o")
        modules = tuple((module_of(name).removeprefix(cut),) for name in weight.tensors)
        tensor = weight.tensors[0].rpartition(".")[2]
        slots[weight.path] = Slot(weight.path, weight.shape, layout, kind, modules, weight.shape[-1:], tensor)
        if weight.path not in base:
            offenders.append(f"{weight.path!r} is missing in params")
        elif base[weight.path].shape != weight.shape:
            offenders.append(f"{weight.path!r} has shape {base[weight.path].shape} in params, the model {weight.shape}")
    offenders += [f"{path!r} in params is not the model's" for path in base if path not in slots]
    known = {f"{module}.{slot.tensor}" for slot in slots.values() for module, _, _ in slot.parts()}
    copies = {copy: source for copy, source in family.tied(head).items() if copy not in known}
    separate = {copy: source for copy, source in family.tied(head).items() if copy in known}
    unread = frozenset(separate.values()) - known
    untied = {copy: source for copy, source in separate.items() if source in known and is_tied_base(model)}
    respell = lambda name: spell(family, name).removeprefix(cut)
    return Table(slots, copies, untied, unread, respell, not cut, offenders)


def is_tied_base(model: nn.Module) -> bool:
    """Whether the config of the checkpoint that the model comes from ties the output head."""
    return model.origin is not None and json.loads(model.origin.config).get("tie_word_embeddings", False)


def named_table(
    base: Mapping[TreePath, Any], names: Names, told: Mapping[str, Layout], used: set[TreePath] | None
) -> Table:
    """The modules of a user's own tree."""
    given = {path: name for path in base if (name := names(path)) is not None} if callable(names) else dict(names)
    offenders = [
        f"{path!r} in names= is no leaf  nearest: {nearest(path, base, 1)[0]!r}" for path in given if path not in base
    ]
    beside = {path.rpartition("/")[0]: path for path in reversed(given)}
    slots: dict[TreePath, Slot] = {}
    for path, leaf in base.items():
        module, _, name = path.rpartition("/")
        source = path if path in given else beside.get(module) if name == "bias" else None
        if source is not None:
            slot = make_slot(path, tuple(leaf.shape), given[source], told)
            if isinstance(slot, Slot):
                slots[path] = slot
            elif used is None or path in used:
                offenders.append(slot)
        elif used is not None and path in used:
            offenders.append(f"{path!r} has no name in names=")
    places = Counter(f"{module}.{slot.tensor}" for slot in slots.values() for module, _, _ in slot.parts())
    offenders += [f"{name!r} is named {n} times" for name, n in places.items() if n > 1]
    return Table(slots, {}, {}, frozenset(), str, False, offenders)


def make_slot(path: TreePath, shape: tuple[int, ...], name: Name, told: Mapping[str, Layout]) -> Slot | str:
    """The slot of a named leaf, or what is wrong with its name."""
    names = [name] if isinstance(name, str | PeftModule) else name
    parts = [PeftModule(part) if isinstance(part, str) else part for part in names]
    leaf = path.rpartition("/")[2]
    stacks, kinds = {part.path.count("{}") for part in parts}, {part.kind for part in parts}
    if len(stacks) != 1 or len(kinds) != 1:
        return f"{path!r}: its modules differ in kind, or in their number of {{}}"
    stack, kind = stacks.pop(), kinds.pop()
    if kind not in (None, *KINDS):
        return f"{path!r}: kind {kind!r}, known: {', '.join(KINDS)}"
    layout = told.get(path) or next((ls for pattern, ls in told.items() if re.fullmatch(pattern, path)), "")
    kind = kind or ("embedding" if leaf == "embedding" or "v" in layout else "linear")
    rest = len(shape) - stack
    if leaf == "bias" or rest == 1:
        kind, layout = PLAIN, "s" * stack + "o" * rest
    layout = layout or "s" * stack + {"embedding": "vo", "conv": "i" * (rest - 1) + "o"}.get(kind, "io")
    if len(layout) != len(shape):
        return f"{path!r} {list(shape)}: its layout can't be told, pass layout={{path: letters}}"
    if layout.count("s") != stack:
        return f"{path!r}: {count(layout.count('s'), 'stacked axis', 'stacked axes')}, but {stack} {{}} in its name"
    if kind == "conv" and not re.fullmatch("s*i+o", layout):
        return f"{path!r}: a convolution's kernel must be (*window, in, out), not {layout!r}"
    if len(parts) > 1 and kind in ("conv", "embedding"):
        return f"{path!r}: a {kind} can't be fused of several modules"
    sizes = lambda letter: [n for n, axis in zip(shape, layout, strict=True) if axis == letter]
    out, widths = math.prod(sizes("o")), [part.width for part in parts]
    if set(widths) == {None} and out % len(parts) == 0:
        widths = [out // len(parts)] * len(parts)
    if None in widths or sum(map(int, widths)) != out:  # type: ignore[arg-type]
        return f"{path!r}: widths {widths} of its modules do not make its {out} columns"
    modules = tuple(tuple(part.path.format(*index) for part in parts) for index in np.ndindex(*sizes("s")))
    tensor = "bias" if leaf == "bias" else "weight"
    return Slot(path, shape, layout, kind, modules, tuple(widths), tensor)  # type: ignore[arg-type]


def order(layout: Layout) -> list[int]:
    """The axes of a leaf, stacked ones first, then in, then out."""
    return [n for letters in ("s", "iv", "o") for n, letter in enumerate(layout) if letter in letters]


def fold(slot: Slot, leaf: Any) -> Float[np.ndarray, "stack fan_in fan_out"]:
    """A leaf as matrices."""
    return np.transpose(np.asarray(leaf), order(slot.layout)).reshape(len(slot.modules), slot.fan_in, -1)


def unfold(slot: Slot, matrices: Float[np.ndarray, "stack fan_in fan_out"]) -> np.ndarray:
    axes = order(slot.layout)
    return matrices.reshape([slot.shape[n] for n in axes]).transpose(np.argsort(axes))


def fold_pair(
    slot: Slot, a: np.ndarray, b: np.ndarray
) -> tuple[Float[np.ndarray, "stack fan_in rank"], Float[np.ndarray, "stack rank fan_out"]]:
    """A pair as matrices."""
    stack, rank = len(slot.modules), a.shape[-1]
    if not layouts.ORDERED.fullmatch(slot.layout):
        axes = [*order(slot.layout), len(slot.layout)]
        a, b = a.transpose(axes), np.moveaxis(b.transpose(axes), -1, slot.layout.count("s"))
    return a.reshape(stack, -1, rank), b.reshape(stack, rank, -1)


def unfold_pair(slot: Slot, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    shape_a, shape_b, _ = layouts.pair_shapes(slot.shape, slot.layout, a.shape[-1])
    if layouts.ORDERED.fullmatch(slot.layout):
        return a.reshape(shape_a), b.reshape(shape_b)
    axes = [*order(slot.layout), len(slot.layout)]
    a = a.reshape([shape_a[n] for n in axes])
    b = np.moveaxis(b, 1, -1).reshape([shape_b[n] for n in axes])
    return a.transpose(np.argsort(axes)), b.transpose(np.argsort(axes))


def rows(slot: Slot, matrix: Float[np.ndarray, "fan_in n"]) -> np.ndarray:
    """A matrix as torch stores what reads a module's input: (n, in), of a convolution (n, in, *window)."""
    if slot.kind != "conv":
        return matrix.T
    return np.moveaxis(matrix.T.reshape(-1, *slot.sizes("i")), -1, 1)


def columns(slot: Slot, tensor: np.ndarray) -> Float[np.ndarray, "fan_in n"]:
    """Undoes `rows`."""
    tensor = np.moveaxis(tensor, 1, -1) if slot.kind == "conv" else tensor
    return tensor.reshape(len(tensor), -1).T


def whole_tensor(slot: Slot, matrix: Float[np.ndarray, "fan_in fan_out"]) -> np.ndarray:
    """A module's share of a leaf, as torch stores it."""
    if slot.kind == PLAIN:
        return matrix[0]
    return matrix if slot.kind in ("conv1d", "embedding") else rows(slot, matrix)


def pair_shapes(slot: Slot, width: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B in the file."""
    if slot.kind != "conv":
        return (rank, slot.fan_in), (width, rank)
    *window, channels = slot.sizes("i")
    return (rank, channels, *window), (width, rank, *(1 for _ in window))
