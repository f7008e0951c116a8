"""`jlora predict`: prints a run's answers, or writes them to a file."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from jlora.cli.streams import decode_arguments, json_line, read_input
from jlora.errors import (
    JloraFileExistsError,
    JloraFileNotFoundError,
    JloraIsADirectoryError,
    JloraPermissionError,
    JloraValueError,
    count,
)
from jlora.models.generate import unusable_seed, unusable_settings
from jlora.runs import config as configs
from jlora.runs.config import Sampling
from jlora.runs.folder import CONFIG, load_run
from jlora.runs.predict import Question, format_answer, read_questions
from jlora.runs.predict import predict as predict_answers


def predict(
    folder: Path,
    questions: Sequence[str],
    *,
    source: Path | None,
    output: Path | None,
    overwrite: bool,
    top: int,
    as_json: bool,
    model: str | None,
    sampling: Sampling,
) -> None:
    """Prints a run's answer to every question, or writes the answers to a file.

    Args:
        folder: what `jlora train` wrote.
        questions: the questions; empty for those of `source`, or else for the lines of the standard input.
        source: a file of JSON lines with the questions.
        output: the file to write, one JSON object per question; None for the standard output.
        overwrite: replace `output` if it exists.
        top: classes to show for each.
        as_json: print one JSON object per question.
        model: folder or hub name of the base model, if it was moved.
        sampling: how a language model generates.

    Raises:
        ValueError: no question, a blank one, settings out of range or of another task, a run that is damaged.
        OSError: no run in `folder`, or a file can't be read or written.
    """
    given: list[Question] = [*decode_arguments("predict", questions)]
    if source is None and not given:
        given = [line.strip() for line in read_input("predict").splitlines() if line.strip()]
    wrong = [] if given or source is not None else ["no question was given"]
    wrong += ["questions were given twice  expected: QUESTIONS or --input FILE"] if given and source is not None else []
    wrong += [f"question {n} is blank" for n, text in enumerate(given, 1) if not str(text).strip()]
    wrong += [f"--top {top}  expected: a whole number from 1"] if top < 1 else []
    wrong += unusable_settings(sampling.max_new_tokens, sampling.temperature, sampling.top_k, sampling.top_p)
    wrong += unusable_seed(sampling.seed)
    if wrong:
        fix = 'ask as in: jlora predict FOLDER "where is my parcel?" --top 3.'
        raise JloraValueError("predict", "nothing can be answered.", wrong, fix)
    if output is not None:
        check_output(output, overwrite)
    # Before the model is loaded; a folder without a config is refused by load_run.
    if source is not None and (folder / CONFIG).is_file():
        given = read_questions(source, configs.read(folder / CONFIG).data)
    run = load_run(folder, model=model)
    format_prediction = json_line if as_json or output is not None else format_answer
    texts = map(format_prediction, predict_answers(run, given, top=top, sampling=sampling))
    if output is not None:
        write_lines(output, texts)
        print(f"{count(len(given), 'answer')} written to {output}")
        return
    for text in texts:
        print(text)


def check_output(path: Path, overwrite: bool) -> None:
    """Checks that a file can be written, before anything is computed for it.

    Raises:
        OSError: it exists and may not be replaced, or its folder is missing or can't be written to.
    """
    fix = "choose another --output."
    if path.is_dir():
        raise JloraIsADirectoryError("predict", f"{path} is a folder, not a file.", [], fix)
    if path.exists() and not overwrite:
        raise JloraFileExistsError("predict", f"{path} exists.", [], f"{fix[:-1]}, or pass --overwrite.")
    if not path.parent.is_dir():
        raise JloraFileNotFoundError("predict", f"{path.parent} is not a folder.", [], f"make it, or {fix}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise JloraPermissionError("predict", f"{path.parent} can't be written to.", [], fix)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes a file that is there in full or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # A lone surrogate becomes its escape, which is JSON's too.
        with beside.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(f"{line}\n" for line in lines)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
