"""`jlora inspect`, `jlora merge` and `jlora export`: what can be done with an adapter that is there."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jlora.errors import JloraFileExistsError, JloraNotADirectoryError
from jlora.hf.chat import chat_generation
from jlora.hf.load import save_model
from jlora.hf.peft import save_peft
from jlora.hf.tokenizer import save_tokenizer
from jlora.runs.folder import SPECTRUM
from jlora.runs.inspection import Description, Target, describe_adapter, load_adapted
from jlora.tree.paths import Tree, map_with_path
from jlora.tree.wrapping import is_adapter_leaf
from jlora.tree.wrapping import merge as fold


def inspect(
    folder: Path,
    *,
    model: str | None,
    spectrum: bool,
    as_json: bool,
    untie: bool = False,
    vocab_size: int | None = None,
) -> None:
    """Prints what an adapter's folder holds.

    Args:
        folder: of a training run, of `save_adapter`, or of PEFT.
        model: folder or hub name of the base, to hold the updates against its kernels.
        spectrum: say how much of its rank each adapter used, and draw it into the folder.
        as_json: print one JSON object.
        untie: load the base of a PEFT adapter with a separate output head, as `load_model` does.
        vocab_size: number of tokens that the base of a PEFT adapter was resized to.

    Raises:
        ValueError: a damaged adapter, or one of another base.
        OSError: no adapter there, or a file can't be read or written.
    """
    found = describe_adapter(folder, model, spectrum=spectrum, untie=untie, vocab_size=vocab_size)
    if spectrum:
        draw(found, folder / SPECTRUM)
    print(json.dumps(found.as_dict(), indent=1) if as_json else found)


def draw(found: Description, path: Path) -> None:
    """Draws singular values: a panel for each kind of kernel, in it a line for each layer, each against its largest."""
    kinds: dict[str, list[Target]] = {}
    for target in found.targets:
        # A layer's number in a path, and a place in a stack, tell layers of one kind apart.
        kinds.setdefault(re.sub(r"\d+", "*", target.name), []).append(target)
    columns = min(3, len(kinds))
    rows = -(-len(kinds) // max(columns, 1))
    figure = Figure(figsize=(1 + 4 * columns, 0.8 + 2.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (kind, targets) in enumerate(kinds.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        for n, target in enumerate(targets):
            values = target.used.singular_values if target.used else ()
            shares = [value / values[0] for value in values if value > 0]
            colour = colormaps["viridis"](0.9 * n / max(len(targets) - 1, 1))
            axes.plot(range(1, len(shares) + 1), shares, ".-", color=colour, linewidth=1, markersize=3)
        effective = sorted(target.used.effective_rank for target in targets if target.used)
        span = f"{effective[0]:.1f}" + (f" to {effective[-1]:.1f}" if len(effective) > 1 else "")
        rank = max(target.rank for target in targets)
        axes.set_title(f"{kind}\neffective rank {span} of {rank}", fontsize=8)
        axes.set_xlim(0, rank + 1)
        axes.set_yscale("log")
        axes.set_ylim(top=1.3)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=7)
    figure.supxlabel(
        "singular value, largest first; a line for each layer, the first dark, the last bright", fontsize=9
    )
    figure.supylabel("size against the largest", fontsize=9)
    figure.savefig(path, dpi=120)


def merge(
    folder: Path,
    out: Path,
    *,
    model: str | None,
    dtype: str | None,
    overwrite: bool,
    untie: bool = False,
    vocab_size: int | None = None,
) -> None:
    """Writes base and adapter as one model, a Hugging Face folder with its tokenizer.

    Args:
        folder: of a training run, of `save_adapter`, or of PEFT.
        out: the folder to write.
        model: folder or hub name of the base, where `folder` does not say, or the base has moved.
        dtype: what is written; None for the base's own.
        overwrite: write into a folder that is not empty.
        untie: load the base of a PEFT adapter with a separate output head, as `load_model` does.
        vocab_size: number of tokens that the base of a PEFT adapter was resized to.

    Raises:
        ValueError: a base or adapter that can't be loaded, or a model that transformers does not have.
        OSError: no adapter there, or `out` can't be written to.
    """
    check_out("merge", out, overwrite)
    adapted = load_adapted(folder, model, dtype=dtype, untie=untie, vocab_size=vocab_size)
    params = fold(adapted.params) if dtype is None else cast(adapted.params, jnp.dtype(dtype))
    saved_model = adapted.loaded.model
    if adapted.chat:
        # Who runs the folder reads the end of an answer from this file, not from the chat template.
        saved_model = saved_model.clone(origin=saved_model.origin._replace(generation=chat_generation(adapted.loaded)))
    save_model(out, saved_model, params, adapted.loaded.tokenizer)
    form = ", for sentence-transformers: its embeddings are the logits" if adapted.loaded.model.pools_apart else ""
    print(f"{folder} merged into its base: {out}{form}")


def export(
    folder: Path,
    out: Path,
    *,
    target: str,
    model: str | None,
    overwrite: bool,
    untie: bool = False,
    vocab_size: int | None = None,
) -> None:
    """Writes an adapter as a PEFT folder, with the tokenizer it was trained with.

    Args:
        folder: of a training run, of `save_adapter`, or of PEFT.
        out: the folder to write.
        target: who will read it, "peft" or "vllm".
        model: folder or hub name of the base, where `folder` does not say, or the base has moved.
        overwrite: write into a folder that is not empty.
        untie: load the base of a PEFT adapter with a separate output head, as `load_model` does.
        vocab_size: number of tokens that the base of a PEFT adapter was resized to.

    Raises:
        ValueError: a base or adapter that can't be loaded, or one that the format can't express.
        OSError: no adapter there, or `out` can't be written to.
    """
    check_out("export", out, overwrite)
    adapted = load_adapted(folder, model, untie=untie, vocab_size=vocab_size)
    save_peft(
        out,
        adapted.loaded.model,
        adapted.params,
        target=target,
        train=adapted.train,
        base=adapted.loaded.params,
        dropout=adapted.dropout,
    )
    if adapted.loaded.tokenizer is not None:
        save_tokenizer(out, adapted.loaded.tokenizer)
    print(f"{folder} exported for {'PEFT' if target == 'peft' else 'vLLM'}: {out}")
    if adapted.loaded.model.pools_apart:
        print(
            "PEFT opens the adapter of the body; the pooling and the classifier beside it are sentence-transformers'. "
            "For a classifier that PEFT opens alone, train with --model.pooling pooler."
        )


def check_out(who: str, out: Path, overwrite: bool) -> None:
    """Refuses to write into what is there, unless asked to.

    Raises:
        NotADirectoryError: it is a file.
        FileExistsError: it holds files.
    """
    if out.exists() and not out.is_dir():
        raise JloraNotADirectoryError(who, f"{out} is a file, not a folder.", [], "choose another --out.")
    there = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if there and not overwrite:
        fix = "choose another --out, or pass --overwrite."
        raise JloraFileExistsError(who, f"{out} is not empty.", there[:5], fix)


def cast(params: Tree, dtype: Any) -> Tree:
    """The merged tree in another dtype, rounded once: a kernel is widened before the sum, and narrowed after it."""

    def widen(path: str, leaf: Any) -> Any:
        return leaf if is_adapter_leaf(path) else leaf.astype(jnp.promote_types(leaf.dtype, dtype))

    return jax.tree.map(lambda leaf: leaf.astype(dtype), fold(map_with_path(widen, params)))
