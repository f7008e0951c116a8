"""One training step, done in several ways that take turns.

    python benchmarks/step.py
    python benchmarks/step.py --size 7b --dtype bfloat16

Every method lives in a process of its own. In each round every one of them takes one step while the others
wait, so what slows the machine down for a while slows all of them; what is reported is the median, over
rounds, of the ratio of two methods' steps in the same round.
"""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from step_methods import METHODS, SIZES, Case, Method, matmul_peak

REFERENCES = ("full", "merge", "qwix", "peft")
DEFAULTS = {"small": tuple(METHODS), "7b": ("merge", "qwix", "peft", "jlora_scan")}
WARM_UP = 2


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, and where to write it."""

    size: Literal["small", "7b"] = "small"
    """Shapes: 12 layers of 768, 4 x 128 tokens; or Llama-2-7B's, scanned, with remat and 4 x 2048 tokens."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the base and the matmuls; float32 for small and bfloat16 for 7b unless given."""
    rounds: int = 12
    """Rounds that are timed; in each, every method takes one step."""
    methods: tuple[Literal["full", "merge", "qwix", "peft", "jlora", "jlora_scan"], ...] = ()
    """Which methods; all of them for small, those that fit on one GPU for 7b unless given."""
    out: Path = Path(__file__).parent / "results"
    """Folder for step.json, step.png and step.md."""


@dataclass
class Row:
    """What came of one method: `problem` says why there are no times."""

    facts: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    problem: str | None = None


def main(options: Options) -> int:
    case = SIZES[options.size]
    case = replace(case, dtype=options.dtype or case.dtype)
    names = options.methods or DEFAULTS[options.size]
    # Several processes share one GPU, so none may take all of its memory at the start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    rows, machine = measure(case, names, options.rounds)
    report = {
        "command": "python benchmarks/step.py " + " ".join(sys.argv[1:]),
        "machine": machine,
        "case": asdict(case),
        "rounds": options.rounds,
        "methods": {name: asdict(row) | {"ratios": ratios(rows, name)} for name, row in rows.items()},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / ("step" if options.size == "small" else f"step-{options.size}")
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    console = Console(width=150)
    console.print(rich_table(report))
    stem.with_suffix(".md").write_text(markdown(report))
    draw(report, stem.with_suffix(".png"))
    failed = [name for name, row in rows.items() if (row.problem or "").startswith("failed")]
    for name in failed:
        print(f"{name}: {rows[name].problem}", file=sys.stderr)
    return 1 if failed else 0


def measure(case: Case, names: tuple[str, ...], rounds: int) -> tuple[dict[str, Row], dict[str, Any]]:
    """Starts a process per method, then lets them take turns."""
    context = multiprocessing.get_context("spawn")
    rows = {name: Row() for name in names}
    workers: dict[str, Any] = {}

    def start(name: str) -> Any:
        here, there = context.Pipe()
        process = context.Process(target=work, args=(there, name, case), daemon=True)
        process.start()
        there.close()
        workers[name] = here, process
        return receive(here, process)

    def settle(name: str, reply: tuple[str, Any]) -> Any:
        kind, value = reply
        if kind == "ok":
            return value
        rows[name].problem = f"{kind}: {value}" if value else kind
        _, process = workers.pop(name)
        process.join()
        print(f"{name}: {rows[name].problem}", flush=True)
        return None

    def look() -> dict[str, Any]:
        kind, value = start("machine")
        if kind != "ok":
            raise RuntimeError(f"the machine could not be measured: {kind}: {value}")
        stop(workers.pop("machine"))
        return value

    load = os.getloadavg()[0]
    machine = look() | {"load": load}
    for name in names:
        begun = time.perf_counter()
        facts = settle(name, start(name))
        if facts is not None:
            rows[name].facts = facts
            print(
                f"{name}: ready after {time.perf_counter() - begun:.0f} s, loss {facts['initial_loss']:.6f}",
                flush=True,
            )
    for turn in range(WARM_UP + rounds):
        for name in list(workers):
            pipe, process = workers[name]
            pipe.send("step")
            times = settle(name, receive(pipe, process))
            if times is not None and turn >= WARM_UP:
                rows[name].seconds.append(times[0])
                rows[name].cpu_seconds.append(times[1])
    for worker in workers.values():
        stop(worker)
    # Before and after, for what else the machine does may lower the one but not raise the other.
    machine["matmul_peak"] = max(machine["matmul_peak"], look()["matmul_peak"])
    return rows, machine


def receive(pipe: Any, process: Any) -> tuple[str, Any]:
    try:
        return pipe.recv()
    except EOFError:
        process.join()
        return (
            "died",
            f"exit code {process.exitcode}; -9 means the system ended it, mostly for want of memory",
        )


def stop(worker: Any) -> None:
    pipe, process = worker
    pipe.send("stop")
    process.join()


def work(pipe: Any, name: str, case: Case) -> None:
    """A method's process: builds it, then takes a step whenever it is told to."""
    try:
        if name == "machine":
            pipe.send(("ok", describe(case)))
            pipe.recv()
            return
        method: Method = METHODS[name](case)
        pipe.send(("ok", method.facts))
        while pipe.recv() == "step":
            begun = time.perf_counter(), time.process_time()
            method.step()
            pipe.send(("ok", (time.perf_counter() - begun[0], time.process_time() - begun[1])))
    except ModuleNotFoundError as error:
        pipe.send(("missing", f"{error.name} is not installed"))
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
            pipe.send(("out of memory", text.splitlines()[0][:200]))
        else:
            pipe.send(("failed", traceback.format_exc()))


def describe(case: Case) -> dict[str, Any]:
    """The device, the libraries, and what one large matmul reaches here."""
    import jax

    versions = {}
    for library in ("jax", "jaxlib", "flax", "optax", "qwix", "torch", "peft", "transformers"):
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = None
    device = jax.devices()[0]
    name = processor() if device.platform == "cpu" else device.device_kind
    return {
        "device": name,
        "cores": len(os.sched_getaffinity(0)),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "versions": versions,
        "matmul_peak": matmul_peak(case.dtype),
    }


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def ratios(rows: dict[str, Row], name: str) -> dict[str, float]:
    """The median over rounds of this method's step over each reference's in the same round."""
    found = {}
    for reference in REFERENCES:
        if reference in rows and rows[reference].seconds and rows[name].seconds:
            pairs = zip(rows[name].seconds, rows[reference].seconds, strict=False)
            found[reference] = statistics.median(one / other for one, other in pairs)
    return found


def cells(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table, as text: head and rows."""
    tokens = report["case"]["batch"] * report["case"]["time"]
    peak = report["machine"]["matmul_peak"]
    head = [
        "method",
        "step s",
        "cpu s",
        *(f"/ {name}" for name in REFERENCES),
        "tokens/s",
        "of peak",
        "temp MB",
        "GFLOP",
    ]
    head += ["compile s", "trained", "first loss"]

    def show(value: float | None, form: str, scale: float = 1.0) -> str:
        return "-" if value is None else format(value / scale, form)

    body = []
    for name, row in report["methods"].items():
        if row["problem"]:
            body.append([name, row["problem"].splitlines()[0], *[""] * (len(head) - 2)])
            continue
        facts, seconds = row["facts"], statistics.median(row["seconds"])
        body.append(
            [
                name,
                f"{seconds:.3f}",
                f"{statistics.median(row['cpu_seconds']):.3f}",
                *(show(row["ratios"].get(reference), ".2f") for reference in REFERENCES),
                f"{tokens / seconds:,.0f}",
                f"{facts['useful_flops'] / seconds / peak:.0%}",
                show(facts["temp_bytes"], ",.0f", 1e6),
                show(facts["flops"], ",.0f", 1e9),
                show(facts["compile_s"], ".1f"),
                f"{facts['trained']:,}",
                f"{facts['initial_loss']:.5f}",
            ]
        )
    return head, body


def rich_table(report: dict[str, Any]) -> Table:
    head, body = cells(report)
    table = Table(title=f"One training step, median of {report['rounds']} rounds")
    for column in head:
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for row in body:
        table.add_row(*row)
    return table


def markdown(report: dict[str, Any]) -> str:
    head, body = cells(report)
    machine, case = report["machine"], report["case"]
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in machine["versions"].items())
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)]
    shape = (
        f"{case['num_layers']} layers, {case['hidden_size']} wide, {case['intermediate_size']} inside, "
        f"vocabulary {case['vocab_size']:,}, batch {case['batch']} x {case['time']}, rank {case['rank']}, "
        f"{case['dtype']}"
    )
    return "\n".join(
        [
            "# One training step",
            "",
            f"- Command: `{report['command'].strip()}`",
            f"- Device: {machine['device']}, {machine['cores']} cores, {machine['platform']}",
            f"- Load when it began: {machine['load']:.1f} (near 0 on a machine that does nothing else)",
            f"- Python {machine['python']}, {versions}",
            f"- XLA_FLAGS: {machine['xla_flags'] or 'none'}",
            f"- Model: {shape}",
            f"- Matmul peak here: {machine['matmul_peak'] / 1e12:.3f} TFLOP/s",
            f"- {report['rounds']} rounds; ratios are medians over rounds of two steps of the same round",
            "",
            *lines,
            "",
        ]
    )


def draw(report: dict[str, Any], path: Path) -> None:
    """Every method's steps on the left, what XLA holds during one on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    done = {name: row for name, row in report["methods"].items() if row["seconds"]}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 0.5 * len(done) + 1.6), sharey=True)
    names = list(done)[::-1]
    colours = ["tab:orange" if name.startswith("jlora") else "tab:gray" for name in names]
    medians = [statistics.median(done[name]["seconds"]) for name in names]
    left.barh(names, medians, color=colours)
    for at, name in enumerate(names):
        left.plot(done[name]["seconds"], [at] * len(done[name]["seconds"]), "|", color="black", markersize=8)
    left.set_xlabel("seconds per step (bars: medians, marks: rounds)")
    held = [(done[name]["facts"]["temp_bytes"] or 0) / 1e6 for name in names]
    right.barh(names, held, color=colours)
    for at, value in enumerate(held):
        right.text(value, at, f" {value:,.0f}" if value else " not measured", va="center")
    right.set_xlabel("temporary memory, MB")
    right.margins(x=0.2)
    figure.suptitle(f"One training step, {report['machine']['device']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options)))
