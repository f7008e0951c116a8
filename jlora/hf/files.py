"""Folders that are written whole or not at all."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(folder: str | Path, last: str = "config.json") -> Iterator[Path]:
    """A temporary folder whose files, those of its subfolders too, take their places in `folder` once all are written.

    What fails on the way leaves `folder` as it was. Files of the same names are replaced, one rename each; others stay.

    Args:
        folder: where the files go; made where it is missing.
        last: the file that is renamed after all others: who finds it finds the rest.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stage = folder / f".{uuid.uuid4().hex}"
    stage.mkdir()
    try:
        yield stage
        files = [file.relative_to(stage) for file in stage.rglob("*") if file.is_file()]
        for file in sorted(files, key=lambda file: file == Path(last)):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (stage / file).replace(folder / file)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
