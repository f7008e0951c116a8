"""Tokens per second with the key-value cache, without it, with an adapter, and by transformers in torch.

    python benchmarks/generation.py

Every method lives in a process of its own and they take turns, as in step.py; ratios are medians, over rounds, of
two methods in the same round. All continue the same prompt greedily with the same weights.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table
from step import describe, receive, stop
from step_methods import Case, _random_params

PROMPT = 16
RANK = 8
LEAST = 5.0
WIDE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, and where to write it."""

    tokens: int = 256
    """New tokens of each continuation."""
    rounds: int = 5
    """Rounds that are timed; in each, every method has one turn."""
    stories: Path = Path(__file__).parents[2] / "shared/data/stories260K/hf"
    """A folder with stories260K in Hugging Face form; left out of the table where it is missing."""
    out: Path = Path(__file__).parent / "results"
    """Folder for generation.json and generation.md."""


# Gives the new tokens once they are all there.
Turn = Callable[[], list[int]]


def cached(folder: Path, tokens: int) -> Turn:
    """`jlora.generate` on the base."""
    loaded, prompt = load(folder)
    return continuation(loaded.model, loaded.params, prompt, tokens)


def wrapped(folder: Path, tokens: int) -> Turn:
    """`jlora.generate` on a wrapped tree: every projection has an adapter, which is not merged."""
    import jlora

    loaded, prompt = load(folder)
    params = jlora.wrap(loaded.params, rank=RANK, targets=loaded.model.lora_targets)
    return continuation(loaded.model, params, prompt, tokens)


def uncached(folder: Path, tokens: int) -> Turn:
    """The whole forward pass again for each token, at the static length of all of them; a few tokens will do."""
    import jax
    import jax.numpy as jnp

    loaded, prompt = load(folder)
    few = max(1, tokens // 32)
    ids = jnp.zeros((1, PROMPT + tokens), jnp.int32).at[:, :PROMPT].set(jnp.array(prompt))

    @jax.jit
    def run(params: Any, ids: Any) -> Any:
        def advance(at: Any, ids: Any) -> Any:
            hidden = loaded.model.apply({"params": params}, ids, method="hidden")
            logits = loaded.model.apply({"params": params}, hidden[:, at - 1], method="head")
            return ids.at[:, at].set(logits.argmax(axis=-1))

        return jax.lax.fori_loop(PROMPT, PROMPT + few, advance, ids)

    return lambda: run(loaded.params, ids)[0, PROMPT : PROMPT + few].tolist()


def torch(folder: Path, tokens: int) -> Turn:
    """`generate` of transformers in torch, on one thread or on all cores, whichever is faster here."""
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor(prompt_of(model.config.vocab_size))

    def turn(tokens: int = tokens) -> list[int]:
        settings = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
        with torch.inference_mode():
            found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        return found[0, PROMPT:].tolist()

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        turn(2)
        begun = time.perf_counter()
        turn(16)
        return time.perf_counter() - begun

    torch.set_num_threads(min((1, len(os.sched_getaffinity(0))), key=seconds))
    return turn


METHODS = {"cached": cached, "wrapped": wrapped, "uncached": uncached, "torch": torch}


def continuation(model: Any, params: Any, prompt: list[list[int]], tokens: int) -> Turn:
    from jlora.models.generate import generate

    return lambda: generate(model, params, prompt, max_new_tokens=tokens)[0].tolist()


def load(folder: Path) -> tuple[Any, list[list[int]]]:
    import jlora

    loaded = jlora.load_model(folder)
    return loaded, prompt_of(loaded.model.config.vocab_size)


def prompt_of(vocab: int) -> list[list[int]]:
    return [[1, *((7 * n + 3) % vocab for n in range(PROMPT - 1))]]


def make_wide(folder: Path) -> None:
    """A random Llama, as `WIDE` says, in Hugging Face form."""
    import jax.numpy as jnp
    from transformers import LlamaConfig

    from jlora.hf.load import save_model
    from jlora.models.decoder import Decoder, DecoderConfig
    from jlora.models.layers import Origin

    model = Decoder(DecoderConfig.from_hf(LlamaConfig(**WIDE)), origin=Origin("wide", json.dumps(WIDE)))
    save_model(folder, model, _random_params(model, jnp.zeros((1, 1), jnp.int32)))


def work(pipe: Any, name: str, folder: Path, tokens: int) -> None:
    """A process: makes the random model, looks at the machine, or is a method that takes a turn when told to."""
    try:
        if name == "machine":
            make_wide(folder)
            pipe.send(("ok", describe(Case())))
            pipe.recv()
            return
        turn = METHODS[name](folder, tokens)
        pipe.send(("ok", turn()))
        while pipe.recv() == "turn":
            begun = time.perf_counter()
            count = len(turn())
            pipe.send(("ok", (time.perf_counter() - begun) / count))
    except ModuleNotFoundError as error:
        pipe.send(("missing", f"{error.name} is not installed"))
    except Exception:
        pipe.send(("failed", traceback.format_exc()))


def start(name: str, folder: Path, tokens: int) -> tuple[Any, Any, tuple[str, Any]]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=work, args=(there, name, folder, tokens), daemon=True)
    process.start()
    there.close()
    return here, process, receive(here, process)


def measure(folder: Path, options: Options) -> dict[str, dict[str, Any]]:
    """Seconds per token of every method, round by round, and its first tokens."""
    rows: dict[str, dict[str, Any]] = {}
    workers = {}
    for name in METHODS:
        pipe, process, (kind, value) = start(name, folder, options.tokens)
        rows[name] = {"seconds": [], "tokens": value if kind == "ok" else [], "problem": None}
        if kind == "ok":
            workers[name] = pipe, process
        else:
            rows[name]["problem"] = f"{kind}: {value}"
            print(f"{name}: {kind}: {value}", flush=True)
    for _ in range(options.rounds):
        for name, (pipe, process) in workers.items():
            pipe.send("turn")
            kind, value = receive(pipe, process)
            if kind != "ok":
                raise RuntimeError(f"{name}: {kind}: {value}")
            rows[name]["seconds"].append(value)
    for worker in workers.values():
        stop(worker)
    return rows


def main(options: Options) -> int:
    load = os.getloadavg()[0]
    # Threads of torch that wait actively would slow down whatever else the machine does, their own process included.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with tempfile.TemporaryDirectory() as temporary:
        wide = Path(temporary) / "wide"
        pipe, process, (kind, machine) = start("machine", wide, 0)
        if kind != "ok":
            raise RuntimeError(f"the model could not be made: {machine}")
        stop((pipe, process))
        folders = {"stories260K": options.stories, "8 x 512": wide}
        models = {name: measure(folder, options) for name, folder in folders.items() if folder.is_dir()}
    report = {
        "command": "python benchmarks/generation.py " + " ".join(sys.argv[1:]),
        "machine": machine | {"load": load},
        "tokens": options.tokens,
        "rounds": options.rounds,
        "models": models,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "generation.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "generation.md").write_text(markdown(report))
    Console(width=120).print(rich_table(report))
    slow = {name: ratio(rows, "uncached") for name, rows in models.items() if ratio(rows, "uncached") < LEAST}
    for name, times in slow.items():
        print(f"{name}: the cache is {times:.1f} times as fast, not {LEAST}", file=sys.stderr)
    failed = [row for rows in models.values() for row in rows.values() if (row["problem"] or "").startswith("failed")]
    return 1 if slow or failed else 0


def ratio(rows: dict[str, dict[str, Any]], name: str) -> float:
    """The median over rounds of a method's time over that of the cached one."""
    pairs = zip(rows[name]["seconds"], rows["cached"]["seconds"], strict=True)
    return statistics.median(one / other for one, other in pairs)


def cells(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table, as text: head and rows."""
    head = ["model", "method", "tokens/s", "ms per token", "time / cached", "tokens as cached"]
    body = []
    for model, rows in report["models"].items():
        for name, row in rows.items():
            if row["problem"]:
                body.append([model, name, row["problem"].splitlines()[0], "", "", ""])
                continue
            seconds = statistics.median(row["seconds"])
            same = sum(one == other for one, other in zip(row["tokens"], rows["cached"]["tokens"], strict=False))
            body.append(
                [
                    model,
                    name,
                    f"{1 / seconds:,.0f}",
                    f"{1e3 * seconds:.3f}",
                    f"{ratio(rows, name):.2f}",
                    f"{same} of {len(row['tokens'])}",
                ]
            )
    return head, body


def rich_table(report: dict[str, Any]) -> Table:
    head, body = cells(report)
    table = Table(title=f"{report['tokens']} new tokens, batch 1, median of {report['rounds']} rounds")
    for column in head:
        table.add_column(column, justify="left" if column in head[:2] else "right", no_wrap=True)
    for row in body:
        table.add_row(*row)
    return table


def markdown(report: dict[str, Any]) -> str:
    head, body = cells(report)
    machine = report["machine"]
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in machine["versions"].items())
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)]
    return "\n".join(
        [
            "# Generation",
            "",
            f"- Command: `{report['command'].strip()}`",
            f"- Device: {machine['device']}, {machine['cores']} cores, {machine['platform']}",
            f"- Load when it began: {machine['load']:.1f} (near 0 on a machine that does nothing else)",
            f"- Python {machine['python']}, {versions}",
            f"- {report['tokens']} new tokens after {PROMPT}, greedy, batch 1, float32; ratios are medians over"
            f" {report['rounds']} rounds of two turns of the same round",
            "",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options)))
