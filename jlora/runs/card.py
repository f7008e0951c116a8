"""The README.md of a run's folder, for people who find the folder."""

import json
import shlex
from collections.abc import Mapping
from importlib import metadata as packages
from pathlib import Path
from typing import Any

from jlora.runs import config as configs
from jlora.runs.config import Config
from jlora.runs.engine import nulled

LIBRARIES = ("jlora", "jax", "flax", "optax", "orbax-checkpoint", "transformers")
QUESTION = "where is my parcel?"


def model_card(config: Config, result: Mapping[str, Any]) -> str:
    """The README.md of a run's folder: what was trained on which data, the result, and how to use it."""
    folder, question = str(config.output.folder), next(iter(config.data.questions), QUESTION)
    metrics = "\n".join(f"| {name} | {json.dumps(nulled(value))} |" for name, value in result.items())
    versions = ", ".join(f"{name} {packages.version(name)}" for name in LIBRARIES if is_installed(name))
    data = config.data
    sources = {"train": data.train, "validation": data.validation, "test": data.test}
    lines = "\n".join(f"- {name}: `{path}`" for name, path in sources.items() if isinstance(path, Path))
    return f"""# LoRA adapter for {config.model.name}

- Base: `{config.model.name}`
- Task: {data.task}
{lines}

| | |
| --- | --- |
{metrics}

![learning curve](learning_curve.png)

## Use

```sh
{shlex.join(["jlora", "predict", folder, question])}
```

```python
import jlora
from jlora.runs.predict import format_answer, predict

run = jlora.load_run({folder!r})  # base, adapter and tokenizer
params = jlora.merge(run.params)  # inference then needs no more time than with the base alone
for prediction in predict(run, [{question!r}], params=params):
    print(format_answer(prediction))
```

## Settings

```toml
{configs.to_toml(config)}```

Made with {versions}.
"""


def is_installed(name: str) -> bool:
    """Whether a library is installed."""
    try:
        packages.version(name)
    except packages.PackageNotFoundError:
        return False
    return True
