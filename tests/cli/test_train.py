"""`jlora train` and `jlora predict` as people use them: one tiny job from files to answers, and every mistake."""

import gzip
import importlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest
import tiny_job
from tiny_job import change, lines
from transformers import AutoTokenizer

from jlora.cli.main import main
from jlora.runs import config
from jlora.runs import folder as runs
from jlora.runs.predict import prompt_of, question_of
from jlora.training.checkpoint import restore_adapter

QUESTION = "problem with my courier"
quick = tiny_job.quick


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_job.make_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_job.make_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def job(model, tmp_path_factory):
    """A job that has been run once: the folder its TOML file is in, and the run's."""
    toml = tiny_job.make_job(tmp_path_factory.mktemp("job") / "job", model)
    assert main(["train", str(toml)]) == 0
    return toml, toml.parent / "run"


@pytest.fixture
def fresh(model, tmp_path):
    """A job not run yet: its TOML file."""
    return tiny_job.make_job(tmp_path / "job", model)


def test_training_lifts_accuracy_and_leaves_a_whole_run(job):
    toml, run = job
    result = json.loads((run / "result.json").read_text())
    assert result["asked"] == "test"
    assert result["before"]["accuracy"] < 0.6
    assert result["after"]["accuracy"] > 0.85
    evaluations = [line for line in lines(run) if line["event"] == "evaluation"]
    assert [line["epoch"] for line in evaluations] == [1, 2, 3, 4, 5]
    best = [line for line in evaluations if line["best"]][-1]
    assert result["best_step"] == best["step"]
    assert result["best"] == {"loss": best["loss"], **best["metrics"]}
    steps = [line for line in lines(run) if line["event"] == "step"]
    assert [line["step"] for line in steps] == sorted({*range(2, 46, 2), 9, 18, 27, 36, 45})
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert (run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert "jlora predict" in (run / "README.md").read_text()
    assert config.read(run / "config.toml") == config.read(toml)
    assert json.loads((run / "labels.json").read_text()) == [
        {"label": label, "answer": f"All about {label}."} for label in sorted(tiny_job.TOPICS)
    ]
    assert len(list((run / "checkpoints").iterdir())) == 2
    on_disk = sum(path.stat().st_size for path in (run / "adapter").rglob("*") if path.is_file())
    assert result["adapter_bytes"] == on_disk
    assert 1e8 < result["peak_memory_bytes"] < 1e11


def test_the_counts_are_those_of_the_shapes(job):
    # One layer, 32 wide, 64 in the middle: four kernels 32 x 32, one 32 x 64, one 64 x 32, rank 4; and a head of 3.
    result = json.loads((job[1] / "result.json").read_text())
    wide = tiny_job.SIZES["intermediate_size"]
    assert result["trainable"] == 4 * (4 * (32 + 32) + 2 * (32 + wide)) + 32 * 3 + 3


def test_the_same_seed_gives_the_same_run_to_the_bit(fresh, job):
    _, run = job
    assert main(["train", str(fresh)]) == 0
    again = fresh.parent / "run"
    assert (again / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    base = runs.load_run(again).task.loaded.params
    first, second = (restore_adapter(folder / "adapter", base) for folder in (run, again))
    leaves = jax.tree.leaves
    assert all((one == two).all() for one, two in zip(leaves(first), leaves(second), strict=True))


def test_a_job_without_validation_keeps_the_last_step_and_is_measured_on_what_there_is(fresh, capsys):
    flags = ["--optimisation.epochs", "1"]
    text = mistake(capsys, "sweep", str(fresh), *flags, "--data.validation", "false")
    assert "sweep: a sweep compares its members on validation data" in text
    change(fresh, 'validation = "validation.jsonl"', "validation = false")
    results = {}
    for name in ("test", "train"):
        if name == "train":
            change(fresh, 'test = "test.jsonl"\n', "")
        assert main(["train", str(fresh), *flags, "--output.overwrite"]) == 0
        run = fresh.parent / "run"
        results[name] = json.loads((run / "result.json").read_text())
        assert results[name]["asked"] == name
        assert (results[name]["best_step"], results[name]["best"]) == (9, {})
        assert (run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
        assert {line["event"] for line in lines(run)} == {"step"}
        assert "- validation:" not in (run / "README.md").read_text()
        flat = " ".join(capsys.readouterr().out.split())
        assert "No validation data: the adapter of the last step is kept." in flat
        assert "last step │ 9 │" in flat
    assert results["train"]["after"]["loss"] < results["train"]["before"]["loss"]


def test_chats_of_another_format_in_compressed_files_are_trained_on_and_what_is_left_out_is_counted(tmp_path, capsys):
    toml = tiny_job.make_other_job(tmp_path / "job", tiny_job.make_llama(tmp_path / "llama"), "instruction")
    for split, folder in (("train", tmp_path / "job/data"), ("validation", tmp_path / "job")):
        folder.mkdir(exist_ok=True)
        rows = [
            {"instruction": chat["question"], "input": "please", "output": chat["answer"]}
            for chat in tiny_job.chats(split)
        ]
        if split == "train":
            rows[0]["output"] = "ask " * 40
            rows[1]["input"] = rows[2]["input"] = "please " * 40
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    change(toml, 'train = "train.jsonl"', 'train = "data"')
    change(toml, 'validation = "validation.jsonl"', 'validation = "validation.jsonl.gz"')
    change(toml, "epochs = 6", "epochs = 1")
    assert main(["train", str(toml)]) == 0
    shown = capsys.readouterr().out
    assert "Records: 72 train, 24 validation." in shown
    assert "\nRead as alpaca ('instruction', 'output', 'input').\n" in shown
    assert "\ntrain: 1 chat is cut off at max_length = 32 tokens: raise data.max_length.\n" in shown
    reason = "dropped, since the prompt alone fills max_length = 32 tokens: raise data.max_length."
    assert f"\ntrain: 2 chats are {reason}\n" in shown
    assert main(["eval", str(tmp_path / "job/run"), "--data", str(tmp_path / "job/data/train.jsonl.gz"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["records"], found["cut"], found["dropped"]) == (72, 1, 2)


def test_flags_win_over_the_file_and_a_run_is_not_written_over_unless_asked(fresh, capsys):
    run = fresh.parent / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("old\n")
    (run / "notes.txt").write_text("mine\n")
    flags = ["--adapter.rank", "2", "--optimisation.epochs", "1", "--optimisation.b-ratio", "4"]
    text = mistake(capsys, "train", str(fresh), *flags)
    assert "run holds a run already.\n" in text
    assert "--output.overwrite" in text
    assert (run / "metrics.jsonl").read_text() == "old\n"
    assert main(["train", str(fresh), *flags, "--output.overwrite"]) == 0
    assert lines(run)[-1]["epoch"] == 1
    assert (run / "notes.txt").read_text() == "mine\n"
    written = tomllib.loads((fresh.parent / "run" / "config.toml").read_text())
    assert (written["adapter"]["rank"], written["adapter"]["alpha"]) == (2, 8.0)
    assert (written["optimisation"]["epochs"], written["optimisation"]["b_ratio"]) == (1, 4.0)
    shown = capsys.readouterr().out
    flat = " ".join(shown.split())
    assert "6 kernels at rank 2, scaling 4, and classifier in full." in flat
    assert "3 classes. Records: 72 train, 24 validation, 24 test. 9 steps, 9 to an epoch." in flat
    assert "Read as labeled texts ('text', 'label')." in flat
    assert "of parameters, optimizer state and batch" in flat
    assert "epoch 1/1 step 9 loss " in flat
    logged = re.findall(r"^step (\d+)/9  epoch 1/1  loss \d.* examples/s  lr \d\.\de-0\d$", shown, re.M)
    assert logged == ["2", "4", "6", "8"]
    for row in ("test accuracy before", "test accuracy after", "parameters trained", "adapter on disk", "seconds"):
        assert row in shown
    assert "on 24 rows (logits within" in shown
    assert "where is my courier\n  0." in shown


def test_a_second_process_is_refused_until_the_first_has_ended_even_by_a_kill(fresh, capsys):
    folder = fresh.parent / "run"
    folder.mkdir()
    sweep = fresh.parent / "run-sweep"
    sweep.mkdir()
    lock = runs.FolderLock("train", folder)
    with lock:
        # The folder is locked only after the first look at it, when the run begins to write.
        holders = [tiny_job.hold_lock(path / "run.lock") for path in (folder, sweep)]
        with pytest.raises(BlockingIOError, match=r"train: another process is writing to .*run\.\nFix: wait until"):
            lock.acquire()
    assert "train: another process is writing to" in mistake(capsys, "train", str(fresh), "--output.overwrite")
    assert "sweep: another process is writing to" in mistake(capsys, "sweep", str(fresh), "--ranks", "2")
    assert [list(path.iterdir()) for path in (folder, sweep)] == [[folder / "run.lock"], [sweep / "run.lock"]]
    for holder in holders:
        holder.kill()
        holder.communicate()
    for path in (folder, sweep):
        with runs.FolderLock("train", path) as lock:
            lock.acquire()
            assert (path / "run.lock").read_text().startswith(f"process {os.getpid()} on ")
            with pytest.raises(BlockingIOError, match=rf"process {os.getpid()} on .* is writing to"):
                runs.FolderLock("train", path).acquire()
    assert runs.check_folder(config.read(fresh)) is False


@pytest.mark.parametrize("damage", ["deleted", "damaged"])
def test_a_run_whose_best_adapter_is_lost_is_refused_before_it_trains_on(damage, job, tmp_path, capsys):
    toml, run = job
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    # As a run that was killed before its end.
    (copy / "result.json").unlink()
    (data, *_) = sorted(path for path in (copy / "adapter").rglob("*") if path.is_file() and path.stat().st_size > 2000)
    if damage == "deleted":
        shutil.rmtree(copy / "adapter")
    else:
        data.write_bytes(data.read_bytes()[:-1])
    before = (copy / "metrics.jsonl").read_bytes()
    text = mistake(capsys, "train", str(toml), "--output.folder", str(copy))
    assert (
        "resume: the best adapter so far can't be read, and the run can't end without it.\n  restore_adapter: " in text
    )
    assert "begin anew with --output.overwrite." in text
    assert (copy / "metrics.jsonl").read_bytes() == before
    shutil.rmtree(copy / "adapter", ignore_errors=True)
    shutil.copytree(run / "adapter", copy / "adapter")
    assert main(["train", str(toml), "--output.folder", str(copy)]) == 0
    assert (copy / "metrics.jsonl").read_bytes() == before


def test_predict_answers_in_words_and_as_json(job, capsys):
    _, run = job
    assert main(["predict", str(run), QUESTION]) == 0
    text = capsys.readouterr().out.splitlines()
    assert text[0] == QUESTION
    probability, label = text[1].split()
    assert text[2].strip() == f"All about {label}."
    assert main(["predict", str(run), QUESTION, "money", "--top", "2", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["question"] for line in found] == [QUESTION, "money"]
    for line in found:
        first, second = (entry["probability"] for entry in line["entries"])
        assert 1 >= first >= second
        assert first + second <= 1
    assert (found[0]["entries"][0]["label"], round(found[0]["entries"][0]["probability"], 3)) == (
        label,
        float(probability),
    )


def test_predictions_reach_the_accuracy_that_training_reported(job, capsys, monkeypatch):
    _, run = job
    asked = tiny_job.questions("test")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(record["text"] for record in asked) + "\n\n"))
    assert main(["predict", str(run), "--json"]) == 0
    found = [json.loads(line)["entries"][0]["label"] for line in capsys.readouterr().out.splitlines()]
    right = [label == record["label"] for label, record in zip(found, asked, strict=True)]
    result = json.loads((run / "result.json").read_text())
    assert sum(right) / len(right) == pytest.approx(result["after"]["accuracy"])


def test_a_run_answers_with_its_base_moved_elsewhere(job, model, tmp_path, capsys):
    _, run = job
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in model.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    assert main(["predict", str(run), QUESTION, "--model", str(moved)]) == 0
    assert main(["predict", str(run), QUESTION]) == 0
    first, second = capsys.readouterr().out.strip().split(QUESTION)[1:]
    assert first.split() == second.split()


def card_output(run: Path, capsys) -> dict[str, str]:
    """What the code of a run's README.md prints, run as it is written."""
    found = {}
    for kind, text in re.findall(r"^```(sh|python)\n(.*?)^```$", (run / "README.md").read_text(), re.M | re.S):
        capsys.readouterr()
        if kind == "python":
            exec(text, {})
        else:
            program, *argv = shlex.split(text)
            assert (program, main(argv)) == ("jlora", 0)
        found[kind] = capsys.readouterr().out
    return found


def test_the_readme_of_a_run_runs_as_it_is_written(job, capsys):
    assert main(["predict", str(job[1]), "where is my courier"]) == 0
    answer = capsys.readouterr().out
    assert card_output(job[1], capsys) == {"sh": answer, "python": answer}


def trained(folder: Path, model: Path, task: str, capsys, *flags: str) -> tuple[Path, dict, str]:
    """A run of another task: its folder, its result and what the commands had to say of its question."""
    toml = tiny_job.make_other_job(folder, model, task)
    assert main(["train", str(toml), *flags]) == 0
    (question,) = config.read(toml).data.questions
    shown = capsys.readouterr().out
    assert main(["predict", str(folder / "run"), question]) == 0
    answer = capsys.readouterr().out
    assert shown.endswith(answer)
    assert card_output(folder / "run", capsys) == {"sh": answer, "python": answer}
    assert main(["predict", str(folder / "run"), question, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.pop("question") == question
    return folder / "run", found, shown


def test_tokens_are_classified_and_judged_by_their_entities(model, tmp_path, capsys):
    run, answer, shown = trained(tmp_path / "job", model, "token_classification", capsys)
    result = json.loads((run / "result.json").read_text())
    assert result["before"]["f1"] < 0.2 < 0.4 < result["after"]["f1"]
    assert result["after"]["recall"] > 0.9
    assert answer == {"entities": [{"type": "PERSON", "text": "courier"}]}
    assert "where is my courier\n  PERSON: courier\n" in shown
    assert [entry["label"] for entry in json.loads((run / "labels.json").read_text())] == sorted(
        {tag for record in tiny_job.tagged("train") for tag in record["tags"]}
    )


def test_predict_says_what_max_length_left_out(model, tmp_path, capsys):
    tags = tiny_job.make_other_job(tmp_path / "tags", model, "token_classification")
    classes = tiny_job.make_job(tmp_path / "classes", model)
    short = ["--optimisation.steps", "1", "--data.max-length", "6"]
    for toml in (tags, classes):
        assert main(["train", str(toml), *short]) == 0
    capsys.readouterr()
    # Two of the six tokens are special.
    fits, long = "where is my courier", "where is my courier money please"
    where = "beyond data.max_length = 6 tokens"
    for toml, note in (
        (tags, f"2 words are not tagged, {where}"),
        (classes, f"the rest of the text is not read, {where}"),
    ):
        run = str(toml.parent / "run")
        assert main(["predict", run, fits, long, "--json"]) == 0
        found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert ["note" in line for line in found] == [False, True] and found[1]["note"] == note
        assert main(["predict", run, fits, long]) == 0
        text = capsys.readouterr().out
        assert text.count("beyond") == 1 and text.endswith(f"\n  ({note})\n")
    assert main(["predict", str(tags.parent / "run"), f"{fits} please"]) == 0
    assert f"(1 word is not tagged, {where})" in capsys.readouterr().out


def test_a_language_model_learns_texts_and_goes_on_with_one(llama, tmp_path, capsys):
    run, answer, shown = trained(tmp_path / "job", llama, "causal_lm", capsys, "--model.scan", "--output.tensorboard")
    result = json.loads((run / "result.json").read_text())
    assert result["after"]["loss"] < result["before"]["loss"] - 0.1
    assert set(answer) == {"answer"}
    steps = [line["loss"] for line in lines(run) if line["event"] == "step"]
    assert steps[-1] < steps[0] - 1
    assert "validation perplexity after" in shown
    events = b"".join(path.read_bytes() for path in (run / "events").iterdir())
    for name in (b"train/loss", b"train/learning_rate", b"validation/loss", b"validation/perplexity"):
        assert events.count(name) == (6 if b"validation" in name else len(steps))


def test_answers_are_learnt_through_the_chat_template(llama, tmp_path, capsys):
    run, answer, _ = trained(tmp_path / "a job's", llama, "instruction", capsys, "--data.no-pack")
    result = json.loads((run / "result.json").read_text())
    assert result["after"]["loss"] < 0.5 * result["before"]["loss"]
    # Learnt word for word: which topic it is may be mistaken by a model that was random two seconds ago.
    verb, topic = answer["answer"].split()
    assert verb == "ask" and topic in tiny_job.TOPICS
    counted = sum(len(record["answer"].split()) + 1 for record in tiny_job.chats("train"))
    assert sum(line["targets"] for line in lines(run) if line["event"] == "step") == 6 * counted
    check_sampling(run, tmp_path, capsys)
    long = [{"question": " ".join(tiny_job.words() * 2), "answer": "ask refund"}]
    data = tiny_job.write_lines(tmp_path / "long.jsonl", long)
    assert "eval: 1 split without a token" in mistake(capsys, "eval", str(run), "--data", str(data))


def check_sampling(run: Path, folder: Path, capsys) -> None:
    """A chat in a file is the question of its last turn; seeds draw, and the length is kept to."""
    (question,) = config.read(run / "config.toml").data.questions
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "ask refund"}]
    records = [question, {"question": question, "answer": "x"}, {"messages": turns}]
    records += [{"messages": [*turns, {"role": "user", "content": "money"}]}] * 20
    source = tiny_job.write_lines(folder / "chats.jsonl", records)

    def answers(*flags: str) -> list[str]:
        capsys.readouterr()
        assert main(["predict", str(run), "--input", str(source), "--json", *flags]) == 0
        return [json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()]

    greedy = answers("--max-new-tokens", "3")
    assert greedy[0] == greedy[1] == greedy[2] and len(set(greedy[3:])) == 1
    assert all(len(answer.split()) <= 3 for answer in greedy)
    drawn = answers("--max-new-tokens", "3", "--temperature", "9", "--seed", "1")
    assert len(set(drawn[3:])) > 5
    assert answers("--max-new-tokens", "3", "--temperature", "9", "--seed", "1") == drawn
    assert answers("--max-new-tokens", "3", "--temperature", "9", "--seed", "2") != drawn
    assert answers("--max-new-tokens", "3", "--temperature", "9", "--top-k", "1") == greedy


def test_python_m_jlora_runs_both_commands(fresh):
    def run(*args):
        command = [sys.executable, "-m", "jlora", *args]
        env = tiny_job.environment(fresh.parent / "cache")
        return subprocess.run(command, capture_output=True, text=True, cwd=fresh.parent, env=env, timeout=300)

    trained = run("train", "job.toml", "--optimisation.epochs", "1")
    assert (trained.returncode, trained.stderr) == (0, "")
    answered = run("predict", "run", QUESTION, "--json")
    assert (answered.returncode, answered.stderr) == (0, "")
    assert json.loads(answered.stdout)["question"] == QUESTION


def test_the_console_script_is_the_main_of_python_m():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    module, _, name = project["project"]["scripts"]["jlora"].partition(":")
    assert getattr(importlib.import_module(module), name) is importlib.import_module("jlora.__main__").main


def mistake(capsys, *args: str) -> str:
    """Runs a command that must be refused, and gives its words."""
    capsys.readouterr()
    assert main(args) == 2
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert "\nFix: " in shown.err
    return shown.err


def test_mistakes_in_the_config_are_told_before_anything_is_written(fresh, capsys, tmp_path, monkeypatch):
    run = fresh.parent / "run"
    monkeypatch.chdir(tmp_path)
    # A file that opens and can't be read, whoever the user is.
    (tmp_path / "unreadable.jsonl").symlink_to("/proc/self/mem")
    for flag, words in {
        "--adapter.rank=0": "adapter.rank = 0  expected: a whole number from 1",
        "--adapter.rank=99": "rank 99, allowed 1 to 32",
        "--adapter.targets=.*/querry/kernel": "'encoder/layer_0/attention/self/query/kernel'",
        "--model.name=./nowhere": "nowhere",
        "--data.max-length=100": "the model reads 64 tokens",
        "--output.folder=job.toml/run": "is a file, not a folder",
        "--output.folder=a[v1]": "train: Orbax can't use the path",
        "--data.test=gone.jsonl": "1 source can't be found.\n",
        "--optimisation.optimizer=adamv": "optax has no such optimizer.\n  'adamv'  nearest: adam",
        "--run.mesh=data=64": "64 needs 64 devices, 1 available",
        "--optimisation.accumulate=3": "equal microbatches.\n  batch_size = 8, accumulate = 3",
        "--optimisation.optimizer=lbfgs": "lbfgs",
        "--data.train=unreadable.jsonl": "unreadable.jsonl: Input/output error",
    }.items():
        flag = flag.replace("job.toml", str(fresh))
        assert words in mistake(capsys, "train", str(fresh), flag), flag
        assert not run.exists()
    change(fresh, "rank = 4", "rnak = 4")
    assert "adapter.rnak is unknown  nearest: adapter.rank" in mistake(capsys, "train", str(fresh))
    assert "gone.toml does not exist" in mistake(capsys, "train", "gone.toml")
    assert "name it first: jlora train CONFIG.toml" in mistake(capsys, "train")
    assert "name it first: jlora train CONFIG.toml" in mistake(capsys, "train", "--adapter.rank", "2", str(fresh))
    assert not run.exists()


def test_mistakes_in_the_data_are_told_before_anything_is_written(fresh, capsys):
    folder = fresh.parent
    for name, content, words in (
        ("train", "{oops\n", "train.jsonl:1  no JSON"),
        ("validation", "", "validation.jsonl  the file is empty"),
        ("test", '{"text": "x", "label": "refunds"}\n', "test.jsonl:1  'refunds'  nearest: 'refund'"),
        ("test", '{"text": "money", "label": "refund"}\n', "'money' is in"),
        ("answers", '{"label": "refund", "answer": "Yes."}\n', "no answer for 'account'"),
    ):
        path = folder / f"{name}.jsonl"
        before = path.read_text()
        path.write_text(content)
        assert words in mistake(capsys, "train", str(fresh))
        path.write_text(before)
    assert not (folder / "run").exists()


def test_predict_reads_a_file_and_writes_one(job, tmp_path, capsys):
    asked = ["where is my courier", "money pl\u00e9ase", "login"]
    records = [{"text": asked[0], "label": "delivery"}, asked[1], {"question": asked[2]}]
    source, output = tiny_job.write_lines(tmp_path / "in put.jsonl", records), tmp_path / "out put.jsonl"
    source.write_text("\ufeff" + source.read_text() + "\n")
    run = str(job[1])
    assert main(["predict", run, "--input", str(source), "--output", str(output), "--top", "2"]) == 0
    assert f"3 answers written to {output}" in capsys.readouterr().out
    assert main(["predict", run, *asked, "--top", "2", "--json"]) == 0
    assert output.read_text(encoding="utf-8") == capsys.readouterr().out
    before = output.read_bytes()
    text = mistake(capsys, "predict", run, "--input", str(source), "--output", str(output))
    assert f"predict: {output} exists.\nFix: choose another --output, or pass --overwrite." in text
    assert output.read_bytes() == before
    assert main(["predict", run, "money", "--output", str(output), "--overwrite"]) == 0
    assert json.loads(output.read_text())["question"] == "money"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in put.jsonl", "out put.jsonl"]


TOOL = {"type": "function", "function": {"name": "track", "parameters": {"type": "object"}}}
TOOLS = "{% if tools %}<user> {{ tools | tojson }} {% endif %}" + tiny_job.CHAT
Q, R = ({"role": "user", "content": text} for text in ("why", "please"))
A = {"role": "assistant", "content": "ask"}
PROMPTS = {
    "messages": ({"messages": [Q, A, R, A], "tools": [TOOL]}, [Q, A, R], [TOOL]),
    "tools as text": ({"question": "why", "tools": json.dumps([TOOL])}, [Q], [TOOL]),
    "history": ({"instruction": "please", "output": "left out", "history": [["why", "ask"]]}, [Q, A, R], None),
    "sharegpt": ({"conversations": [{"from": "human", "value": "why"}], "tools": []}, [Q], None),
    "system": ({"prompt": [Q, A, R], "system": "please"}, [R | {"role": "system"}, Q, A, R], None),
    "renamed": ({"ask": "why"}, [Q], None),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_question_in_a_file_is_the_chat_that_transformers_writes(name, llama):
    record, messages, tools = PROMPTS[name]
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = TOOLS
    data = config.Data(task="instruction", train=Path("/a"), question="ask" if name == "renamed" else "question")
    found = prompt_of(tokenizer, question_of(record, data), chat=True)
    options = {"tools": tools, "add_generation_prompt": True, "return_dict": False}
    assert found == tokenizer.apply_chat_template(messages, **options)


def test_predict_answers_chats_with_tools_and_history_or_names_the_line(llama, tmp_path, capsys):
    base = shutil.copytree(llama, tmp_path / "base")
    (base / "chat_template.jinja").write_text(TOOLS)
    toml = tiny_job.make_other_job(tmp_path / "job", base, "instruction")
    assert main(["train", str(toml), "--optimisation.steps", "1"]) == 0
    run, source, output = str(toml.parent / "run"), tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    tiny_job.write_lines(source, [record for record, _, _ in list(PROMPTS.values())[:5]])
    argv = ["predict", run, "--input", str(source), "--output", str(output), "--max-new-tokens", "2"]
    assert main(argv) == 0, capsys.readouterr().err
    found = [json.loads(line)["question"] for line in output.read_text().splitlines()]
    texts = [messages if len(messages) > 1 or tools else "why" for _, messages, tools in list(PROMPTS.values())[:5]]
    assert found == texts
    assert main([*argv[:4]]) == 0
    assert capsys.readouterr().out.splitlines()[-2] == "please"
    tiny_job.write_lines(source, ["why", {"messages": [Q], "tools": {"a": 1}}, {"instruction": "a", "history": [1]}])
    text = mistake(capsys, *argv, "--overwrite")
    assert f"{source}:2  'tools' is {{'a': 1}}, expected a list of JSON schemas\n" in text
    assert f"{source}:3  'history[0]' is 1, expected" in text
    # A template that does not write the tools would leave them out without a word.
    (toml.parent / "run" / "tokenizer" / "chat_template.jinja").write_text(tiny_job.CHAT)
    (toml.parent / "run" / "files.json").unlink()
    tiny_job.write_lines(source, ["why", {"messages": [Q], "tools": [TOOL]}])
    text = mistake(capsys, *argv, "--overwrite")
    assert f"{source}:2  the chat template does not write the tools\n" in text
    assert len(output.read_text().splitlines()) == 5


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "holds no question"),
        (
            b'{"text": 7}\n\n{"label": "x"}\n{oops\n" "\n',
            "4 lines of {source} can't be used.\n  {source}:1  'text' is 7",
        ),
        (b'["a"]', "'the line' is [\"a\"], expected a text"),
        (b'"a"\n"\xff"', "is not UTF-8: byte 5"),
        (b"[" * 100_000, "1 line of {source} can't be used.\n  {source}:1  JSON that is nested too deeply"),
        (None, "can't be read: No such file or directory."),
        ("folder", "can't be read: Is a directory."),
    ],
)
def test_predict_says_what_is_wrong_with_its_file(content, words, job, tmp_path, capsys):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    if content == "folder":
        source.mkdir()
    elif content is not None:
        source.write_bytes(content)
    text = mistake(capsys, "predict", str(job[1]), "--input", str(source), "--output", str(output))
    assert words.format(source=source) in text
    assert not output.exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--temperature", "0.5"], "it generates no text.\n  --temperature is for language models"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0  expected"),
        (["--seed", "-1"], "seed is -1  expected"),
        (["--input", "in.jsonl"], "questions were given twice"),
        (["--output", "."], "is a folder, not a file"),
        (["--output", "no/such/out.jsonl"], "no/such is not a folder"),
    ],
)
def test_predict_refuses_flags_that_do_not_fit(flags, words, job, capsys):
    assert words in mistake(capsys, "predict", str(job[1]), QUESTION, *flags)


def test_predict_refuses_what_it_can_not_answer(job, capsys, monkeypatch, tmp_path):
    run = str(job[1])
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert "no question was given" in mistake(capsys, "predict", run)
    text = mistake(capsys, "predict", run, "fine", " ", "--top", "0")
    assert "question 2 is blank\n  --top 0  expected: a whole number from 1" in text
    assert "holds no run" in mistake(capsys, "predict", str(tmp_path), QUESTION)


@pytest.mark.parametrize("name", ["config.toml", "labels.json", "adapter/adapter.json", "tokenizer/tokenizer.json"])
def test_a_file_of_a_run_that_can_not_be_read_is_one_error(name, job, capsys, tmp_path):
    run = shutil.copytree(job[1], tmp_path / "run")
    (run / name).unlink()
    # Opens, and can't be read, whoever the user is.
    (run / name).symlink_to("/proc/self/mem")
    assert Path(name).name in mistake(capsys, "predict", str(run), QUESTION)
    (run / name).unlink()
    (run / name).mkdir()
    assert Path(name).name in mistake(capsys, "predict", str(run), QUESTION)


def test_predict_refuses_another_base(job, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(tiny_job.SIZES, "intermediate_size", 48)
    other = tiny_job.make_model(tmp_path / "other")
    text = mistake(capsys, "predict", str(job[1]), QUESTION, "--model", str(other))
    assert "encoder/layer_0/intermediate/dense/kernel" in text


def test_exit_codes_tell_a_fault_and_a_stop_from_a_mistake(job, capsys, monkeypatch):
    for error, code, words in (
        (KeyboardInterrupt(), 130, "jlora: stopped."),
        (ValueError("shapes differ"), 1, "Traceback"),
        (RuntimeError("broken"), 1, "Traceback"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
    ):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr("jlora.cli.predict.load_run", fail)
        assert main(["predict", str(job[1]), QUESTION]) == code
        assert words in capsys.readouterr().err


def test_unknown_flags_exit_with_2_and_help_shows_every_key_with_the_files_value(job, capsys):
    toml, _ = job
    with pytest.raises(SystemExit) as caught:
        main(["train", str(toml), "--adapter.rnak", "3"])
    assert caught.value.code == 2
    assert "--adapter.rank" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["train", str(toml), "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for section, keys in tomllib.loads((job[1] / "config.toml").read_text()).items():
        for key in keys:
            assert f"--{section}.{key.replace('_', '-')}" in shown
    assert "(default: 0.02)" in shown
    for command in ("train", "predict"):
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0


def test_a_bfloat16_classifier_ends_with_its_result_though_near_ties_are_rounded_otherwise(fresh):
    pairs = itertools.islice(itertools.permutations(tiny_job.words(), 2), 600)
    tiny_job.write_lines(fresh.parent / "test.jsonl", [{"text": f"{a} {b} {a}", "label": "refund"} for a, b in pairs])
    assert main(["train", str(fresh), "--model.dtype", "bfloat16", "--data.allow-overlap"]) == 0
    result = json.loads((fresh.parent / "run" / "result.json").read_text())
    assert result["warnings"] == []
    # More than one unit in the last place of bfloat16 at 4.
    assert result["merged_difference"] > 2**-6


def test_a_split_without_a_target_is_an_error_before_training(llama, tmp_path, capsys):
    toml = tiny_job.make_other_job(tmp_path / "job", llama, "instruction")
    long = [{"question": " ".join(tiny_job.words() * 2), "answer": "ask refund"}]
    tiny_job.write_lines(toml.parent / "validation.jsonl", long)
    for command in ("train", "sweep"):
        text = mistake(capsys, command, str(toml))
        assert f"{command}: 1 split without a token to learn or to measure.\n  validation  max_length = 32 " in text
    assert [path.name for path in toml.parent.iterdir() if path.is_dir()] == []
