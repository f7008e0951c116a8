"""Writing an adapter for other programs: merged into its base, or as a PEFT folder."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jlora.errors import JloraFileExistsError, JloraNotADirectoryError
from jlora.hf.chat import chat_generation
from jlora.hf.load import save_model
from jlora.hf.peft import save_peft
from jlora.hf.tokenizer import save_tokenizer
from jlora.runs.inspection import Adapted, load_adapted
from jlora.tree.paths import Tree, map_with_path
from jlora.tree.wrapping import is_adapter_leaf, merge


def merge_adapter(
    folder: Path,
    out: Path,
    *,
    model: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    untie: bool = False,
    vocab_size: int | None = None,
) -> Adapted:
    """Writes base and adapter as one model, a Hugging Face folder with its tokenizer.

    Args:
        folder: of a training run, of `save_adapter`, or of PEFT.
        out: the folder to write.
        model: folder or hub name of the base, if `folder` does not name it or it was moved.
        dtype: dtype to write; None for that of the base.
        overwrite: write into a folder that is not empty.
        untie: load the base of a PEFT adapter with a separate output head, as `load_model` does.
        vocab_size: number of tokens that the base of a PEFT adapter was resized to.

    Returns:
        The base with the adapter, as loaded.

    Raises:
        ValueError: a base or adapter that can't be loaded, or a model that transformers does not have.
        OSError: no adapter there, or `out` can't be written to.
    """
    check_out("merge", out, overwrite)
    adapted = load_adapted(folder, model, dtype=dtype, untie=untie, vocab_size=vocab_size)
    params = merge(adapted.params) if dtype is None else cast(adapted.params, jnp.dtype(dtype))
    saved_model = adapted.loaded.model
    if adapted.chat:
        # Other programs read the end of an answer from this file, not from the chat template.
        saved_model = saved_model.clone(origin=saved_model.origin._replace(generation=chat_generation(adapted.loaded)))
    save_model(out, saved_model, params, adapted.loaded.tokenizer)
    return adapted


def export_adapter(
    folder: Path,
    out: Path,
    *,
    target: str = "peft",
    model: str | None = None,
    overwrite: bool = False,
    untie: bool = False,
    vocab_size: int | None = None,
) -> Adapted:
    """Writes an adapter as a PEFT folder, with the tokenizer it was trained with.

    Args:
        folder: of a training run, of `save_adapter`, or of PEFT.
        out: the folder to write.
        target: the library that will read it, "peft" or "vllm".
        model: folder or hub name of the base, if `folder` does not name it or it was moved.
        overwrite: write into a folder that is not empty.
        untie: load the base of a PEFT adapter with a separate output head, as `load_model` does.
        vocab_size: number of tokens that the base of a PEFT adapter was resized to.

    Returns:
        The base with the adapter, as loaded.

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
    return adapted


def check_out(who: str, out: Path, overwrite: bool) -> None:
    """Checks that a folder can be written: it is new or empty, or may be overwritten.

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

    return jax.tree.map(lambda leaf: leaf.astype(dtype), merge(map_with_path(widen, params)))
