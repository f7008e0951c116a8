"""`jlora inspect`, `jlora merge` and `jlora export`: what can be done with an adapter that is there."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jlora.core.errors import complain
from jlora.core.paths import Tree, map_with_path
from jlora.core.tree import adapter_leaf
from jlora.core.tree import merge as fold
from jlora.interop.huggingface import save_model
from jlora.interop.peft import save_peft
from jlora.recipes.inspection import describe_adapter, load_adapted


def inspect(folder: Path, *, model: str | None, as_json: bool) -> None:
    """Prints what an adapter's folder holds.

    Args:
        folder: of a training run, of `save_adapter`, or of PEFT.
        model: folder or hub name of the base, to hold the updates against its kernels.
        as_json: print one JSON object.

    Raises:
        ValueError: a damaged adapter, or one of another base.
        OSError: no adapter there, or a file can't be read.
    """
    found = describe_adapter(folder, model)
    print(json.dumps(found.as_dict(), indent=1) if as_json else found)


def merge(folder: Path, out: Path, *, model: str | None, dtype: str | None, overwrite: bool) -> None:
    """Writes base and adapter as one model, a Hugging Face folder with its tokenizer.

    Args:
        folder: of a training run, of `save_adapter`, or of PEFT.
        out: the folder to write.
        model: folder or hub name of the base, where `folder` does not say, or the base has moved.
        dtype: what is written; None for the base's own.
        overwrite: write into a folder that is not empty.

    Raises:
        ValueError: a base or adapter that can't be loaded, or a model that transformers does not have.
        OSError: no adapter there, or `out` can't be written to.
    """
    check_out("merge", out, overwrite)
    adapted = load_adapted(folder, model, dtype=dtype)
    params = fold(adapted.params) if dtype is None else cast(adapted.params, jnp.dtype(dtype))
    save_model(out, adapted.loaded.model, params, adapted.loaded.tokenizer)
    print(f"{folder} merged into its base: {out}")


def export(folder: Path, out: Path, *, target: str, model: str | None, overwrite: bool) -> None:
    """Writes an adapter as a PEFT folder.

    Args:
        folder: of a training run, of `save_adapter`, or of PEFT.
        out: the folder to write.
        target: who will read it, "peft" or "vllm".
        model: folder or hub name of the base, where `folder` does not say, or the base has moved.
        overwrite: write into a folder that is not empty.

    Raises:
        ValueError: a base or adapter that can't be loaded, or one that the format can't express.
        OSError: no adapter there, or `out` can't be written to.
    """
    check_out("export", out, overwrite)
    adapted = load_adapted(folder, model)
    save_peft(out, adapted.loaded.model, adapted.params, target=target, train=adapted.train, dropout=adapted.dropout)
    print(f"{folder} exported for {'PEFT' if target == 'peft' else 'vLLM'}: {out}")


def check_out(who: str, out: Path, overwrite: bool) -> None:
    """Refuses to write into what is there, unless asked to.

    Raises:
        NotADirectoryError: it is a file.
        FileExistsError: it holds files.
    """
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(complain(who, f"{out} is a file, not a folder.", [], "choose another --out."))
    there = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if there and not overwrite:
        fix = "choose another --out, or pass --overwrite."
        raise FileExistsError(complain(who, f"{out} is not empty.", there[:5], fix))


def cast(params: Tree, dtype: Any) -> Tree:
    """The merged tree in another dtype, rounded once: a kernel is widened before the sum, and narrowed after it."""

    def widen(path: str, leaf: Any) -> Any:
        return leaf if adapter_leaf(path) else leaf.astype(jnp.promote_types(leaf.dtype, dtype))

    return jax.tree.map(lambda leaf: leaf.astype(dtype), fold(map_with_path(widen, params)))
