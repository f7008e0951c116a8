"""MiniLM fine-tuned by jlora's recipe and by PEFT on torch: the same rows in the same order, the same settings.

    python benchmarks/parity.py clinc150 FOLDER          # data/ of https://github.com/clinc/oos-eval
    python benchmarks/parity.py ncbi-disease FOLDER      # conll/ of https://github.com/spyysalo/ncbi-disease

Both train rank 8, alpha 16, on every linear layer, and the head in full: three epochs of batches of 32, AdamW at 1e-3
with 50 steps of warm-up and linear decay. Then jlora trains once more with its own defaults. Every result is written
when it is there, beside those of other methods and seeds. `--grid` instead trains one epoch of jlora from `START` with
one change at a time, and asks the validation file; the test file is never read then.
"""

from __future__ import annotations

import itertools
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import tyro

from jlora.data.batches import ordered_batches, training_batches
from jlora.errors import count
from jlora.hf.load import MINILM, find_folder
from jlora.hf.peft import save_peft
from jlora.runs import folder as runs
from jlora.runs.config import Adapter, Config, Data, Model, Optimisation, Output
from jlora.runs.engine import prepare, schedule
from jlora.runs.job_data import make_split_rows, read_splits
from jlora.runs.train import train
from jlora.tasks.metrics import entity_scores

RESULTS = Path(__file__).parent / "results"
RANK, ALPHA, EPOCHS, BATCH, RATE, WARMUP = 8, 16.0, 3, 32, 1e-3, 50
LIBRARIES = ("jax", "optax", "torch", "peft", "transformers")
START = {
    "model.pooling": "mean",
    "adapter.alpha": 8.0,
    "optimisation.learning_rate": 1e-3,
    "optimisation.b_ratio": 1.0,
    "optimisation.head_ratio": 10.0,
    "optimisation.warmup": 0.1,
    "optimisation.schedule": "linear",
}
GRID: tuple[dict[str, Any], ...] = (
    {},
    {"optimisation.learning_rate": 2e-3},
    {"optimisation.b_ratio": 4.0},
    {"adapter.alpha": 16.0},
)


@dataclass(frozen=True)
class Options:
    """What to train on."""

    name: tyro.conf.Positional[Literal["clinc150", "ncbi-disease"]]
    folder: tyro.conf.Positional[Path]
    """Where its files are."""
    methods: tuple[Literal["peft", "jlora", "defaults"], ...] = ("peft", "jlora", "defaults")
    """What to run."""
    seeds: tuple[int, ...] = (0,)
    """Every method runs once with each."""
    grid: bool = False
    """Try settings on the validation file, one after the other."""


def data_of(options: Options, scratch: Path) -> Data:
    """The data set as a job's section."""
    if options.name == "ncbi-disease":
        files = {name: options.folder / f"{file}.tsv" for name, file in FILES.items()}
        return Data(task="token_classification", **files, max_length=128, allow_overlap=True)
    splits = json.loads((options.folder / "data_full.json").read_text())
    files = {}
    for name, split in (("train", "train"), ("validation", "val"), ("test", "test")):
        files[name] = scratch / f"{name}.jsonl"
        lines = (json.dumps({"text": text, "label": label}) for text, label in splits[split])
        files[name].write_text("\n".join(lines) + "\n")
    return Data(**files, max_length=64, allow_overlap=True)


FILES = {"train": "train", "validation": "devel", "test": "test"}


def same_settings(options: Options, scratch: Path, seed: int) -> Config:
    """PEFT's settings as a job of jlora's."""
    config = Config(
        model=Model(name=MINILM, pooling="pooler"),
        data=data_of(options, scratch),
        output=Output(folder=scratch / "jlora", overwrite=True, log_every=100),
        adapter=Adapter(rank=RANK, alpha=ALPHA),
        optimisation=Optimisation(
            learning_rate=RATE,
            b_ratio=1.0,
            head_ratio=1.0,
            epochs=EPOCHS,
            batch_size=BATCH,
            warmup=0.0,
            seed=seed,
        ),
    )
    return replace(config, optimisation=replace(config.optimisation, warmup=WARMUP / steps_of(config)))


def defaults(options: Options, scratch: Path, seed: int) -> Config:
    """The recipe as it comes, at the same rank and epochs."""
    return Config(
        model=Model(name=MINILM),
        data=data_of(options, scratch),
        output=Output(folder=scratch / "defaults", overwrite=True, log_every=100),
        adapter=Adapter(rank=RANK),
        optimisation=Optimisation(epochs=EPOCHS, seed=seed),
    )


def steps_of(config: Config) -> int:
    corpus = read_splits(config)
    tokenizer = runs.load_base(config, corpus.labels).tokenizer
    return len(batches_of(config, make_split_rows(config, tokenizer, corpus, "train").rows, tokenizer)) * EPOCHS


def batches_of(config: Config, rows: Any, tokenizer: Any) -> Any:
    shapes = {"batch_size": config.optimisation.batch_size, "max_length": config.data.max_length}
    return training_batches(rows, **shapes, pad_id=tokenizer.pad_token_id, seed=config.optimisation.seed)


def start(config: Config, labels: Sequence[str]) -> Path:
    """The head and the adapter that jlora begins with, in PEFT's form: which ones are drawn decides a point."""
    loaded = runs.load_base(config, labels)
    folder = config.output.folder.with_name("start")
    save_peft(folder, loaded.model, runs.wrap_base(config, loaded))
    return folder


def run_peft(config: Config) -> dict[str, float]:
    """The job on torch."""
    import numpy as np
    import torch
    import transformers
    from peft import PeftModel

    corpus, options = read_splits(config), config.optimisation
    tokenizer = transformers.AutoTokenizer.from_pretrained(find_folder(config.model.name, None))
    rows = {name: make_split_rows(config, tokenizer, corpus, name).rows for name in corpus.splits}
    tokens = config.data.task == "token_classification"
    kind = transformers.AutoModelForTokenClassification if tokens else transformers.AutoModelForSequenceClassification
    # The base's own dropout is off, as in jlora: it is frozen.
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    base = kind.from_pretrained(find_folder(config.model.name, None), num_labels=len(corpus.labels), **dropout)
    model = PeftModel.from_pretrained(base, start(config, corpus.labels), is_trainable=True)
    trained = [value for value in model.parameters() if value.requires_grad]
    tx = torch.optim.AdamW(trained, lr=1.0, weight_decay=options.weight_decay)
    batches = batches_of(config, rows["train"], tokenizer).map(prepare)
    steps = len(batches) * options.epochs
    rate = schedule(options, steps)

    def logits_of(batch: Any) -> Any:
        return model(torch.tensor(batch["input_ids"]), attention_mask=torch.tensor(batch["attention_mask"])).logits

    model.train()
    for n, prepared in enumerate(batches.repeat(options.epochs)):
        batch = prepared.batch
        losses = torch.nn.functional.cross_entropy(
            logits_of(batch).flatten(0, -2), torch.tensor(batch["labels"]).long().flatten(), reduction="none"
        )
        loss = (losses * torch.tensor(batch["weights"]).flatten()).sum() / len(batch["weights"])
        tx.zero_grad()
        loss.backward()
        tx.param_groups[0]["lr"] = float(rate(n))
        tx.step()
        if n % 100 == 99:
            print(f"peft step {n + 1}/{steps} loss {loss.item():.3f}", flush=True)
    model.eval()
    gold: list[Any] = [None] * len(rows["test"])
    said: list[Any] = [None] * len(rows["test"])
    shapes = {"batch_size": 64, "max_length": config.data.max_length, "pad_id": tokenizer.pad_token_id}
    with torch.no_grad():
        for places, batch in ordered_batches(rows["test"], **shapes):
            best = logits_of(batch).argmax(-1).numpy()
            for line, place in enumerate(places):
                kept = batch["weights"][line] > 0
                gold[place], said[place] = batch["labels"][line][kept], best[line][kept]
    if not tokens:
        return {"accuracy": float(np.mean([(g == s).all() for g, s in zip(gold, said, strict=True)]))}
    names = [[[corpus.labels[n] for n in tags] for tags in all_tags] for all_tags in (gold, said)]
    return entity_scores(*names)._asdict()


def measure(options: Options, scratch: Path) -> None:
    """The test result of every method and seed."""
    stem = RESULTS / f"parity-{options.name}"
    rows = json.loads(stem.with_suffix(".json").read_text()) if stem.with_suffix(".json").exists() else []
    for method, seed in itertools.product(options.methods, options.seeds):
        started = time.perf_counter()
        config = (defaults if method == "defaults" else same_settings)(options, scratch, seed)
        found = run_peft(config) if method == "peft" else train(config).after
        # PEFT's side measures no loss.
        scores = {name: value for name, value in found.items() if name != "loss"}
        row = {"method": method, "seed": seed, **scores, "seconds": time.perf_counter() - started}
        rows = [other for other in rows if (other["method"], other["seed"]) != (method, seed)] + [row]
        order = ("peft", "jlora", "defaults")
        write(stem, sorted(rows, key=lambda row: (order.index(row["method"]), row["seed"])), options, EPOCHS)


def search(options: Options, scratch: Path) -> None:
    """The validation result of `START` and of every change of it, after one epoch."""
    rows: list[dict[str, Any]] = []
    for changes in GRID:
        config = defaults(options, scratch, options.seeds[0])
        # The test file is left out: it must not choose.
        config = changed(config, {"data.test": None, "optimisation.epochs": 1, **START, **changes})
        what = ", ".join(f"{name.partition('.')[2]} = {value}" for name, value in changes.items())
        rows.append({"changed": what or "nothing", **train(config).best})
        write(RESULTS / f"parity-{options.name}-grid", rows, options, 1)


def changed(config: Config, values: dict[str, Any]) -> Config:
    """The job with some values replaced, by section and name."""
    for path, value in values.items():
        section, _, name = path.partition(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def write(stem: Path, rows: list[dict[str, Any]], options: Options, epochs: int) -> None:
    """Rows as JSON, and as a table with the mean of each method that ran with several seeds."""
    stem.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES)
    columns = list(rows[0])
    lines = [
        f"# MiniLM on {options.name}",
        "",
        f"- Command: `python benchmarks/parity.py {options.name} FOLDER{' --grid' if options.grid else ''}`",
        f"- Python {platform.python_version()}, {versions}",
        f"- Rank {RANK}, {count(epochs, 'epoch')}, batches of {BATCH}",
        "",
        "| " + " | ".join(columns) + " |",
        "| " + " | ".join("---" for _ in columns) + " |",
        *("| " + " | ".join(map(shown, row.values())) + " |" for row in [*rows, *means(rows)]),
    ]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each method with several seeds: their mean."""
    found = []
    for method in dict.fromkeys(row.get("method") for row in rows):
        group = [row for row in rows if row.get("method") == method]
        if method is not None and len(group) > 1:
            numbers = {name: statistics.mean(row[name] for row in group) for name in list(group[0])[2:]}
            found.append({"method": method, "seed": "mean", **numbers})
    return found


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        (search if options.grid else measure)(options, Path(scratch))


if __name__ == "__main__":
    main(tyro.cli(Options))
