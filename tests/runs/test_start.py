"""Training that starts from an adapter: a run's, jlora's own, or PEFT's."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_job

from jlora.cli.main import main
from jlora.runs import config
from jlora.runs import folder as runs

quick = tiny_job.quick
SHORT = ("--optimisation.epochs", "1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A classifier and a language model, each trained once: the TOML file of their jobs."""
    folder = tmp_path_factory.mktemp("start")
    jobs = {
        "classifier": tiny_job.make_job(folder / "classifier", tiny_job.make_model(folder / "bert")),
        "language": tiny_job.make_other_job(folder / "language", tiny_job.make_llama(folder / "llama"), "causal_lm"),
    }
    for toml in jobs.values():
        assert main(["train", str(toml), *SHORT]) == 0
    return jobs


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def mistake(capsys, toml: Path, start: Path, *flags: str) -> str:
    capsys.readouterr()
    output = toml.parent / "refused"
    assert main(["train", str(toml), "--adapter.from", str(start), "--output.folder", str(output), *flags]) == 2
    text = capsys.readouterr().err
    assert text.count("\nFix: ") == 1 and not output.exists()
    return text


# A classifier that reads the mean can't be exported to PEFT.
@pytest.mark.parametrize(
    "job, form", [("classifier", "run"), ("classifier", "adapter"), ("language", "run"), ("language", "peft")]
)
def test_training_starts_where_the_adapter_was(job, form, trained, tmp_path):
    toml = trained[job]
    run = toml.parent / "run"
    start = {"run": run, "adapter": run / "adapter", "peft": tmp_path / "peft"}[form]
    if form == "peft":
        assert main(["export", str(run), "--out", str(start)]) == 0
    output = tmp_path / "next"
    assert main(["train", str(toml), *SHORT, "--adapter.from", str(start), "--output.folder", str(output)]) == 0
    assert result(output)["before"] == pytest.approx(result(run)["after"], rel=1e-5)
    assert result(output)["before"] != result(run)["before"]
    assert config.read(output / "config.toml").adapter.from_ == start
    # The run stands alone: what it started from may go.
    if form == "peft":
        shutil.rmtree(start)
    assert main(["predict", str(output), "where is"]) == 0


def test_a_run_that_started_from_an_adapter_is_resumed(trained, tmp_path):
    toml, output = trained["classifier"], tmp_path / "next"
    start = toml.parent / "run"
    argv = ["train", str(toml), *SHORT, "--adapter.from", str(start), "--output.folder", str(output)]
    assert main(argv) == 0
    first, history = result(output), (output / "metrics.jsonl").read_bytes()
    (output / "result.json").unlink()
    assert main(argv) == 0
    assert (output / "metrics.jsonl").read_bytes() == history
    assert result(output)["after"] == first["after"] and result(output)["before"] == first["before"]
    (output / "result.json").unlink()
    argv[argv.index(str(start))] = str(start / "adapter")
    assert main(argv) == 2


def test_an_adapter_that_the_config_does_not_describe_is_refused(trained, tmp_path, capsys):
    classifier, language = trained["classifier"], trained["language"]
    run = classifier.parent / "run"
    text = mistake(capsys, classifier, run, "--adapter.rank", "2")
    assert "'encoder/layer_0/attention/self/query/kernel' has rank 4 there, and 2 by the config" in text
    assert f"jlora inspect {run} shows them" in text
    text = mistake(capsys, classifier, run, "--adapter.alpha", "4")
    assert "has scaling 2 there, and 1 by the config" in text
    text = mistake(capsys, classifier, run, "--adapter.targets", ".*/query/kernel")
    assert "'encoder/layer_0/attention/self/key/kernel' has an adapter there, and none by the config" in text
    assert "holds no adapter" in mistake(capsys, classifier, tmp_path)
    assert "encoder/layer_0/attention/self/query/kernel" in mistake(capsys, language, run / "adapter")


def test_an_adapter_of_a_base_that_computed_something_else_is_refused(trained, tmp_path, capsys):
    toml = trained["language"]
    base = shutil.copytree(toml.parents[1] / "llama", tmp_path / "llama")
    content = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(content | {"rms_norm_eps": 1e-3}))
    run = toml.parent / "run"
    for start in (run, run / "adapter"):
        text = mistake(capsys, toml, start, "--model.name", str(base))
        assert "this is not the model the adapter was trained on" in text and "was 1e-05\n" in text


def test_an_adapter_of_other_labels_is_refused(trained, tmp_path, capsys):
    toml = trained["classifier"]
    run = shutil.copytree(toml.parent / "run", tmp_path / "run")
    labels = json.loads((run / runs.LABELS).read_text())
    (run / runs.LABELS).write_text(json.dumps(labels[::-1]))
    text = mistake(capsys, toml, run)
    assert "are not those of the data.\n  there: refund, delivery, account\n" in text


def test_a_sweep_draws_new_adapters(trained, capsys):
    toml = trained["classifier"]
    capsys.readouterr()
    assert main(["sweep", str(toml), "--adapter.from", str(toml.parent / "run")]) == 2
    assert "leave adapter.from out" in capsys.readouterr().err
