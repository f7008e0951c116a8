"""The job's TOML file: what is wrong with it is told all at once, and what is right reads back as it was."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jlora.cli import main
from jlora.runs import config as configs
from jlora.runs.config import Adapter, Config, Data, Model, Optimisation, Output, Run

EXAMPLE = Path(__file__).parents[2] / "examples" / "faq.toml"
WHOLE = {
    "model": {"name": "some/model"},
    "data": {"train": "a.jsonl", "validation": "b.jsonl", "test": "c.jsonl"},
    "output": {"folder": "out"},
}


def parse(tmp_path: Path, **sections: dict) -> Config:
    values = {name: WHOLE.get(name, {}) | sections.get(name, {}) for name in WHOLE | sections}
    return configs.parse(values, source="job.toml", folder=tmp_path)


@pytest.mark.parametrize("path", sorted(EXAMPLE.parent.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_example_reads_as_it_will_after_its_flags(path):
    config = configs.read(path)
    assert configs.check(config) == config


def test_the_example_names_files_that_are_there():
    config = configs.read(EXAMPLE)
    assert config.model.name == "sentence-transformers/all-MiniLM-L6-v2"
    assert (config.adapter.rank, config.adapter.alpha) == (8, 16.0)
    for path in (config.data.train, config.data.validation, config.data.test, config.data.answers):
        assert path.is_file()


def test_paths_are_relative_to_the_file_and_names_on_the_hub_are_left_alone(tmp_path):
    (tmp_path / "base").mkdir()
    config = parse(tmp_path)
    assert config.data.train == tmp_path / "a.jsonl"
    assert str(parse(tmp_path, data={"train": "hub:owner/set"}).data.train) == "hub:owner/set"
    assert config.model.name == "some/model"
    assert parse(tmp_path, model={"name": "base"}).model.name == str(tmp_path / "base")
    assert parse(tmp_path, model={"name": "../x"}).model.name == str(tmp_path.parent / "x")


def test_every_wrong_entry_is_listed_at_once_with_the_nearest_known_one(tmp_path):
    with pytest.raises(ValueError) as caught:
        parse(
            tmp_path,
            model={"name": " ", "poolin": "mean"},
            data={"max_length": "64", "questions": ["a", 1]},
            adapter={"rnak": 8, "alpha": -1, "dropout": 1.0, "rslora": 1, "rank": True, "ranks": {"a": 1.5}},
            optimization={"epochs": 3},
            optimisation={"epochs": 0, "schedule": "cosin", "learning_rate": float("nan")},
            run={"patience": 0, "mesh": ""},
            output={"folder": 3},
        )
    assert str(caught.value) == (
        "config: 17 entries of job.toml can't be used.\n"
        "  optimization is unknown  nearest: optimisation\n"
        "  model.poolin is unknown  nearest: model.pooling\n"
        "  model.name = ' '  expected: a string\n"
        "  data.max_length = '64'  expected: a whole number from 3\n"
        "  data.questions = ['a', 1]  expected: a list of strings\n"
        "  output.folder = 3  expected: a path\n"
        "  adapter.rnak is unknown  nearest: adapter.rank\n"
        "  adapter.rank = True  expected: a whole number from 1\n"
        "  adapter.alpha = -1  expected: a number above 0\n"
        "  adapter.ranks = {'a': 1.5}  expected: a table of whole numbers\n"
        "  adapter.dropout = 1.0  expected: a number from 0 to 0.9\n"
        "  adapter.rslora = 1  expected: true or false\n"
        "  optimisation.learning_rate = nan  expected: a number above 0\n"
        '  optimisation.schedule = \'cosin\'  expected: one of "linear", "cosine", "constant"\n'
        "  optimisation.epochs = 0  expected: a whole number from 1\n"
        "  run.patience = 0  expected: a whole number from 1\n"
        "  run.mesh = ''  expected: a string\n"
        "Fix: correct them; `jlora train --help` lists every key."
    )


def test_values_that_exclude_each_other_are_refused(tmp_path):
    balanced = {"class_weights": "balanced"}
    assert parse(tmp_path, optimisation=balanced).optimisation.class_weights == "balanced"
    with pytest.raises(ValueError, match=r"optimisation\.class_weights  expected: no class weights for task causal_lm"):
        parse(tmp_path, data={"task": "causal_lm"}, optimisation=balanced)


def test_validation_may_be_false_in_the_file_and_on_the_command_line(tmp_path):
    for value in (False, "false", "False"):
        config = parse(tmp_path, data={"validation": value})
        assert config.data.validation is False
        (tmp_path / "job.toml").write_text(configs.to_toml(config))
        assert configs.read(tmp_path / "job.toml") == configs.check(config) == config
    with pytest.raises(ValueError, match=r"data\.validation = True  expected: a path or false\n"):
        parse(tmp_path, data={"validation": True})
    with pytest.raises(ValueError, match=r"data\.validation = 0  expected: a path or false\n"):
        parse(tmp_path, data={"validation": 0})
    with pytest.raises(ValueError) as caught:
        parse(tmp_path, data={"validation": False}, run={"patience": 2, "evaluate_every": 5})
    reason = "expected: left out, since data.validation = false leaves nothing to evaluate"
    assert str(caught.value).splitlines()[1:-1] == [
        f"  run.patience = 2  {reason}",
        f"  run.evaluate_every = 5  {reason}",
    ]


def test_missing_entries_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"data\.train is missing  expected: a path\n  output\.folder is missing"):
        configs.parse({"model": {"name": "m"}, "data": {"validation": "b"}}, source="x", folder=tmp_path)
    with pytest.raises(ValueError, match=r"data = 3  expected: a section \[data\]"):
        configs.parse(WHOLE | {"data": 3}, source="x", folder=tmp_path)


def test_a_file_that_is_no_toml_or_not_there_is_an_error_that_says_so(tmp_path):
    (tmp_path / "job.toml").write_text("[model]\nname = oops\n")
    with pytest.raises(ValueError, match=r"job\.toml is no TOML\.\n  Invalid value \(at line 2"):
        configs.read(tmp_path / "job.toml")
    (tmp_path / "job.toml").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is no TOML"):
        configs.read(tmp_path / "job.toml")
    with pytest.raises(FileNotFoundError, match=r"gone\.toml does not exist\.\nFix: pass the path"):
        configs.read(tmp_path / "gone.toml")


def test_values_of_flags_are_checked_as_those_of_the_file_are():
    config = configs.read(EXAMPLE)
    wrong = dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, rank=0))
    with pytest.raises(
        ValueError, match=r"of the command line can't be used\.\n  adapter\.rank = 0  expected: a whole"
    ):
        configs.check(wrong)


def entries(value: str) -> dict:
    """A job with one text in every place that takes any."""
    return {
        "model": {"name": value},
        "data": {"train": "/train", "test": value, "text": value, "questions": [value]},
        "adapter": {"ranks": {value: 3}},
        "output": {"folder": value},
    }


@settings(max_examples=200)
@given(st.text(st.characters(exclude_characters="\0") | st.sampled_from("\ud800\udcff"), min_size=1))
@example("\r\n\t\x01\x7f\"'\\#")
@example("a\udcff")
def test_any_text_reads_back_from_the_toml_that_was_written_or_is_refused_by_name(value):
    try:
        config = configs.parse(entries(value), source="the test", folder=Path("/"))
    except ValueError as error:
        assert not value.strip() or re.search("[\ud800-\udfff]", value)
        assert "output.folder" in str(error)
        assert "model.name" in str(error)
        return
    assert tomllib.loads(configs.to_toml(config).encode().decode())["data"]["text"] == value
    assert configs.parse(tomllib.loads(configs.to_toml(config)), source="again", folder=Path("/")) == config


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
positive = st.floats(1e-8, 1e8)


@settings(max_examples=50)
@given(
    question=st.lists(text, max_size=3),
    alpha=st.none() | positive,
    rate=positive,
    targets=st.none() | text | st.lists(text, min_size=1, max_size=2).map(tuple),
    ranks=st.dictionaries(text, st.integers(1, 99), max_size=2),
    rslora=st.booleans(),
    mesh=st.none() | text,
    seed=st.integers(0, 2**32 - 1),
)
def test_a_config_written_down_reads_back_as_it_was(
    question, alpha, rate, targets, ranks, rslora, mesh, seed, tmp_path_factory
):
    config = Config(
        model=Model(name="some/model"),
        data=Data(train=Path("/a"), validation=Path("/b c"), test=Path('/d"'), questions=tuple(question)),
        adapter=Adapter(alpha=alpha, targets=targets, ranks=ranks, rslora=rslora),
        optimisation=Optimisation(learning_rate=rate, seed=seed),
        run=Run(mesh=mesh),
        output=Output(folder=Path("/out")),
    )
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(configs.to_toml(config), encoding="utf-8", newline="")
    assert configs.read(path) == config


def test_targets_are_a_regular_expression_or_a_list_of_names(tmp_path):
    for written, read in ((".*/query/kernel", ".*/query/kernel"), (["query", "value"], ("query", "value"))):
        config = parse(tmp_path, adapter={"targets": written})
        assert config.adapter.targets == read and configs.check(config) == config
    with pytest.raises(ValueError, match=r"adapter\.targets = 3  expected: a list of strings or a string"):
        parse(tmp_path, adapter={"targets": 3})


def test_targets_on_the_command_line_win_over_those_of_the_file(tmp_path):
    job = tmp_path / "job.toml"
    job.write_text(EXAMPLE.read_text().replace("[adapter]", '[adapter]\ntargets = ["query", "value"]'))
    for flags, expected in (
        ([], ("query", "value")),
        (["--adapter.targets", "key", "value"], ("key", "value")),
        (["--adapter.targets", ".*/key/kernel"], ".*/key/kernel"),
    ):
        config = configs.check(main.parse(["train", str(job), *flags]).settings)
        assert config.adapter.targets == expected
