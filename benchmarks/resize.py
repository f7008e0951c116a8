"""How much of its rank an adapter used: MiniLM trained on clinc150 at rank 64, then resized by energy.

    python benchmarks/resize.py FOLDER          # data/ of https://github.com/clinc/oos-eval

Two epochs of jlora's recipe at its defaults; nothing is trained after a resize. The head is the same one throughout.
"""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import parity
import tyro

import jlora
from jlora.errors import count
from jlora.runs.folder import load_run
from jlora.runs.job_data import make_split_rows, read_splits
from jlora.runs.train import train
from jlora.tree.layouts import AFFIXES
from jlora.tree.paths import Tree, flatten

STEM = Path(__file__).parent / "results/resize"
LIBRARIES = ("jax", "optax", "numpy")


@dataclass(frozen=True)
class Options:
    """What to train, and what to keep of it."""

    folder: tyro.conf.Positional[Path]
    """Where data_full.json is."""
    rank: int = 64
    """Of the adapter that is trained."""
    epochs: int = 2
    """Passes over the data."""
    energies: tuple[float, ...] = (0.999, 0.99, 0.95, 0.9, 0.5)
    """Shares of each update's squared norm to keep, one after the other."""
    seed: int = 0
    """Of the adapter, the head and the order of the data."""


def measure(options: Options, scratch: Path) -> list[dict[str, Any]]:
    """The validation result before and after every resize."""
    config = parity.defaults(parity.Options("clinc150", options.folder), scratch, options.seed)
    config = parity.changed(
        config,
        {"data.test": None, "adapter.rank": options.rank, "optimisation.epochs": options.epochs},
    )
    train(config)
    run = load_run(config.output.folder)
    corpus = read_splits(config)
    rows = make_split_rows(config, run.task.loaded.tokenizer, corpus, "validation").rows
    found = []
    for energy in (None, *options.energies):
        params = run.params if energy is None else jlora.resize(run.params, energy=energy)
        scores = run.task.score(jlora.merge(params), rows, merged=True)
        found.append({"energy kept": energy or "as trained", **ranks_of(params), **scores.metrics, "loss": scores.loss})
        print(found[-1], flush=True)
    return found


def ranks_of(params: Tree) -> dict[str, Any]:
    """How the ranks of a tree are spread, and what its adapters hold."""
    leaves = flatten(params)
    ranks = [leaf.shape[-1] for path, leaf in leaves.items() if path.endswith(AFFIXES[0])]
    effective = [float(value) for found in jlora.spectrum(params).values() for value in found.effective_rank.flat]
    return {
        "least rank": min(ranks),
        "median rank": statistics.median(ranks),
        "largest rank": max(ranks),
        "median effective rank": statistics.median(effective),
        "parameters of A and B": sum(leaf.size for path, leaf in leaves.items() if path.endswith(AFFIXES[:2])),
    }


def write(rows: Sequence[dict[str, Any]], options: Options) -> None:
    """The rows as JSON, and as a table."""
    STEM.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES)
    lines = [
        "# MiniLM on clinc150: trained at one rank, resized to fewer",
        "",
        "- Command: `python benchmarks/resize.py FOLDER`",
        f"- Python {platform.python_version()}, {versions}",
        f"- Trained at rank {options.rank} for {count(options.epochs, 'epoch')}, seed {options.seed}; "
        "validation file (3,000 texts: one standard error of an accuracy is 0.0035)",
        "",
        "| " + " | ".join(rows[0]) + " |",
        "| " + " | ".join("---" for _ in rows[0]) + " |",
        *("| " + " | ".join(map(shown, row.values())) + " |" for row in rows),
    ]
    STEM.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        write(measure(options, Path(scratch)), options)


if __name__ == "__main__":
    main(tyro.cli(Options))
