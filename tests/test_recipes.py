"""The recipe for classification: its loss, its rates, its best epoch and what it leaves on disk."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_job

from jlora.core.paths import flatten
from jlora.core.tree import merge, split
from jlora.recipes import classify, config
from jlora.recipes.classify import Epoch, Step
from jlora.recipes.config import Optimisation
from jlora.recipes.data import load_corpus, pad, to_rows


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A tiny job: config, base model, wrapped parameters with a non-zero B, and rows of every split."""
    folder = tmp_path_factory.mktemp("recipes")
    job = config.read(tiny_job.make_job(folder / "job", tiny_job.make_model(folder / "model")))
    data = job.data
    corpus = load_corpus(train=data.train, validation=data.validation, test=data.test)
    loaded = classify.load_base(job, corpus.labels)
    params = classify.wrap_base(job, loaded)
    rows = [to_rows(loaded.tokenizer, part, corpus.labels, data.max_length) for part in corpus[:3]]
    return job, loaded, params, rows, classify.forward_of(loaded)[0]


def with_b(params):
    """The tree with a B that is not zero."""
    noise = lambda path, leaf: leaf + 0.1 if "_lora_b" in jax.tree_util.keystr(path) else leaf
    return jax.tree_util.tree_map_with_path(noise, params)


def test_the_schedule_rises_over_the_warm_up_and_decays_as_named():
    options = Optimisation(learning_rate=2.0, warmup=0.25)
    steps = np.arange(41)
    rise, rest = steps / 10, (steps - 10) / 30
    oracles = {
        "linear": 1 - rest,
        "cosine": 0.5 * (1 + np.cos(np.pi * rest)),
        "constant": np.ones(41),
    }
    for name, after in oracles.items():
        rate = classify.schedule(dataclasses.replace(options, schedule=name), 40)
        expected = 2 * np.where(steps < 10, rise, after)
        np.testing.assert_allclose([float(rate(n)) for n in steps], expected, atol=1e-6)
    cold = classify.schedule(dataclasses.replace(options, warmup=0.0), 40)
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
    tx = classify.make_optimizer(options, 10, adapters)
    grads = jax.tree.map(lambda leaf: jnp.ones_like(leaf), adapters)
    updates, _ = tx.update(grads, tx.init(adapters), adapters)
    rates = {"kernel_lora_a": 1e-3, "kernel_lora_b": 16e-3, "kernel": 5e-3, "bias": 5e-3}
    for path, update in flatten(updates).items():
        np.testing.assert_allclose(update, -rates[path.split("/")[-1]] * (1 + 0.5 * 2.0), rtol=1e-5)


def test_rows_that_fill_a_batch_up_change_neither_loss_nor_gradient(job):
    _, loaded, params, (rows, *_), _ = job
    params = with_b(params)
    loss = jax.jit(jax.value_and_grad(classify.make_loss(loaded, 0.0)))
    key = jax.random.key(0)
    three = pad(rows[:3], size=3, length=16, pad_id=0)
    eight = pad(rows[:3], size=8, length=16, pad_id=0)
    small, small_grads = loss(params, three, key)
    large, large_grads = loss(params, eight, key)
    np.testing.assert_allclose(large * 8, small * 3, rtol=1e-5)
    for path, grad in flatten(split(large_grads, classify.HEAD)[0]).items():
        np.testing.assert_allclose(grad * 8, flatten(small_grads)[path] * 3, rtol=1e-3, atol=1e-5)


def test_the_loss_is_the_mean_cross_entropy_of_the_models_own_logits(job):
    _, loaded, params, (rows, *_), _ = job
    params = with_b(params)
    batch = pad(rows[:5], size=5, length=16, pad_id=0)
    merged = merge(params)
    apply = jax.jit(lambda *args: loaded.model.apply({"params": merged}, *args))
    logits = apply(batch["input_ids"], batch["attention_mask"])
    wide = np.asarray(logits, np.float64)
    chosen = wide[np.arange(5), batch["labels"]]
    oracle = (np.log(np.exp(wide).sum(-1)) - chosen).mean()
    found = jax.jit(classify.make_loss(loaded, 0.0))(params, batch, jax.random.key(0))
    np.testing.assert_allclose(found, oracle, rtol=1e-5)


def test_dropout_draws_by_its_key(job):
    _, loaded, params, (rows, *_), _ = job
    batch = pad(rows[:5], size=5, length=16, pad_id=0)
    loss = jax.jit(classify.make_loss(loaded, 0.5))
    first, again, other = (float(loss(with_b(params), batch, jax.random.key(n))) for n in (1, 1, 2))
    assert first == again != other


def test_evaluation_does_not_depend_on_how_questions_are_batched(job):
    _, loaded, params, (_, rows, _), forward = job
    params = with_b(params)
    together = classify.evaluate(forward, params, rows, batch_size=16, max_length=32, pad_id=0)
    merged = merge(params)
    apply = jax.jit(lambda ids: loaded.model.apply({"params": merged}, ids))
    for n in (0, 7, 23):
        alone = apply(np.array([rows[n].ids]))
        np.testing.assert_allclose(together.logits[n], alone[0], atol=1e-4)
    classes = np.array([row.label for row in rows])
    assert together.accuracy == (together.logits.argmax(-1) == classes).mean()


def test_log_softmax_holds_for_logits_that_would_overflow():
    logits = np.array([[1000.0, 0.0], [-3.0, -3.0]], np.float32)
    np.testing.assert_allclose(classify.log_softmax(logits), [[0, -1000], [-np.log(2)] * 2])


def test_fit_tells_of_every_step_and_the_best_epoch_is_the_one_validation_says(job):
    settings, loaded, params, (train, validation, _), forward = job
    events = list(classify.fit(settings, loaded, params, train, validation, forward))
    steps = [event for event in events if isinstance(event, Step)]
    epochs = [event for event in events if isinstance(event, Epoch)]
    assert [epoch.epoch for epoch in epochs] == [1, 2, 3, 4, 5]
    assert sum(step.questions for step in steps) == 5 * len(train)
    assert steps[-1].step == steps[-1].steps
    assert epochs[-1].loss < 0.5 * epochs[0].loss
    ranked = [(epoch.validation.accuracy, -epoch.validation.loss) for epoch in epochs]
    assert [epoch.best for epoch in epochs] == [
        all(one > earlier for earlier in ranked[:n]) for n, one in enumerate(ranked)
    ]
    # What an epoch hands out is still there after later steps, and the base never moved.
    for epoch in epochs:
        scores = classify.evaluate(forward, epoch.params, validation, batch_size=16, max_length=32, pad_id=0)
        assert scores.loss == epoch.validation.loss
        frozen = flatten(split(epoch.params, classify.HEAD)[1])
        for path, leaf in flatten(split(params, classify.HEAD)[1]).items():
            assert np.array_equal(frozen[path], leaf)


def test_a_run_read_back_predicts_as_the_one_saved(job, tmp_path):
    settings, _, params, (_, _, test), forward = job
    settings = dataclasses.replace(settings, output=dataclasses.replace(settings.output, folder=tmp_path / "run"))
    params = with_b(params)
    params["classifier"]["kernel"] = params["classifier"]["kernel"] * 3
    answers = {label: f"About {label}." for label in tiny_job.TOPICS}
    classify.begin_run(settings, sorted(tiny_job.TOPICS), answers)
    classify.save_params(tmp_path / "run", params)
    run = classify.load_run(tmp_path / "run")
    assert (run.labels, dict(run.answers)) == (tuple(sorted(tiny_job.TOPICS)), answers)
    shapes = {"batch_size": 16, "max_length": 32, "pad_id": 0}
    saved = classify.evaluate(forward, params, test, **shapes)
    read = classify.evaluate(forward, run.params, test, **shapes)
    assert np.array_equal(saved.logits, read.logits)
    texts = [record["text"] for record in tiny_job.questions("test")]
    oracle = np.asarray(jax.nn.softmax(saved.logits))
    plain, merged = classify.forward_of(run.loaded)[1], merge(run.params)
    for size in (5, 24):
        found = classify.probabilities(run, plain, merged, texts, batch_size=size)
        np.testing.assert_allclose(found, oracle, atol=1e-4)


def test_a_damaged_run_is_an_error_that_names_the_file(job, tmp_path):
    settings, _, params, _, _ = job
    settings = dataclasses.replace(settings, output=dataclasses.replace(settings.output, folder=tmp_path))
    classify.begin_run(settings, sorted(tiny_job.TOPICS), {})
    with pytest.raises(FileNotFoundError, match=r"holds no run\.\n  .*adapter\nFix: pass the folder that"):
        classify.load_run(tmp_path)
    classify.save_params(tmp_path, params)
    (tmp_path / "labels.json").write_text('[{"lable": "a"}]')
    with pytest.raises(ValueError, match=r"labels\.json is damaged: KeyError\('label'\)"):
        classify.load_run(tmp_path)


def test_more_tokens_than_the_model_has_positions_is_an_error(job):
    settings = job[0]
    long = dataclasses.replace(settings, data=dataclasses.replace(settings.data, max_length=65))
    with pytest.raises(ValueError, match=r"max_length is 65, the model reads 64 tokens\.\nFix: set max_length to 64"):
        classify.load_base(long, ["a", "b"])


def test_an_unwritable_folder_is_found_out_before_anything_is_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"file is a file, not a folder"):
        classify.check_folder(tmp_path / "file" / "run", overwrite=False)
    classify.check_folder(tmp_path / "deep" / "run", overwrite=False)
    assert not (tmp_path / "deep").exists()
    if Path("/proc/self").is_dir():
        with pytest.raises(PermissionError, match="can't be written to"):
            classify.check_folder(Path("/proc/self/run"), overwrite=False)
