"""Five ranks trained at once against five runs one after the other.

    python benchmarks/sweep.py --stories FOLDER          # karpathy's stories260K in Hugging Face form

Two models: stories260K, on random rows of 8 x 256 tokens, and MiniLM with a new head, on 32 x 32 tokens. Steps take
turns in one process: in every round each rank takes some steps of its own, then all of them take as many together.
Whole runs are processes of their own that import, load, compile and take 300 steps; five of one rank each, one after
the other, against one of all five.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

RESULTS = Path(__file__).parent / "results"
RANKS = (4, 8, 16, 32, 64)
RATE = 1e-3
LIBRARIES = ("jax", "jaxlib", "flax", "optax")


@dataclass(frozen=True)
class Options:
    """What to measure."""

    stories: Path | None = None
    """Folder of stories260K; left out, MiniLM alone is measured."""
    rounds: int = 8
    """Rounds of the steps' comparison."""
    steps: int = 5
    """Steps that each takes in a round."""
    whole: int = 300
    """Steps of a whole run; 0 leaves whole runs out."""
    work: Literal["", "alone", "together"] = ""
    """Used by the program itself: be one of the whole runs."""
    rank: int = 0
    """Likewise: of which rank."""


class Case(NamedTuple):
    """A model to fine-tune: its loss, how it is wrapped, one batch, and the leaves trained in full."""

    loss_fn: Any
    start: Any
    batch: dict[str, Any]
    train: tuple[str, ...]


def stories(folder: Path) -> Case:
    import jlora

    loaded = jlora.load_model(folder)
    model = loaded.model
    ids = draw((8, 256), loaded.config.vocab_size)
    hidden = jlora.adapt(lambda params, ids: model.apply({"params": params}, ids, method="hidden"))
    head = jlora.adapt(lambda params, hidden: model.apply({"params": params}, hidden, method="head"))

    def loss_fn(params: Any, batch: Any, key: Any) -> Any:
        return jlora.cross_entropy(head, params, hidden(params, batch["ids"]), batch["labels"])

    return Case(loss_fn, starter(loaded), {"ids": ids, "labels": ids[:, ::-1].copy()}, ())


def minilm() -> Case:
    import jax.numpy as jnp
    import numpy as np
    import optax

    import jlora
    from jlora.hf.load import MINILM

    loaded = jlora.load_model(MINILM, num_labels=150)
    model = loaded.model
    ids = draw((32, 32), loaded.config.vocab_size)
    logits = jlora.adapt(lambda params, ids: model.apply({"params": params}, ids, jnp.ones_like(ids)))

    def loss_fn(params: Any, batch: Any, key: Any) -> Any:
        found = logits(params, batch["ids"])
        return optax.softmax_cross_entropy_with_integer_labels(found, batch["labels"]).mean()

    return Case(loss_fn, starter(loaded), {"ids": ids, "labels": np.arange(32)}, ("classifier",))


def draw(shape: tuple[int, int], words: int) -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(3, words, shape).astype(np.int32)


def starter(loaded: Any) -> Any:
    """Wraps all linear layers, at a member's rank where there is room for it."""
    import re

    import jax

    import jlora
    from jlora.tree.paths import flatten

    model = loaded.model
    sizes = {path: min(leaf.shape) for path, leaf in flatten(loaded.params).items() if leaf.ndim == 2}
    targets = {path: size for path, size in sizes.items() if re.fullmatch(model.lora_targets, path)}

    def start(member: Any) -> Any:
        ranks = {re.escape(path): min(member.rank, size) for path, size in targets.items()}
        return jlora.wrap(loaded.params, targets=ranks, key=jax.random.key(member.seed))

    return start


def alone(case: Case, rank: int) -> tuple[Any, Any, Any]:
    """The step of one rank, its first state, and the base."""
    import jax
    import optax

    import jlora
    from jlora.runs.sweep import Member

    tx = optax.adamw(RATE)
    adapters, base = jlora.split(case.start(Member(rank, RATE, 0)), case.train)
    state = jlora.TrainState.create(adapters, tx, jax.random.key(0))
    return jlora.make_train_step(case.loss_fn, tx), state, base


def together(case: Case, ranks: tuple[int, ...]) -> Any:
    """All ranks over one base."""
    import jax
    import optax

    from jlora.runs.sweep import Field, Member

    members = [Member(rank, RATE, 0) for rank in ranks]
    return Field(case.loss_fn, members, case.start, optax.adamw, jax.random.key, case.train, 1, None)


def compare(case: Case, rounds: int, steps: int) -> dict[str, float]:
    """Times of steps and of compiling, one way over the other, and the bytes both are called with."""
    import jax

    solos, compile_alone, bytes_alone = [], 0.0, 0
    for rank in RANKS:
        step, state, base = alone(case, rank)
        begun = time.perf_counter()
        compiled = step.lower(state, base, case.batch).compile()
        compile_alone += time.perf_counter() - begun
        bytes_alone += compiled.memory_analysis().argument_size_in_bytes
        solos.append([compiled, state, base])
    field = together(case, RANKS)
    group, side = field.members, 1 if jax.default_backend() == "cpu" else len(RANKS)
    states, each = field.states(group), field.each(group, [True] * len(group))
    batches = field.together({0: case.batch})
    begun = time.perf_counter()
    program = field.program.lower(states, field.base, batches, each, side).compile()
    compile_together = time.perf_counter() - begun

    def solo() -> None:
        for entry in solos:
            for _ in range(steps):
                entry[1], metrics = entry[0](entry[1], entry[2], case.batch)
            jax.block_until_ready(metrics)

    def joint() -> None:
        nonlocal states
        for _ in range(steps):
            states, metrics = program(states, field.base, batches, each)
        jax.block_until_ready(metrics)

    ratios, times = [], []
    for turn in range(rounds + 1):
        pair = [timed(way) for way in ((solo, joint) if turn % 2 else (joint, solo))]
        one, all_of = pair if turn % 2 else reversed(pair)
        if turn:
            ratios.append(all_of / one)
            times.append(all_of / steps)
    return {
        "step": statistics.median(ratios),
        "seconds": statistics.median(times),
        "compile": compile_together / compile_alone,
        "base_mb": sum(leaf.nbytes for leaf in jax.tree.leaves(field.base)) / 1e6,
        "argument_mb": program.memory_analysis().argument_size_in_bytes / 1e6,
        "argument_mb_alone": bytes_alone / 1e6,
        "temporary_mb": program.memory_analysis().temp_size_in_bytes / 1e6,
    }


def timed(way: Any) -> float:
    begun = time.perf_counter()
    way()
    return time.perf_counter() - begun


def run(options: Options) -> None:
    """One whole run, in this process."""
    import jax
    import optax

    import jlora

    assert options.stories is not None
    case = stories(options.stories)

    def batches(seed: int) -> Iterator[Any]:
        while True:
            yield case.batch

    forward = jax.jit(lambda params: case.loss_fn(params, case.batch, None))
    if options.work == "together":
        evaluate = lambda params: {"loss": float(forward(params))}
        every = options.whole // 3
        jlora.sweep(
            case.loss_fn, case.start, batches, evaluate, steps=options.whole, ranks=RANKS, optimizer=optax.adamw,
            evaluate_every=every,
        )  # fmt: skip
        return
    step, state, base = alone(case, options.rank)
    for n in range(1, options.whole + 1):
        state, metrics = step(state, base, case.batch)
        if n % 10 == 0:
            float(metrics["loss"])
        if n % (options.whole // 3) == 0:
            float(forward(jlora.join(state.adapters, base)))


def whole(options: Options) -> dict[str, float]:
    """Wall and processor seconds of whole processes: five alone, and one together."""
    command = [sys.executable, __file__, "--stories", str(options.stories), "--whole", str(options.whole), "--work"]
    found = {}
    for way, runs in (("alone", [["--rank", str(rank)] for rank in RANKS]), ("together", [[]])):
        before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        for more in runs:
            subprocess.run([*command, way, *more], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found[f"{way}_seconds"] = time.perf_counter() - begun
        found[f"{way}_cpu_seconds"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return found | {
        "wall": found["together_seconds"] / found["alone_seconds"],
        "cpu": found["together_cpu_seconds"] / found["alone_cpu_seconds"],
    }


def main(options: Options) -> None:
    if options.work:
        return run(options)
    load = os.getloadavg()[0]
    cases = {"stories260K": stories(options.stories)} if options.stories else {}
    cases["MiniLM"] = minilm()
    rows = {name: compare(case, options.rounds, options.steps) for name, case in cases.items()}
    runs = whole(options) if options.stories and options.whole else {}
    import jax

    device = jax.devices()[0].device_kind
    text = "\n".join([*heading(options, load, device), *table(rows), *said(runs, options)]) + "\n"
    (RESULTS / "sweep.md").write_text(text)
    (RESULTS / "sweep.json").write_text(json.dumps({"steps": rows, "whole": runs, "load": load}, indent=1) + "\n")
    print(text)
    return None


def heading(options: Options, load: float, device: str) -> list[str]:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES)
    given = "python benchmarks/sweep.py" + (" --stories FOLDER" if options.stories else "")
    return [
        "# Five ranks at once",
        "",
        f"- Command: `{given}`",
        f"- Device: {device}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        f"- Load when it began: {load:.1f} (near 0 on a machine that does nothing else)",
        f"- Python {platform.python_version()}, {versions}",
        f"- Ranks {', '.join(map(str, RANKS))}; medians over {options.rounds} rounds of {options.steps} steps each way",
        "",
    ]


def table(rows: dict[str, dict[str, float]]) -> list[str]:
    head = ("model", "step, of five alone", "compile, of five alone", "base MB", "arguments MB", "of five alone MB")
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for name, row in rows.items():
        cells = [f"{row['step']:.2f}", f"{row['compile']:.2f}"]
        cells += [f"{row[key]:.1f}" for key in ("base_mb", "argument_mb", "argument_mb_alone")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def said(runs: dict[str, float], options: Options) -> list[str]:
    if not runs:
        return []
    return [
        "",
        f"Whole processes of {options.whole} steps of stories260K: all five at once take {runs['wall']:.2f} of the "
        f"wall time of one after the other ({runs['together_seconds']:.0f} s of {runs['alone_seconds']:.0f} s), and "
        f"{runs['cpu']:.2f} of the processor time.",
    ]


if __name__ == "__main__":
    main(tyro.cli(Options))
