"""`jlora inspect`, `jlora merge` and `jlora export`: the commands for an adapter that was trained before."""

import json
from pathlib import Path

from jlora.runs.adapters import export_adapter, merge_adapter
from jlora.runs.folder import SPECTRUM
from jlora.runs.inspection import describe_adapter
from jlora.runs.pictures import draw_spectrum

POOLED = (
    "PEFT opens the adapter of the body; the pooling and the classifier beside it are sentence-transformers'. "
    "For a classifier that PEFT opens alone, train with --model.pooling pooler."
)


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
        model: folder or hub name of the base, to compare the updates with its kernels.
        spectrum: also print how much of its rank each adapter uses, and draw it into the folder.
        as_json: print one JSON object.
        untie: load the base of a PEFT adapter with a separate output head, as `load_model` does.
        vocab_size: number of tokens that the base of a PEFT adapter was resized to.

    Raises:
        ValueError: a damaged adapter, or one of another base.
        OSError: no adapter there, or a file can't be read or written.
    """
    description = describe_adapter(folder, model, spectrum=spectrum, untie=untie, vocab_size=vocab_size)
    if spectrum:
        draw_spectrum(description, folder / SPECTRUM)
    print(json.dumps(description.as_dict(), indent=1) if as_json else description)


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
    """Merges an adapter into its base, and prints where the model is; arguments as for `merge_adapter`."""
    adapted = merge_adapter(
        folder, out, model=model, dtype=dtype, overwrite=overwrite, untie=untie, vocab_size=vocab_size
    )
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
    """Exports an adapter, and prints where it is and who can read it; arguments as for `export_adapter`."""
    adapted = export_adapter(
        folder, out, target=target, model=model, overwrite=overwrite, untie=untie, vocab_size=vocab_size
    )
    print(f"{folder} exported for {'PEFT' if target == 'peft' else 'vLLM'}: {out}")
    if adapted.loaded.model.pools_apart:
        print(POOLED)
