"""The recipe: what each task learns and measures, the loop around them, and what it leaves on disk."""

import dataclasses
import json
import math
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_job

from jlora.cli.show import describe_curves
from jlora.data.batches import make_rows, pad
from jlora.data.tags import entities
from jlora.runs import config as configs
from jlora.runs import folder as runs
from jlora.runs.card import model_card
from jlora.runs.config import Optimisation
from jlora.runs.engine import (
    Evaluation,
    History,
    Interrupted,
    Job,
    Resumption,
    Snapshot,
    Step,
    StepMemory,
    fit,
    make_optimizer,
    prepare,
    schedule,
)
from jlora.runs.inspection import load_adapted
from jlora.runs.job_data import describe_truncation, make_split_rows, read_splits
from jlora.tasks.tasks import TASKS, log_softmax
from jlora.training.checkpoint import describe_model, write_digests
from jlora.tree.paths import flatten
from jlora.tree.splitting import split
from jlora.tree.summary import summary
from jlora.tree.wrapping import merge

TASK_NAMES = tuple(TASKS)
MEASURES = {
    "sequence_classification": {"accuracy", "macro_f1"},
    "token_classification": {"precision", "recall", "f1"},
    "causal_lm": {"perplexity"},
    "instruction": {"perplexity"},
}


quick = tiny_job.quick


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The TOML file of a job of every task."""
    folder = tmp_path_factory.mktemp("recipes")
    bert, llama = tiny_job.make_model(folder / "bert"), tiny_job.make_llama(folder / "llama")
    found = {"sequence_classification": tiny_job.make_job(folder / "job", bert)}
    for task in TASK_NAMES[1:]:
        model = bert if task == "token_classification" else llama
        found[task] = tiny_job.make_other_job(folder / task, model, task)
    return found


@pytest.fixture(scope="module")
def jobs(files):
    """A job of every task, its parameters with a B that is not zero."""
    return {task: make(configs.read(path)) for task, path in files.items()}


def make(config):
    corpus = read_splits(config)
    loaded = runs.load_base(config, corpus.labels)
    task = runs.make_task(config, loaded, corpus.labels)
    rows = {name: make_split_rows(config, loaded.tokenizer, corpus, name).rows for name in corpus.splits}
    params = with_b(runs.wrap_base(config, loaded))
    return Job(config=config, task=task, params=params, rows=rows["train"], validation=rows["validation"])


def with_b(params):
    """Params with a B that is not zero, and a new head whose logits spread."""

    def change(path, leaf):
        name = jax.tree_util.keystr(path)
        return leaf + 0.1 if "_lora_b" in name else leaf * 30 if "classifier" in name else leaf

    return jax.tree_util.tree_map_with_path(change, params)


def settings(config, **sections):
    """A config with other values, by section."""
    changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **changed)


def batch_of(job, rows, size):
    length = job.config.data.max_length
    return prepare(pad(job.rows[:rows], size=size, length=length, pad_id=0)).batch


def test_the_schedule_rises_over_the_warm_up_and_decays_as_named():
    options = Optimisation(learning_rate=2.0, warmup=0.25)
    steps = np.arange(41)
    rise, rest = steps / 10, (steps - 10) / 30
    oracles = {"linear": 1 - rest, "cosine": 0.5 * (1 + np.cos(np.pi * rest)), "constant": np.ones(41)}
    for name, after in oracles.items():
        rate = schedule(dataclasses.replace(options, schedule=name), 40)
        expected = 2 * np.where(steps < 10, rise, after)
        np.testing.assert_allclose([float(rate(n)) for n in steps], expected, atol=1e-6)
    cold = schedule(dataclasses.replace(options, warmup=0.0), 40)
    assert float(cold(0)) == 2.0


def test_a_b_and_the_head_move_at_rates_of_their_own():
    # Adam's first update is the rate times the gradient's sign, so it shows the rates as they are.
    options = Optimisation(
        learning_rate=1e-3, b_ratio=16.0, head_ratio=5.0, warmup=0.0, schedule="constant", weight_decay=0.5
    )
    adapters = {
        "dense": {"kernel_lora_a": jnp.full((3, 2), 2.0), "kernel_lora_b": jnp.full((2, 3), 2.0)},
        "classifier": {"kernel": jnp.full((3, 4), 2.0), "bias": jnp.full(4, 2.0)},
    }
    tx = make_optimizer(options, 10, adapters)
    grads = jax.tree.map(lambda leaf: jnp.ones_like(leaf), adapters)
    updates, _ = tx.update(grads, tx.init(adapters), adapters)
    rates = {"kernel_lora_a": 1e-3, "kernel_lora_b": 16e-3, "kernel": 5e-3, "bias": 5e-3}
    for path, update in flatten(updates).items():
        np.testing.assert_allclose(update, -rates[path.split("/")[-1]] * (1 + 0.5 * 2.0), rtol=1e-5)


@pytest.mark.parametrize("task", ["sequence_classification", "token_classification", "causal_lm"])
def test_the_loss_is_the_mean_cross_entropy_of_the_models_own_logits_however_the_batch_is_filled(jobs, task):
    job = jobs[task]
    loss = jax.jit(jax.value_and_grad(job.task.loss_fn(0.0)))
    batch = batch_of(job, 3, 3)
    merged = merge(job.params)
    packed = {"segment_ids": batch["segment_ids"]} if "segment_ids" in batch else {}
    assert bool(packed) == (task == "causal_lm")
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(lambda *args, **options: job.task.loaded.model.apply({"params": merged}, *args, **options))
        logits = np.asarray(apply(batch["input_ids"], batch["attention_mask"], **packed), np.float64)
        found, grads = loss(job.params, batch, jax.random.key(0))
        filled, filled_grads = loss(job.params, batch_of(job, 3, 8), jax.random.key(0))
    counted = batch["weights"] > 0
    assert logits[counted].std() > 0.5
    chances = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(chances, batch["labels"][..., None], -1)[..., 0]
    np.testing.assert_allclose(found, -chosen[counted].mean(), rtol=1e-5)
    np.testing.assert_allclose(filled, found, rtol=1e-5)
    for path, grad in flatten(split(filled_grads, job.task.trained)[0]).items():
        np.testing.assert_allclose(grad, flatten(grads)[path], rtol=1e-3, atol=1e-5)


def test_dropout_draws_by_its_key(jobs):
    job = jobs["sequence_classification"]
    loss = jax.jit(job.task.loss_fn(0.5))
    first, again, other = (float(loss(job.params, batch_of(job, 5, 5), jax.random.key(n))) for n in (1, 1, 2))
    assert first == again != other


def test_evaluation_does_not_depend_on_how_texts_are_batched(jobs):
    job = jobs["sequence_classification"]
    together = job.task.score(job.params, job.validation)
    merged = merge(job.params)
    apply = jax.jit(lambda ids: job.task.loaded.model.apply({"params": merged}, ids))
    for n in (0, 7, 23):
        alone = apply(np.array([job.validation[n].ids]))
        np.testing.assert_allclose(together.outputs[n], alone[0], atol=1e-4)
    classes = np.array([row.targets for row in job.validation])
    assert together.metrics["accuracy"] == (together.outputs.argmax(-1) == classes).mean()


def test_an_evaluations_loss_weighs_every_token_alike(jobs):
    job = jobs["instruction"]
    params, task = merge(job.params), job.task
    total = targets = 0.0
    for row in job.validation:
        part = task.score(params, [row], merged=True)
        total, targets = total + part.loss * row.weights.sum(), targets + row.weights.sum()
    found = task.score(job.params, job.validation)
    assert found.loss == pytest.approx(total / targets, rel=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(found.loss))


def test_class_weights_are_those_of_torchs_cross_entropy(jobs, files):
    torch = pytest.importorskip("torch", reason="torch is the oracle")
    config = settings(configs.read(files["sequence_classification"]), optimisation={"class_weights": "balanced"})
    corpus = read_splits(config)
    # One class is rare: the weights differ, and a batch of the common one alone weighs less than a row.
    rare = corpus.labels[0]
    few = [record for record in corpus.splits["train"] if record.label != rare]
    few += [record for record in corpus.splits["train"] if record.label == rare][:3]
    corpus = corpus._replace(splits=corpus.splits | {"train": few})
    job = jobs["sequence_classification"]
    rows = make_split_rows(config, job.task.loaded.tokenizer, corpus, "train").rows
    sizes = np.array([sum(record.label == label for record in few) for label in corpus.labels])
    weights = len(few) / (len(sizes) * sizes)
    assert all(row.weights == np.float32(weights[row.targets]) for row in rows)
    plain = make_split_rows(config, job.task.loaded.tokenizer, corpus, "validation").rows
    assert {float(row.weights) for row in plain} == {1.0}
    loss = jax.jit(job.task.loss_fn(0.0))
    for chosen in (rows[:1], rows[-5:], rows[:8]):
        batch = prepare(pad(chosen, size=8, length=32, pad_id=0)).batch
        with jax.default_matmul_precision("highest"):
            found = float(loss(job.params, batch, jax.random.key(0)))
            logits = job.task.score(job.params, chosen).outputs
        expected = torch.nn.functional.cross_entropy(
            torch.tensor(logits, dtype=torch.float64),
            torch.tensor([int(row.targets) for row in chosen]),
            weight=torch.tensor(weights),
        )
        assert found == pytest.approx(float(expected), rel=1e-4)


def test_entities_beyond_max_length_count_as_missed(jobs, files):
    job = jobs["token_classification"]
    records = [record for record in read_splits(job.config).splits["validation"] if len(record.tokens) > 3]
    labels, tokenizer = job.task.labels, job.task.loaded.tokenizer
    whole = make_rows(tokenizer, records, max_length=32, labels=labels)
    cut = make_rows(tokenizer, records, max_length=5, labels=labels)
    assert whole.dropped == 0 < cut.dropped and cut.cut == sum(len(record.tokens) - 3 for record in records)
    assert describe_truncation(settings(job.config, data={"max_length": 5}).data, "validation", cut) == [
        f"validation: {cut.cut} words are cut off at max_length = 5 tokens: raise data.max_length.",
        f"validation: {cut.dropped} entities count as missed, beyond max_length = 5 tokens: raise data.max_length.",
    ]
    found = job.task.score(job.params, cut.rows)
    # The tags of the words that are read, and none for those that are not.
    alone = job.task.score(job.params, [row._replace(beyond=None) for row in cut.rows])
    expected = [[*said, *["O"] * (len(record.tokens) - 3)] for said, record in zip(alone.outputs, records, strict=True)]
    assert found.outputs == expected
    gold = {(n, *entity) for n, record in enumerate(records) for entity in entities(record.tags)}
    said = {(n, *entity) for n, tags in enumerate(expected) for entity in entities(tags)}
    assert found.metrics["recall"] == len(gold & said) / len(gold)
    assert (found.loss, found.metrics["precision"]) == (alone.loss, alone.metrics["precision"])


def test_log_softmax_holds_for_logits_that_would_overflow():
    logits = np.array([[1000.0, 0.0], [-3.0, -3.0]], np.float32)
    np.testing.assert_allclose(log_softmax(logits), [[0, -1000], [-np.log(2)] * 2])


def test_fit_tells_of_every_step_and_the_best_evaluation_is_the_one_validation_says(jobs, tmp_path):
    job = jobs["sequence_classification"]
    job = dataclasses.replace(job, params=runs.wrap_base(job.config, job.task.loaded))
    memory, *events = fit(job, tmp_path)
    assert isinstance(memory, StepMemory) and memory.temporary_bytes > 0
    assert memory.argument_bytes > 4 * summary(job.params).total
    steps = [event for event in events if isinstance(event, Step)]
    found = [event for event in events if isinstance(event, Evaluation)]
    assert [event.epoch for event in found] == [1, 2, 3, 4, 5]
    assert sum(step.targets for step in steps) == 5 * len(job.rows)
    assert sum(step.tokens for step in steps) == 5 * sum(len(row.ids) for row in job.rows) + filled(job)
    assert steps[-1].step == steps[-1].steps == job.steps
    assert found[-1].loss < 0.5 * found[0].loss
    ranked = [(event.metrics["accuracy"], -event.loss) for event in found]
    assert [event.best for event in found] == [
        all(one > earlier for earlier in ranked[:n]) for n, one in enumerate(ranked)
    ]
    # What an evaluation hands out is still there after later steps, and the base never moved.
    frozen = flatten(split(job.params, job.task.trained)[1])
    for event in found:
        assert job.task.score(event.params, job.validation).loss == event.loss
        after = flatten(split(event.params, job.task.trained)[1])
        assert all(np.array_equal(after[path], leaf) for path, leaf in frozen.items())
    written = [event._replace(params=None) if isinstance(event, Evaluation) else event for event in events]
    history = History(tmp_path / "metrics.jsonl")
    assert history.rewind(history.position) == written


def filled(job) -> int:
    """Rows that fill batches up hold one token each, over all epochs."""
    size = job.config.optimisation.batch_size
    return 5 * (len(job.batches) * size - len(job.rows))


def test_steps_and_the_times_of_evaluations_are_as_told(jobs, tmp_path):
    job = jobs["sequence_classification"]
    config = settings(job.config, optimisation={"steps": 5}, run={"evaluate_every": 2}, output={"log_every": 3})
    events = list(fit(dataclasses.replace(job, config=config), tmp_path / "one"))[1:]
    assert [(type(event).__name__, event.step) for event in events] == [
        ("Step", 2),
        ("Evaluation", 2),
        ("Step", 3),
        ("Step", 4),
        ("Evaluation", 4),
        ("Step", 5),
        ("Evaluation", 5),
    ]
    assert (events[-1].epoch, job.steps, len(job.batches)) == (1, 45, 9)
    # A rate of next to nothing never makes it better than the first time.
    still = settings(config, optimisation={"learning_rate": 1e-30}, run={"evaluate_every": 1, "patience": 2})
    job = dataclasses.replace(job, config=still)
    assert [event.step for event in fit(job, tmp_path / "two") if isinstance(event, Evaluation)] == [1, 2, 3]
    again = list(fit(job, tmp_path / "two"))
    assert isinstance(again[-1], Resumption) and again[-1].step == 3


def test_without_validation_the_last_steps_adapter_is_kept_and_the_steps_are_the_same(jobs, tmp_path):
    job = jobs["sequence_classification"]
    job = dataclasses.replace(job, config=settings(job.config, optimisation={"steps": 12}))
    *_, evaluated = fit(job, tmp_path / "with")
    without = dataclasses.replace(job, validation=None)
    signals = iter([0] * 9 + [15])
    with pytest.raises(Interrupted):
        list(fit(without, tmp_path / "without", should_stop=lambda: next(signals)))
    events = list(fit(without, tmp_path / "without"))
    snapshots = [event for event in events if isinstance(event, Snapshot)]
    assert isinstance(events[1], Resumption) and [snapshot.step for snapshot in snapshots] == [12]
    assert not any(isinstance(event, Evaluation) for event in events)
    last = flatten(snapshots[-1].params)
    assert all(np.array_equal(last[path], leaf) for path, leaf in flatten(evaluated.params).items())


def test_a_run_never_resumes_with_other_data_in_either_split(jobs, tmp_path):
    job = jobs["sequence_classification"]
    job = dataclasses.replace(job, config=settings(job.config, optimisation={"steps": 2}, run={"evaluate_every": 1}))
    list(fit(job, tmp_path))
    moved = {"rows": [*job.rows, job.validation[0]], "validation": job.validation[1:]}
    for changes, names in [
        (("rows",), "training"),
        (("validation",), "validation"),
        (moved, "training and validation"),
    ]:
        other = dataclasses.replace(job, **{name: moved[name] for name in changes})
        with pytest.raises(ValueError, match=f"the {names} data are not those the run was begun with") as caught:
            list(fit(other, tmp_path))
        assert "another version of jlora drew the validation split" in str(caught.value)
    assert [type(event) for event in fit(job, tmp_path)] == [StepMemory, Resumption]


@pytest.fixture(scope="module")
def finished(jobs, tmp_path_factory):
    """A job of six steps with a checkpoint every second, and the folder of its run."""
    folder = tmp_path_factory.mktemp("finished")
    changes = {"optimisation": {"steps": 6}, "run": {"evaluate_every": 2}, "output": {"log_every": 1}}
    job = jobs["sequence_classification"]
    job = dataclasses.replace(job, config=settings(job.config, **changes))
    list(fit(job, folder))
    return job, folder


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def test_a_damaged_newest_checkpoint_is_reported_and_the_run_ends_in_the_same_bits(finished, tmp_path):
    job, folder = finished
    shutil.copytree(folder, tmp_path / "run")
    (data,) = (tmp_path / "run" / "checkpoints" / "6" / "state" / "d").iterdir()
    flip(data, data.stat().st_size // 2)
    resumed, *events = list(fit(job, tmp_path / "run"))[1:]
    assert isinstance(resumed, Resumption) and resumed.step == 4
    (damage,) = resumed.damaged
    assert damage == f"step 6: 1 file damaged or missing: state/d/{data.name}"
    assert events[-1].step == 6
    found, expected = tiny_job.lines(tmp_path / "run"), tiny_job.lines(folder)
    assert [line for line in found if line["event"] == "damage"] == [
        {"event": "damage", "step": 4, "damaged": [damage]}
    ]
    assert [line for line in found if line["event"] != "damage"] == expected
    # Resumed once more, the note of the damage is no step and no evaluation.
    again = list(fit(job, tmp_path / "run"))[-1]
    assert [event.step for event in again.past] == [line["step"] for line in expected]
    assert again.damaged == []


def test_a_run_is_not_resumed_on_a_base_that_computes_something_else(finished, tmp_path):
    job, folder = finished
    shutil.copytree(folder, tmp_path / "run")
    model = job.task.loaded.model
    model = model.clone(config=dataclasses.replace(model.config, layer_norm_eps=0.1))
    loaded = dataclasses.replace(job.task.loaded, model=model)
    task = runs.make_task(job.config, loaded, job.task.labels)
    with pytest.raises(
        ValueError, match=r"resume: this is not the model .*\n  config.layer_norm_eps is 0.1, was 1e-12\n"
    ):
        list(fit(dataclasses.replace(job, task=task), tmp_path / "run"))


def test_a_byte_of_the_history_that_was_flipped_is_an_error_that_names_the_file(finished, tmp_path):
    job, folder = finished
    shutil.copytree(folder, tmp_path / "run")
    flip(tmp_path / "run" / "metrics.jsonl", 20)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(
        ValueError, match=r"resume: .*metrics\.jsonl was changed after it was written\.\nFix: put it back"
    ):
        list(fit(job, tmp_path / "run"))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_parts_of_a_batch_one_after_the_other_train_as_the_whole(jobs, tmp_path):
    job = jobs["causal_lm"]
    assert len({int(row.weights.sum()) for row in job.rows}) > 1
    told = {}
    for accumulate in (1, 4):
        options = {"accumulate": accumulate, "steps": 3, "optimizer": "sgd", "learning_rate": 0.1, "warmup": 0.0}
        config = settings(job.config, optimisation=options, adapter={"dropout": 0.0}, output={"log_every": 1})
        with jax.default_matmul_precision("highest"):
            *_, told[accumulate] = fit(dataclasses.replace(job, config=config), tmp_path / str(accumulate))
    assert told[1].loss == pytest.approx(told[4].loss, abs=1e-5)
    for path, leaf in flatten(told[1].params).items():
        np.testing.assert_allclose(flatten(told[4].params)[path], leaf, atol=1e-5)
    moved = max(float(abs(leaf - flatten(job.params)[path]).max()) for path, leaf in flatten(told[1].params).items())
    assert moved > 1e-2
    losses = [[line["loss"] for line in tiny_job.lines(tmp_path / name)] for name in ("1", "4")]
    np.testing.assert_allclose(*losses, atol=1e-5)


def test_other_optimizers_and_layers_with_ranks_of_their_own_train(files, tmp_path):
    config = configs.read(files["sequence_classification"])
    options = {"optimizer": "adafactor", "steps": 6, "schedule": "constant", "warmup": 0.0}
    config = settings(
        config, adapter={"ranks": {".*/(query|key)/kernel": 2, ".*/value/kernel": 3}}, optimisation=options
    )
    job = make(config)
    ranks = {row.path: row.rank for row in summary(job.params).rows if row.rank}
    assert len(ranks) == 6
    for path, rank in ranks.items():
        assert rank == (2 if "/query/" in path or "/key/" in path else 3 if "/value/" in path else 4)
    evaluations = [event.loss for event in fit(job, tmp_path) if isinstance(event, Step)]
    assert evaluations[-1] < evaluations[0]


def test_scan_and_remat_change_the_computing_and_not_the_loss_and_bfloat16_is_near(files):
    config = configs.read(files["causal_lm"])
    found = {}
    for name, switches in {
        "plain": {},
        "remat": {"remat": True},
        "scan": {"scan": True, "remat": True},
        "bfloat16": {"dtype": "bfloat16"},
        "mixed": {"compute_dtype": "bfloat16"},
    }.items():
        job = make(settings(config, model=switches))
        assert {leaf.dtype.name for leaf in jax.tree.leaves(job.params)} <= {
            switches.get("dtype", "float32"),
            "float32",
        }
        loss = jax.jit(job.task.loss_fn(0.0))
        # B as it begins, for layers that are stacked draw another A.
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf - 0.1 if "_lora_b" in jax.tree_util.keystr(path) else leaf, job.params
        )
        with jax.default_matmul_precision("highest"):
            found[name] = float(loss(params, batch_of(job, 3, 4), jax.random.key(0)))
    assert found["remat"] == pytest.approx(found["plain"], abs=1e-5)
    assert found["scan"] == pytest.approx(found["plain"], abs=1e-5)
    for name in ("bfloat16", "mixed"):
        assert found[name] == pytest.approx(found["plain"], rel=0.02)
        assert found[name] != found["plain"]


def test_a_run_read_back_scores_as_the_one_saved(jobs, tmp_path):
    job = jobs["sequence_classification"]
    config = settings(job.config, output={"folder": tmp_path / "run"})
    params = job.params | {"classifier": {name: leaf * 3 for name, leaf in job.params["classifier"].items()}}
    answers = {label: f"About {label}." for label in tiny_job.TOPICS}
    runs.begin_run(config, sorted(tiny_job.TOPICS), answers)
    runs.save_best(tmp_path / "run", params, job.task)
    run = runs.load_run(tmp_path / "run")
    assert (run.task.labels, dict(run.answers)) == (tuple(sorted(tiny_job.TOPICS)), answers)
    saved, back = job.task.score(params, job.validation), run.task.score(run.params, job.validation)
    assert np.array_equal(saved.outputs, back.outputs)


CHANGES = {
    "instruction": {
        "rope_theta": (5e5, "rope.theta is 500000.0, was 10000.0"),
        "rms_norm_eps": (1e-3, "norm_eps is 0.001, was 1e-05"),
        "hidden_act": ("relu", 'activation is "relu", was "silu"'),
        "num_attention_heads": (4, "num_heads is 4, was 2"),
        "sliding_window": (None, None),
        "torch_dtype": ("bfloat16", None),
    },
    "sequence_classification": {
        "layer_norm_eps": (1e-3, "layer_norm_eps is 0.001, was 1e-12"),
        "hidden_act": ("relu", 'hidden_act is "relu", was "gelu"'),
        "num_attention_heads": (4, "num_attention_heads is 4, was 2"),
        "initializer_range": (0.5, None),
    },
}


@pytest.mark.parametrize("task", CHANGES)
def test_a_base_whose_config_computes_something_else_is_refused_with_what_differs(task, jobs, tmp_path):
    job = jobs[task]
    config = settings(job.config, output={"folder": tmp_path / "run"})
    runs.begin_run(config, job.task.labels, {})
    runs.save_best(tmp_path / "run", job.params, job.task)
    shutil.copytree(config.model.name, tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    whole = json.loads(file.read_text())
    for name, (value, words) in CHANGES[task].items():
        more = {"num_key_value_heads": 4} if name == "num_attention_heads" and task == "instruction" else {}
        file.write_text(json.dumps(whole | {name: value} | more))
        if words is None:
            runs.load_run(tmp_path / "run", model=str(tmp_path / "base"))
            continue
        with pytest.raises(ValueError, match="this is not the model the adapter was trained on") as error:
            runs.load_run(tmp_path / "run", model=str(tmp_path / "base"))
        assert f"  config.{words}\n" in str(error.value)
        # The adapter alone says the same, where it is merged, exported or inspected.
        with pytest.raises(ValueError, match="this is not the model the adapter was trained on"):
            load_adapted(tmp_path / "run" / "adapter", str(tmp_path / "base"))
    file.write_text(json.dumps(whole))
    adapted = load_adapted(tmp_path / "run" / "adapter", str(tmp_path / "base"))
    assert describe_model(adapted.loaded.model) == describe_model(job.task.loaded.model)


def test_a_damaged_run_is_an_error_that_names_the_file(jobs, tmp_path):
    job = jobs["sequence_classification"]
    config = settings(job.config, output={"folder": tmp_path})
    runs.begin_run(config, sorted(tiny_job.TOPICS), {})
    with pytest.raises(FileNotFoundError, match=r"holds no run\.\n  .*adapter\nFix: pass the folder that"):
        runs.load_run(tmp_path)
    runs.save_best(tmp_path, job.params, job.task)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    runs.write_result(tmp_path, "{}\n")
    for name in ("config.toml", "labels.json", "metrics.jsonl", "result.json", "files.json"):
        flip(tmp_path / name, 1)
        with pytest.raises(
            ValueError, match=rf"1 file of the run .* damaged or missing\.\n  '{name}'  changed\nFix: put"
        ):
            runs.load_run(tmp_path)
        flip(tmp_path / name, 1)
    # A run may be slimmed to what loading it needs; runs of earlier versions have no digests.
    for name in ("metrics.jsonl", "result.json", "files.json"):
        (tmp_path / name).unlink()
        runs.load_run(tmp_path)
    (tmp_path / "labels.json").write_text('[{"lable": "a"}]')
    with pytest.raises(ValueError, match=r"labels\.json is damaged: KeyError\('label'\)"):
        runs.load_run(tmp_path)


def test_a_byte_that_was_flipped_is_found_before_an_unfinished_run_is_resumed(jobs, tmp_path):
    config = in_folder(jobs["sequence_classification"], tmp_path / "run")
    runs.begin_run(config, ["a"], {})
    for name in ("config.toml", "labels.json"):
        flip(tmp_path / "run" / name, 1)
        with pytest.raises(
            ValueError, match=rf"^resume: 1 file of the run .*\n  '{name}'  changed\nFix: put the files"
        ):
            runs.check_folder(config)
        assert runs.check_folder(settings(config, output={"overwrite": True})) is False
        flip(tmp_path / "run" / name, 1)
    assert runs.check_folder(config) is True


@pytest.mark.parametrize("name", ["config.toml", "labels.json"])
def test_the_end_of_a_run_does_not_take_damage_for_what_was_written(name, jobs, tmp_path):
    job = jobs["sequence_classification"]
    config = in_folder(job, tmp_path / "run")
    runs.begin_run(config, sorted(tiny_job.TOPICS), {})
    runs.save_best(tmp_path / "run", job.params, job.task)
    flip(tmp_path / "run" / name, 1)
    runs.write_result(tmp_path / "run", "{}\n")
    with pytest.raises(ValueError, match=rf"1 file of the run .*\n  '{name}'  changed\nFix: put"):
        runs.load_run(tmp_path / "run")


def test_more_tokens_than_the_model_has_positions_is_an_error(jobs):
    long = settings(jobs["sequence_classification"].config, data={"max_length": 65})
    with pytest.raises(ValueError, match=r"max_length is 65, the model reads 64 tokens\.\nFix: set max_length to 64"):
        runs.load_base(long, ["a", "b"])


def in_folder(job, folder, **output):
    return settings(job.config, output={"folder": folder, **output})


def test_an_unwritable_folder_or_a_full_disk_is_found_out_before_anything_is_made(jobs, tmp_path, monkeypatch):
    job = jobs["sequence_classification"]
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"file is a file, not a folder"):
        runs.check_folder(in_folder(job, tmp_path / "file" / "run"))
    assert runs.check_folder(in_folder(job, tmp_path / "deep" / "run"), needed=1000) is False
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=999))
    with pytest.raises(
        OSError, match=r"has 999 bytes left, the run needs about 1,000\.\nFix: free disk space, or choose"
    ):
        runs.check_folder(in_folder(job, tmp_path / "deep" / "run"), needed=1000)
    assert not (tmp_path / "deep").exists()
    if Path("/proc/self").is_dir():
        with pytest.raises(PermissionError, match="can't be written to"):
            runs.check_folder(in_folder(job, Path("/proc/self/run")))


def test_a_run_is_gone_on_with_by_the_same_job_only(jobs, tmp_path):
    job = jobs["sequence_classification"]
    config = in_folder(job, tmp_path / "run")
    runs.begin_run(config, ["a"], {})
    assert runs.check_folder(config) is True
    # What changes nothing of the outcome may change: and a run may be moved.
    (tmp_path / "run").rename(tmp_path / "moved")
    free = {"run": {"mesh": "data=1", "keep": 5, "save_every": 3}, "optimisation": {"max_skipped": 3}}
    config = settings(in_folder(job, tmp_path / "moved", tensorboard=True), **free)
    assert runs.check_folder(config) is True
    with pytest.raises(FileExistsError, match=r"unfinished run of another job\.\n  was rank = 4\n  now rank = 5\nFix"):
        runs.check_folder(settings(config, adapter={"rank": 5}))
    with pytest.raises(ValueError, match=r"classes or answers of the data are not those of .*labels\.json"):
        runs.begin_run(config, ["b"], {}, resume=True)
    assert runs.check_folder(settings(config, output={"overwrite": True})) is False
    (tmp_path / "moved" / "result.json").write_text("{}")
    with pytest.raises(FileExistsError, match="holds a run already"):
        runs.check_folder(config)


def test_a_run_killed_while_it_is_begun_can_be_begun_again(jobs, tmp_path, monkeypatch):
    job = jobs["sequence_classification"]

    class Killed(BaseException):
        pass

    write = runs.write_whole
    for n, last in enumerate(("config.toml", "labels.json", "files.json")):

        def killed(path, text, last=last):
            if path.name == last:
                raise Killed
            write(path, text)

        config = in_folder(job, tmp_path / str(n))
        digests = lambda folder, names, last=last: last == "files.json" and killed(folder / last, "")
        monkeypatch.setattr(runs, "write_whole", killed)
        monkeypatch.setattr(runs, "write_digests", digests)
        with pytest.raises(Killed):
            runs.begin_run(config, ["a"], {})
        monkeypatch.setattr(runs, "write_whole", write)
        monkeypatch.setattr(runs, "write_digests", write_digests)
        resume = runs.check_folder(config)
        runs.begin_run(config, ["a"], {}, resume=resume)
        assert configs.read(tmp_path / str(n) / "config.toml") == config
        assert json.loads((tmp_path / str(n) / "labels.json").read_text()) == [{"label": "a"}]


Curve = namedtuple("Curve", "training validation")
CURVES = {
    "goes on": Curve([4.0, 3.0, 2.0, 1.5, 1.2, 1.0, 0.8, 0.6], [3.0, 2.0, 1.5, 1.4]),
    "stalled": Curve([4.0, 3.0, 2.5, 2.5, 2.5, 2.5, 2.5, 2.5], [3.0, 2.6, 2.6, 2.6]),
    "stalled at nothing": Curve([4.0, 1.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], [3.0, 0.2, 0.2, 0.2]),
    "rising": Curve([4.0, 3.0, 2.0, 1.5, 1.0, 0.5, 0.2, 0.1], [2.0, 1.5, 1.8, 2.4]),
    "not finite": Curve([math.nan] * 8, [math.nan] * 4),
}


@pytest.mark.parametrize(
    "curve, rank, expected",
    [
        ("goes on", 8, None),
        ("stalled", 8, "Training loss stalled at 2.500 with rank 8: try rank 16, or a higher learning rate."),
        ("stalled", 64, None),
        ("stalled at nothing", 8, None),
        (
            "rising",
            8,
            "Validation loss rose from 1.500 to 2.400 since evaluation 2 of 4: try a smaller rank than 8, more "
            "dropout, or a lower learning rate. The best adapter was kept.",
        ),
        ("rising", 1, "Validation loss rose from 1.500 to 2.400 since evaluation 2 of 4: try more dropout"),
        ("not finite", 8, None),
    ],
)
def test_hints_say_what_the_curves_show(jobs, curve, rank, expected):
    steps = [Step(n, 8, 1, 1, 1, loss, 1e-3, 1.0, 0) for n, loss in enumerate(CURVES[curve].training, 1)]
    found = [Evaluation(n, n, loss, {}, n == 1, None) for n, loss in enumerate(CURVES[curve].validation, 1)]
    config = settings(jobs["sequence_classification"].config, adapter={"rank": rank})
    said = describe_curves([*steps, *found], config)
    assert len(said) == (expected is not None)
    assert all(hint.startswith(expected) for hint in said)


def test_the_card_names_base_data_settings_metrics_and_how_to_load(jobs):
    config = jobs["sequence_classification"].config
    card = model_card(config, {"best_step": 7, "after": {"accuracy": 0.5, "loss": math.nan}})
    assert f"# LoRA adapter for {config.model.name}" in card
    assert f"- train: `{config.data.train}`" in card
    assert '| after | {"accuracy": 0.5, "loss": null} |' in card
    assert f"jlora predict {config.output.folder} 'where is my courier'" in card
    assert "params = jlora.merge(run.params)" in card
    assert configs.to_toml(config) in card
    assert f"jax {jax.__version__}" in card


@pytest.mark.parametrize(
    "mesh, words",
    [
        ("data", r"run\.mesh = 'data' is no mesh\.\nFix: write it as in"),
        ("dat=1", r"unknown axes\.\n  'dat'\nFix: its axes are data and model"),
        ("data=2", r"does not fit the devices\.\n  2 needs 2 devices, 1 available\nFix: make it smaller"),
        ("data=0", r"does not fit the devices\.\n  data=0"),
    ],
)
def test_a_mesh_that_can_not_be_is_refused(jobs, mesh, words):
    config = settings(jobs["sequence_classification"].config, run={"mesh": mesh})
    with pytest.raises(ValueError, match=words):
        runs.read_mesh(config)


def test_what_is_measured_is_what_the_task_says(jobs):
    for name, job in jobs.items():
        assert set(job.task.score(job.params, job.validation[:2]).metrics) == MEASURES[name]
