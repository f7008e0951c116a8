"""Plans from shapes alone: exact where it is arithmetic, the compiler's own count where it is not."""

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny_job
from llama_configs import LLAMA_2_7B, TINY, write

import jlora
from jlora.cli.main import main
from jlora.data.batches import Row
from jlora.hf.load import load_model
from jlora.runs import config as configs
from jlora.runs import engine as fit
from jlora.runs.folder import make_task, wrap_base
from jlora.runs.plan import Held, Planner, Settings, plan, read_memory

# Runs a command from a process that is small itself: Linux counts what a process's parent held to its own peak.
MEASURED = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stderr=subprocess.PIPE, text=True)
took = resource.getrusage(resource.RUSAGE_CHILDREN)
json.dump([took.ru_utime + took.ru_stime, took.ru_maxrss * 1024, done.stderr], sys.stderr)
sys.exit(done.returncode)
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a config.json and nothing else: no plan reads weights."""
    return write(tmp_path_factory.mktemp("tiny") / "model", TINY)


def test_llama_2_7b_is_planned_here_with_every_byte_accounted_for(tmp_path):
    folder = write(tmp_path / "llama", LLAMA_2_7B)
    flags = "--rank 8 --batch-size 1 --sequence 2048 --dtype bfloat16 --memory 24GB --json"
    command = [sys.executable, "-c", MEASURED, sys.executable, "-m", "jlora", "plan", folder, *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    found, (seconds, peak, said) = (json.loads(text) for text in (done.stdout, done.stderr))
    assert said == ""
    # Seconds of both cores, so that a busy machine does not count.
    assert seconds < 240
    assert peak < 4e9
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert found["parameters"] == 2 * 32000 * 4096 + 32 * layer + 4096 == 6_738_415_616
    assert found["base_bytes"] == 2 * found["parameters"]
    pairs = 32 * 8 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert found["trained"] == pairs == 19_988_480
    assert found["adapter_bytes"] == 4 * (pairs + 7 * 32)  # float32 beside a bfloat16 base, a scaling to each kernel
    assert found["optimizer_bytes"] == 2 * 4 * pairs + 2 * 4  # two moments; Adam's count of steps and the schedule's
    batch, counters = 5 * 4 * 2048, 4 + 8 + 4
    held = found["base_bytes"] + found["adapter_bytes"] + found["optimizer_bytes"] + batch + counters
    assert found["argument_bytes"] == held
    # Without remat each layer keeps its softmax: 32 heads of 2048 x 2048.
    assert found["planned_bytes"] > 32 * 32 * 2048**2 * 2
    assert found["fits"] is False
    (remedy,) = found["remedies"]
    assert remedy["changes"] == {"remat": True}
    assert found["argument_bytes"] < remedy["total_bytes"] < 24e9


def real_step(settings: configs.Config, loaded, length: int):
    """What the training loop compiles and runs, on real arrays: memory, metrics, adapted tree and optimizer's state."""
    kind = settings.data.task
    labels = () if kind == "causal_lm" else ("a", "b", "c")
    ones = np.ones(length, np.int32)
    row = Row(ones, ones, ones.astype(np.float32), ones)
    if labels:
        row = Row(ones, np.ones((), np.int32), np.ones((), np.float32))
    task, params = make_task(settings, loaded, labels), wrap_base(settings, loaded)
    job = fit.Job(config=settings, task=task, params=params, rows=[row] * 8, validation=[row])
    step, state, base = fit.make_step(job)
    moments = state.opt_state
    batch = fit.prepare(job.largest).batch
    memory, bytes_of_moments = fit.memory(step, state, base, batch), sum(x.nbytes for x in jax.tree.leaves(moments))
    _, metrics = step(state, base, batch)
    return memory, metrics, params, bytes_of_moments


def job(model: str, kind: str, length: int, **options) -> configs.Config:
    return configs.Config(
        model=configs.Model(name=model, scan=options.pop("scan"), remat=options.pop("remat")),
        data=configs.Data(task=kind, train=Path("x"), max_length=length),
        adapter=configs.Adapter(rank=4),
        optimisation=configs.Optimisation(**options),
        output=configs.Output(folder=Path("y")),
    )


@pytest.mark.parametrize("kind", ["scanned decoder", "classes", "a decoder's classes"])
def test_the_bytes_are_those_of_the_real_step(kind, tiny, tmp_path):
    length, size = 32, {"batch_size": 4}
    if kind == "classes":
        options = size | {"scan": False, "remat": False}
        name = str(tiny_job.make_model(tmp_path / "bert"))
        config, asked = job(name, "sequence_classification", length, **options), {"labels": 3}
        loaded = load_model(name, head="classification", pooling="cls", num_labels=3)
        model = load_model(name, abstract=True, head="classification", pooling="cls", num_labels=3)
    elif kind == "a decoder's classes":
        options = size | {"scan": False, "remat": False}
        name = str(tiny_job.make_llama(tmp_path / "llama"))
        config, asked = job(name, "sequence_classification", length, **options), {"labels": 3}
        asked["task"], model = "sequence_classification", load_model(name, abstract=True)
        loaded = load_model(name, head="classification", num_labels=3)
    else:
        options = size | {"scan": True, "remat": True, "accumulate": 2, "optimizer": "adafactor"}
        config, asked = job(tiny, "causal_lm", length, **options), {}
        model = load_model(tiny, abstract=True)
        shapes = load_model(tiny, abstract=True, scan=True, remat=True)
        params = jax.tree.map(lambda leaf: 0.3 * np.ones(leaf.shape, leaf.dtype), shapes.params)
        loaded = replace(
            shapes, params=jax.tree.map(jax.numpy.asarray, params), tokenizer=SimpleNamespace(pad_token_id=0)
        )
    found = plan(model, rank=4, sequence=length, **options, **asked)
    memory, metrics, params, bytes_of_moments = real_step(config, loaded, length)
    assert np.isfinite(metrics["loss"])
    assert found.temporary_bytes == found.planned_bytes == memory.temporary_bytes
    assert found.argument_bytes == memory.argument_bytes
    leaves = jlora.tree.paths.flatten(params)
    assert found.adapter_bytes == sum(leaf.nbytes for path, leaf in leaves.items() if "_lora_" in path)
    assert found.base_bytes == sum(leaf.nbytes for path, leaf in leaves.items() if "_lora_" not in path)
    assert found.optimizer_bytes == bytes_of_moments
    heads = {"classes": ("classifier",), "a decoder's classes": ("score",)}
    counts = jlora.summary(params, heads.get(kind, ()))
    assert (found.parameters, found.trained) == (counts.total, counts.trainable)


SMALL = {"sequence": 64, "batch_size": 2, "rank": 1}


@pytest.fixture(scope="module")
def counted(tiny):
    """The plan of SMALL, as the command gives it."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["plan", tiny, "--sequence", "64", "--batch-size", "2", "--rank", "1", "--json"]) == 0
    return json.loads(out.getvalue())


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only a CPU widens 16-bit kernels")
def test_on_a_cpu_16_bits_are_planned_with_the_temporary_bytes_of_float32(tiny, counted):
    narrow = plan(tiny, **SMALL, dtype="bfloat16")
    assert narrow.planned_bytes == counted["temporary_bytes"] == counted["planned_bytes"]
    assert narrow.base_bytes * 2 == counted["base_bytes"]
    assert narrow.total_bytes == narrow.argument_bytes + narrow.output_bytes + narrow.planned_bytes
    assert "in place of an accelerator's" in str(narrow)
    assert ("float32 copies" in str(narrow)) == (narrow.temporary_bytes != narrow.planned_bytes)


class Reckoned(Planner):
    """A planner whose steps take what a formula says, to look at the search alone."""

    def __init__(self, memory: int):
        self.memory = memory
        self.asked = []
        base = lambda s: 100 if s.dtype == "float32" else 50
        self.held = lambda s: Held(0, 0, base(s), 0, 0, base(s) + s.rank)
        self.compiled = self.count

    def count(self, settings: Settings):
        self.asked.append(settings)
        temp = 640 // (settings.accumulate * (4 if settings.remat and settings.scan else 1))
        held = self.held(settings).total
        return SimpleNamespace(
            argument_size_in_bytes=held, output_size_in_bytes=9, alias_size_in_bytes=9, temp_size_in_bytes=temp
        )


FULL = Settings(batch_size=16, rank=8, scan=True)  # takes 108 + 640 bytes


def changes(memory: int, settings: Settings = FULL) -> list[dict]:
    remedies, _ = Reckoned(memory).remedies(settings)
    return [remedy.changes for remedy in remedies]


def test_each_setting_that_would_do_alone_is_named_with_its_mildest_value():
    assert changes(700) == [{"remat": True}, {"accumulate": 2}, {"dtype": "bfloat16"}]
    assert changes(300) == [{"remat": True}, {"accumulate": 4}]
    assert changes(150) == [{"accumulate": 16}]
    assert changes(747) == [{"remat": True}, {"accumulate": 2}, {"dtype": "bfloat16"}, {"rank": 4}]


def test_settings_are_joined_only_where_none_would_do_alone_and_no_further_than_needed():
    # 108 + 640 / (4 * 8) = 128
    assert changes(130) == [{"remat": True, "accumulate": 8}]
    # 58 + 640 / (4 * 4) = 98; with the base in float32 it never is.
    assert changes(100) == [{"remat": True, "accumulate": 4, "dtype": "bfloat16"}]
    assert changes(700, replace(FULL, scan=False, batch_size=1)) == [{"dtype": "bfloat16"}]
    assert changes(300, replace(FULL, scan=False, batch_size=1)) == [{"scan": True, "remat": True}]


def test_where_nothing_helps_the_least_is_told_and_what_can_not_fit_is_not_compiled():
    planner = Reckoned(50)
    remedies, least = planner.remedies(FULL)
    assert remedies == ()
    assert least.changes == {"remat": True, "accumulate": 16, "dtype": "bfloat16", "rank": 1}
    assert least.total_bytes == 51 + 10
    # No dtype and no rank leaves less than 51 bytes before the step begins.
    assert len(set(planner.asked)) == 1


def test_what_is_recommended_fits_when_it_is_planned_anew(tiny, counted):
    found = plan(tiny, **SMALL, memory=counted["total_bytes"] * 3 // 4)
    assert found.fits is False
    assert [remedy.changes for remedy in found.remedies] == [{"remat": True}, {"accumulate": 2}]
    again = plan(tiny, **SMALL, accumulate=2)
    assert again.total_bytes == found.remedies[1].total_bytes <= found.memory
    assert f"{counted['parameters']:,}\n" in str(found)
    assert "It would with\n  remat: " in str(found)
    assert "It fits in 1.00 GB, with" in str(replace(found, memory=10**9))


def test_mistakes_are_told_together_and_without_a_traceback(tiny, tmp_path, capsys):
    def mistake(*args: str) -> str:
        assert main(["plan", *args]) == 2
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err and "\nFix: " in shown.err
        return shown.err

    text = mistake(tiny, "--rank", "0", "--sequence", "65", "--labels", "3")
    assert "rank = 0  expected: a whole number from 1" in text
    assert "sequence = 65  expected: at most 64 tokens" in text
    assert "labels = 3  expected: none here" in text
    bert = str(tiny_job.make_model(tmp_path / "bert"))
    text = mistake(bert, "--task", "causal_lm")
    assert "task = 'causal_lm'  expected: sequence_classification or token_classification" in text
    assert "accumulate = 3  expected: a divisor of batch_size = 4" in mistake(
        tiny, "--batch-size", "4", "--accumulate", "3"
    )
    assert "'24 bananas' is no size of a memory" in mistake(tiny, "--memory", "24 bananas")
    assert "rank 99, allowed 1 to" in mistake(tiny, "--sequence", "16", "--rank", "99")
    assert "optax has no such optimizer" in mistake(tiny, "--sequence", "16", "--optimizer", "adamv")
    assert "config.json" in mistake(str(tmp_path))
    with pytest.raises(TypeError, match="rnak"):
        plan(tiny, rnak=3)


def test_targets_may_be_a_list_of_names(tiny, capsys):
    names, pattern = ("q_proj", "v_proj"), r".*/(q_proj|v_proj)/kernel"
    found, same, every = (plan(tiny, **SMALL, targets=targets) for targets in (names, pattern, None))
    assert replace(found, settings=same.settings) == same
    # In each of 3 layers q is 16 x 16 and v is 16 x 8.
    assert found.trained == 3 * SMALL["rank"] * (16 + 16 + 16 + 8) < every.trained
    argv = [str(word) for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert main(["plan", tiny, *argv, "--targets", *names, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trained"] == found.trained
    assert main(["plan", tiny, *argv, "--targets", "q_porj"]) == 2
    assert "'q_porj'" in capsys.readouterr().err


def test_a_memory_is_read_with_its_unit():
    found = [read_memory(text) for text in ("24GB", "24 GiB", "1.5kB", "512", 512, "2T")]
    assert found == [24 * 10**9, 24 * 2**30, 1500, 512, 512, 2 * 10**12]
    for text in ("", "GB", "-1GB", "0", "24iB", "1e9"):
        with pytest.raises(ValueError, match="is no size of a memory"):
            read_memory(text)
