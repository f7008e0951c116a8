"""`jlora advise`: a rank to begin with."""

import json
from pathlib import Path
from typing import Any

from jlora.errors import JloraValueError
from jlora.hf.load import LoadedModel, load_model
from jlora.runs import config as configs
from jlora.runs.advise import advise
from jlora.runs.job_data import read_splits


def show(
    config: Path | None,
    *,
    task: str | None,
    examples: int | None,
    difficulty: Any,
    model: str | None,
    memory: str | None,
    as_json: bool,
) -> None:
    """Prints an advice.

    Args:
        config: a job's TOML file, which tells what the other arguments leave out.
        task: what is learnt.
        examples: to train on.
        difficulty: of the task, None for what it most often is.
        model: folder or hub name.
        memory: what there is, as "24GB".
        as_json: print one JSON object.

    Raises:
        ValueError: nothing can be advised.
        OSError: a file can't be read.
    """
    settings: dict[str, Any] = {}
    base: str | LoadedModel | None = model
    if config is not None:
        job = configs.read(config)
        task = task or job.data.task
        if model is None:
            base = job.model.name
        if model is None and job.model.revision is not None:
            base = load_model(job.model.name, revision=job.model.revision, abstract=True)
        examples = len(read_splits(job).splits["train"]) if examples is None else examples
        settings = {"targets": job.adapter.targets} | (step_of(job) if memory is not None else {})
    missing = [f"--{name}" for name, value in {"task": task, "examples": examples}.items() if value is None]
    if missing:
        raise JloraValueError("advise", "too little is known.", missing, "give them, or a job with --config.")
    assert task is not None and examples is not None
    found = advise(task, examples=examples, difficulty=difficulty, model=base, memory=memory, **settings)
    print(json.dumps(found.as_dict(), indent=1) if as_json else found)


def step_of(job: configs.Config) -> dict[str, Any]:
    """A job's settings as a plan takes them."""
    return {
        "batch_size": job.optimisation.batch_size,
        "accumulate": job.optimisation.accumulate,
        "sequence": job.data.max_length,
        "dtype": job.model.dtype,
        "optimizer": job.optimisation.optimizer,
        "scan": job.model.scan,
        "remat": job.model.remat,
        "untie": job.model.untie,
        "vocab_size": job.model.vocab_size,
        "dropout": job.adapter.dropout,
    }
