"""Training from Python: quiet, without the command line, with the files and the result of `jlora train`."""

import inspect
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny_job

import jlora
from jlora.cli.main import main
from jlora.runs import config as configs
from jlora.runs.config import Adapter, Config, Data, Model, Optimisation, Output
from jlora.runs.engine import Evaluation, Step, StepMemory
from jlora.runs.predict import predict
from jlora.runs.train import BestAdapter, TrainingEnd, TrainingSetup

quick = tiny_job.quick
RUNS = Path(jlora.__file__).parent / "runs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and the files of a classification job."""
    parent = tmp_path_factory.mktemp("python")
    tiny_job.make_model(parent / "job" / "model")
    for split in tiny_job.FRAMES:
        tiny_job.write_lines(parent / "job" / f"{split}.jsonl", tiny_job.questions(split))
    return parent / "job"


def make_config(folder: Path, output: str) -> Config:
    return Config(
        model=Model(name=str(folder / "model"), pooling="mean"),
        data=Data(train=folder / "train.jsonl", validation=folder / "validation.jsonl", max_length=32),
        adapter=Adapter(rank=4),
        optimisation=Optimisation(learning_rate=0.02, b_ratio=1.0, head_ratio=3.0, epochs=5, batch_size=8, clip=1.0),
        output=Output(folder=folder / output, log_every=3),
    )


def test_the_documented_example_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    example = inspect.getdoc(jlora.train)
    assert example is not None
    exec(textwrap.dedent(example.split("```python\n")[1].split("```")[0]), {})
    accuracy, label = capsys.readouterr().out.splitlines()
    result = json.loads((folder / "run" / "result.json").read_text())
    assert float(accuracy) == result["after"]["accuracy"]
    assert label in tiny_job.TOPICS


def test_a_job_from_python_is_quiet_reports_events_and_gives_what_the_command_gives(folder, capfd):
    events: list = []
    config = make_config(folder, "python")
    result = jlora.train(config, report=events.append)
    assert capfd.readouterr() == ("", "")
    kinds = [type(event) for event in events]
    assert kinds[:2] == [TrainingSetup, StepMemory] and kinds[-2:] == [BestAdapter, TrainingEnd]
    assert set(kinds[2:-2]) == {Step, Evaluation}
    best = [event for event in events if isinstance(event, Evaluation) and event.best][-1]
    assert (result.best_step, result.best["loss"]) == (best.step, best.loss)
    assert events[-1].result is result

    toml = folder / "job.toml"
    toml.write_text(configs.to_toml(make_config(folder, "command")))
    assert main(["train", str(toml)]) == 0
    files = [sorted(path.name for path in (folder / name).iterdir()) for name in ("python", "command")]
    assert files[0] == files[1]
    metrics = [(folder / name / "metrics.jsonl").read_bytes() for name in ("python", "command")]
    assert metrics[0] == metrics[1]
    results = [json.loads((folder / name / "result.json").read_text()) for name in ("python", "command")]
    assert results[0] == json.loads(json.dumps(result.as_dict()))
    for values in results:
        del values["seconds"], values["peak_memory_bytes"], values["adapter_bytes"]
    assert results[0] == results[1]


def test_the_loaded_run_predicts_as_well_as_the_result_says(folder):
    run = jlora.load_run(folder / "python")
    records = tiny_job.questions("validation")
    predictions = list(predict(run, [record["text"] for record in records]))
    right = [p["entries"][0]["label"] == record["label"] for p, record in zip(predictions, records, strict=True)]
    result = json.loads((folder / "python" / "result.json").read_text())
    assert sum(right) / len(right) == pytest.approx(result["after"]["accuracy"])


def test_a_config_from_python_that_can_not_be_used_is_refused_before_anything_is_written(folder):
    config = make_config(folder, "refused")
    wrong = Config(model=config.model, data=config.data, output=config.output, adapter=Adapter(rank=0))
    with pytest.raises(jlora.JloraError, match=r"entry of the config can't be used.*\n.*adapter\.rank"):
        jlora.train(wrong)
    assert not (folder / "refused").exists()


def test_training_imports_no_command_line():
    code = (
        "import sys, jlora; jlora.train, jlora.load_run; print([name for name in sys.modules if 'jlora.cli' in name])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    sources = {path.name: path.read_text() for path in RUNS.glob("*.py")}
    assert not [name for name, text in sources.items() if re.search(r"^\s*(from|import) rich\b", text, re.M)]
