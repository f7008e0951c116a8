"""LoRA against the other ways to fine-tune: one model, the same rows in the same batches, as many steps.

    python benchmarks/methods.py                         # MiniLM on the questions of examples/faq
    python benchmarks/methods.py --model stories         # stories260K on sonnets
    python benchmarks/methods.py --rates 1e-4 1e-3       # every method at each rate, the best on validation kept

Every method trains with the same optimizer and schedule, at the rate that stands in `RATES`; then its test result, what
it holds and what its forward pass costs. Forward passes take turns, and a ratio is the median over rounds of two passes
of the same round: what slows the machine down slows both.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from safetensors.numpy import save_file
from tuning import METHODS, RANK, TOKENS, Method, loss_fn, merged, optimizer

from jlora.data.batches import Row, buckets, make_rows, ordered_batches, training_batches
from jlora.data.readers import Text
from jlora.hf.load import load_model
from jlora.runs import config as configs
from jlora.runs.folder import load_base
from jlora.runs.job_data import make_split_rows, read_splits
from jlora.tasks.tasks import pad_token
from jlora.training.step import TrainState, make_train_step
from jlora.tree.paths import Tree, flatten
from jlora.tree.splitting import join

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "shared/data"
HEAD_RATE = 1e-2
# Chosen with --rates after one epoch, by the loss on the validation rows; stories' prompt takes MiniLM's.
RATES = {
    "minilm": {
        "base": HEAD_RATE,
        "full": 1e-4,
        "houlsby-64": 3e-3,
        "houlsby-8": 1e-2,
        "prefix": 5e-2,
        "prompt": 5e-2,
        "lora": 3e-3,
    },
    "stories": {
        "base": HEAD_RATE,
        "full": 3e-3,
        "houlsby-64": 1e-2,
        "houlsby-8": 1e-2,
        "prefix": 5e-2,
        "prompt": 5e-2,
        "lora": 1e-2,
    },
}
NAMES = {
    "base": "the base",
    "full": "full fine-tuning",
    "houlsby-64": "Houlsby adapters, 64",
    "houlsby-8": "Houlsby adapters, 8",
    "prefix": f"prefix tuning, {TOKENS}",
    "prompt": f"prompt tuning, {TOKENS}",
    "lora": f"LoRA, rank {RANK}",
    "merged": f"LoRA, rank {RANK}, merged",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to train, and where to write it."""

    model: Literal["minilm", "stories"] = "minilm"
    """MiniLM and examples/faq, or stories260K and sonnets."""
    methods: tuple[Literal["base", "full", "houlsby-64", "houlsby-8", "prefix", "prompt", "lora"], ...] = tuple(METHODS)
    """What to compare; the base is always there, to compare with."""
    epochs: int = 3
    """Passes over the training rows."""
    rates: tuple[float, ...] = ()
    """Train each method at each of these instead of at its own, and keep the best on validation."""
    rounds: int = 200
    """Rounds of forward passes that are timed."""
    seed: int = 0
    """Fixes the head, what the methods add, and the order of the rows."""
    stories: Path = DATA / "stories260K/hf"
    """A folder with stories260K in Hugging Face form."""
    sonnets: Path = DATA / "sonnets/shakespeare.txt"
    """A file of sonnets, each under its number."""
    out: Path = HERE / "results"
    """Folder for methods-MODEL.json, .md and .png."""


class Work(NamedTuple):
    """A model and what it is to learn.

    Attributes:
        model: the module.
        params: its parameters.
        rows: by split.
        shapes: of batches: batch_size, max_length and pad_id.
        measure: what is shown of the test: "accuracy" or "loss".
        about: both, in words.
    """

    model: Any
    params: Tree
    rows: dict[str, list[Row]]
    shapes: dict[str, int]
    measure: str
    about: str


def minilm(options: Options) -> Work:
    """MiniLM with a new head of 26 classes."""
    config = configs.read(HERE.parent / "examples/faq.toml")
    corpus = read_splits(config)
    loaded = load_base(config, corpus.labels)
    rows = {split: make_split_rows(config, loaded.tokenizer, corpus, split).rows for split in corpus.splits}
    shapes = {"batch_size": 32, "max_length": config.data.max_length, "pad_id": pad_token(loaded.tokenizer)}
    return Work(loaded.model, loaded.params, rows, shapes, "accuracy", "MiniLM-L6 on examples/faq (26 classes)")


def stories(options: Options) -> Work:
    """stories260K as it is; of ten sonnets one is for validation and one for the test."""
    loaded = load_model(options.stories)
    split = re.split(r"^\s*\d+\s*$", options.sonnets.read_text(encoding="utf-8"), flags=re.MULTILINE)
    poems = [Text(poem.strip()) for poem in split if poem.strip()]
    parts: dict[str, list[Text]] = {"train": [], "validation": [], "test": []}
    for n, poem in enumerate(poems):
        parts[{0: "test", 1: "validation"}.get(n % 10, "train")].append(poem)
    rows = {name: make_rows(loaded.tokenizer, part, max_length=384).rows for name, part in parts.items()}
    shapes = {"batch_size": 8, "max_length": 384, "pad_id": pad_token(loaded.tokenizer)}
    return Work(loaded.model, loaded.params, rows, shapes, "loss", f"stories260K on {len(poems)} sonnets")


WORKS: dict[str, Callable[[Options], Work]] = {"minilm": minilm, "stories": stories}


def main(options: Options) -> None:
    load = os.getloadavg()[0]
    work = WORKS[options.model](options)
    rows: dict[str, dict[str, Any]] = {}
    ready: dict[str, Method] = {}
    for name in dict.fromkeys(("base", *options.methods)):
        rows[name], ready[name] = run(name, work, options)
        print(f"{name}: {json.dumps(rows[name])}", flush=True)
    if "lora" in ready:
        ready["merged"] = merged(work.model, ready["lora"].tree)
        # What is trained and held while training is the adapter's; what is shipped is the whole model.
        kept = {part: rows["lora"][part] for part in ("rate", "trained", "share", "optimizer_bytes", "temp_bytes")}
        rows["merged"] = kept | judged(ready["merged"], work)
    for name, ratio in forward_times(ready, work, options.rounds).items():
        rows[name] |= ratio
    report = {"about": about(options, work, load), "measure": work.measure, "methods": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"methods-{options.model}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(report))
    draw(report, stem.with_suffix(".png"))
    print(markdown(report))


def run(name: str, work: Work, options: Options) -> tuple[dict[str, Any], Method]:
    """Trains a method at each of its rates; gives the best of them and the method with what it has learnt."""
    rates = options.rates or (RATES[options.model][name],)
    tries = [(rate, *train(name, work, options, rate)) for rate in rates]
    losses = {rate: score(method, method.tree, work.rows["validation"], **work.shapes) for rate, method, _ in tries}
    rate, method, facts = min(tries, key=lambda one: losses[one[0]]["loss"])
    tried = [{"rate": rate, **scores} for rate, scores in losses.items()]
    return {"rate": rate, **facts, **judged(method, work), "tried": tried}, method


def train(name: str, work: Work, options: Options, rate: float) -> tuple[Method, dict[str, Any]]:
    """The method with what it has learnt, and what learning it took."""
    method = METHODS[name](work.model, work.params, jax.random.key(options.seed + 1))
    batches = training_batches(work.rows["train"], **work.shapes, seed=options.seed)
    tx = optimizer(method, rate, HEAD_RATE, len(batches) * options.epochs)
    trained, frozen = method.split()
    if not trained:
        return method, dict.fromkeys(("trained", "share", "head", "optimizer_bytes", "temp_bytes", "steps"), 0)
    step, state = make_train_step(loss_fn(method), tx), TrainState.create(trained, tx, jax.random.key(options.seed))
    head = sum(leaf.size for path, leaf in flatten(trained).items() if re.fullmatch(method.head, path))
    total = sum(leaf.size for leaf in jax.tree.leaves(work.params)) - head
    own = sum(leaf.size for leaf in jax.tree.leaves(trained)) - head
    facts = {"trained": own, "share": own / total, "head": head, "optimizer_bytes": bytes_of(state.opt_state)}
    compiled: dict[tuple[int, ...], Any] = {}
    start, losses = time.perf_counter(), []
    for batch in batches.repeat(options.epochs):
        shape = batch["input_ids"].shape
        if shape not in compiled:
            compiled[shape] = step.lower(state, frozen, batch).compile()
        state, metrics = compiled[shape](state, frozen, batch)
        losses.append(metrics["loss"])
    facts["temp_bytes"] = max(made.memory_analysis().temp_size_in_bytes for made in compiled.values())
    facts |= {"steps": len(losses), "train_loss": float(np.mean(losses[-10:])), "seconds": time.perf_counter() - start}
    tree = join(state.adapters, frozen)
    return replace(method, tree=tree), facts


def judged(method: Method, work: Work) -> dict[str, Any]:
    """What a trained method comes to on the test rows, on disk, and in a forward pass."""
    with tempfile.TemporaryDirectory() as folder:
        size = write_adapter(method, Path(folder) / "adapter.safetensors")
    found = score(method, method.tree, work.rows["test"], **work.shapes)
    return {"disk_bytes": size, "flops": forward_flops(method, *one_row(work)), **found}


def score(method: Method, tree: Tree, rows: Sequence[Row], **shapes: int) -> dict[str, float]:
    """Mean cross entropy and accuracy over all targets of some rows."""

    @jax.jit
    def sums(tree: Tree, batch: Any) -> Any:
        logits = method.apply(tree, batch["input_ids"], batch["attention_mask"]).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        right, weights = logits.argmax(-1) == batch["labels"], batch["weights"]
        return (losses * weights).sum(), (right * weights).sum(), weights.sum()

    found = [jax.device_get(sums(tree, batch)) for _, batch in ordered_batches(rows, **shapes)]
    loss, right, total = np.sum(np.asarray(found, float), axis=0)
    return {"loss": float(loss / total), "accuracy": float(right / total)}


def write_adapter(method: Method, path: Path) -> int:
    """Writes what has to be kept beside the base, and beside a new head; gives the bytes of the file."""
    leaves = flatten(method.tree if method.whole else method.split()[0])
    save_file({name: np.asarray(leaf) for name, leaf in leaves.items() if not re.fullmatch(method.head, name)}, path)
    return path.stat().st_size


def bytes_of(tree: Tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def one_row(work: Work) -> tuple[Any, Any]:
    """A row of the training data's largest shape, all of it text."""
    length = max(buckets(work.rows["train"], work.shapes["max_length"]))
    ids = np.random.default_rng(0).integers(1, work.model.config.vocab_size, (1, length), dtype=np.int32)
    return jnp.asarray(ids), jnp.ones((1, length), jnp.int32)


def forward(method: Method, ids: Any, mask: Any) -> Any:
    """The compiled forward pass."""
    return jax.jit(method.apply).lower(method.tree, ids, mask).compile()


def forward_flops(method: Method, ids: Any, mask: Any) -> float:
    """Floating-point operations of a forward pass, by XLA's count."""
    return forward(method, ids, mask).cost_analysis()["flops"]


def forward_times(ready: dict[str, Method], work: Work, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a forward pass of one row, and the ratio to the base's."""
    ids, mask = one_row(work)
    passes = {name: forward(method, ids, mask) for name, method in ready.items()}
    taken: dict[str, list[float]] = {name: [] for name in ready}
    names = list(ready)
    for turn in range(rounds + 10):
        # Whoever comes first finds the caches cold, so that changes from round to round.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            jax.block_until_ready(passes[name](ready[name].tree, ids, mask))
            if turn >= 10:
                taken[name].append(time.perf_counter() - start)
    ratios = {name: statistics.median(map(lambda a, b: a / b, taken[name], taken["base"])) for name in taken}
    return {name: {"forward_ms": statistics.median(taken[name]) * 1e3, "forward": ratios[name]} for name in taken}


def about(options: Options, work: Work, load: float) -> dict[str, Any]:
    """What was run, where and on what."""
    libraries = ("jax", "jaxlib", "flax", "optax", "jlora")
    counts = ", ".join(f"{len(rows)} {split}" for split, rows in work.rows.items())
    return {
        "command": " ".join(["python benchmarks/methods.py", *sys.argv[1:]]),
        "work": f"{work.about}: {counts} rows, {options.epochs} epochs of batches of {work.shapes['batch_size']}",
        "row": one_row(work)[0].shape[1],
        "machine": f"{jax.devices()[0].device_kind}, {len(os.sched_getaffinity(0))} cores, {platform.machine()}, "
        f"load {load:.1f} when it began",
        "versions": f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries),
        "rounds": options.rounds,
        "head_parameters": sum(leaf.size for leaf in jax.tree.leaves(work.params.get("classifier", {}))),
        "head_rate": HEAD_RATE,
    }


def markdown(report: dict[str, Any]) -> str:
    """The table, with what it was measured on."""
    told = report["about"]
    test = f"test {report['measure']}"
    head = ["method", "rate", "trained", "% of base", "optimizer MB", "temp MB", "on disk MB", "forward", "FLOPs", test]
    body = [cells(name, row, report) for name, row in report["methods"].items()]
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)]
    notes = [
        f"- Command: `{told['command']}`",
        f"- {told['work']}",
        f"- {told['machine']}; {told['versions']}",
        f"- *trained*: without the new head ({told['head_parameters']:,} parameters, trained by all at "
        f"{told['head_rate']:g})" + ("" if told["head_parameters"] else ": there is none here"),
        "- *optimizer MB*: state of AdamW, the head's too; *temp MB*: what XLA holds in a step beside its arguments",
        f"- *forward*: time of one row of {told['row']} tokens over the base's, median of {told['rounds']} rounds; "
        "*FLOPs*: by XLA's count, over the base's",
    ]
    return "\n".join([f"# Ways to fine-tune: {told['work'].partition(':')[0]}", "", *notes, "", *lines, ""])


def cells(name: str, row: dict[str, Any], report: dict[str, Any]) -> list[str]:
    cost = [f"{row['forward']:.2f}", f"{row['flops'] / report['methods']['base']['flops']:.3f}"]
    sizes = [f"{row[part] / 1e6:,.2f}" for part in ("optimizer_bytes", "temp_bytes", "disk_bytes")]
    share = f"{100 * row['share']:.2f}"
    return [
        NAMES[name],
        f"{row['rate']:g}",
        f"{row['trained']:,}",
        share,
        *sizes,
        *cost,
        f"{row[report['measure']]:.3f}",
    ]


def draw(report: dict[str, Any], path: Path) -> None:
    """The test result against the parameters trained."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for name, row in report["methods"].items():
        # Merging changes neither, and nothing has no place on a logarithmic axis.
        if name == "merged" or not row["trained"]:
            continue
        point = row["trained"], row[report["measure"]]
        axes.plot(*point, "o", color="tab:orange" if name == "lora" else "tab:gray", markersize=8)
        # LoRA's neighbours are on its right.
        at = {"xytext": (-9, -4), "ha": "right"} if name == "lora" else {"xytext": (0, 9), "ha": "center"}
        axes.annotate(NAMES[name], point, textcoords="offset points", **at)
    base = report["methods"]["base"][report["measure"]]
    axes.axhline(base, color="tab:gray", linestyle="--", linewidth=1)
    end = {"xytext": (-4, 4), "textcoords": "offset points", "ha": "right"}
    axes.annotate(NAMES["base"], (1, base), xycoords=("axes fraction", "data"), **end)
    axes.set_xscale("log")
    axes.margins(x=0.15, y=0.15)
    axes.set_xlabel("parameters trained, without the head")
    axes.set_ylabel(f"test {report['measure']}")
    axes.set_title(report["about"]["work"].partition(":")[0])
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Options))
