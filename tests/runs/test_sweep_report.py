"""`jlora sweep`: a job at many ranks, each as `jlora train` would do it, and a page that a browser shows."""

import html.parser
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny_job
from rich.console import Console

from jlora.cli.main import main
from jlora.cli.sweep import progress
from jlora.runs import folder as runs
from jlora.runs.curves import rising
from jlora.runs.recommend import Trial, recommend
from jlora.runs.sweep import Judged, Member, Progressed
from jlora.runs.sweep_job import name_of
from jlora.runs.sweep_report import page
from jlora.tree.paths import flatten

quick = tiny_job.quick
GRID = ("--ranks", "2,64", "--seeds", "0,3", "--lr", "0.02")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
BROWSER = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--virtual-time-budget=2000"),
)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    return tiny_job.make_job(folder / "job", tiny_job.make_model(folder / "model"))


@pytest.fixture(scope="module")
def swept(job):
    assert main(["sweep", str(job), *GRID]) == 0
    return job.parent / "run-sweep"


@pytest.mark.parametrize("member", ["rank-2_lr-0.02_seed-0", "rank-64_lr-0.02_seed-3"])
def test_a_members_folder_is_what_training_its_job_alone_gives(member, swept, tmp_path):
    folder = swept / "members" / member
    # The kernels of this model are 32 wide: those of rank 64 have the highest rank they have room for.
    assert main(["train", str(folder / "config.toml"), "--output.folder", str(tmp_path / "alone")]) == 0
    own, alone = runs.load_run(folder), runs.load_run(tmp_path / "alone")
    found, expected = flatten(own.params), flatten(alone.params)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert found[path].shape == leaf.shape
        np.testing.assert_allclose(found[path], leaf, rtol=0, atol=1e-4)
    numbers = json.loads((swept / "sweep.json").read_text())
    (told,) = [m for m in numbers["members"] if f"rank-{m['rank']}_lr-{m['learning_rate']}_seed-{m['seed']}" == member]
    result = json.loads((tmp_path / "alone" / "result.json").read_text())
    assert (told["best_accuracy"], told["best_step"]) == (result["best"]["accuracy"], result["best_step"])
    assert told["trainable"] == result["trainable"]
    events = tiny_job.lines(tmp_path / "alone")
    mine, theirs = told["evaluations"], [event for event in events if event["event"] == "evaluation"]
    np.testing.assert_allclose([e["loss"] for e in mine], [e["loss"] for e in theirs], atol=1e-5)


@pytest.mark.parametrize("task", ["token_classification", "causal_lm"])
def test_other_tasks_long_and_short_rows_and_kernels_with_a_rank_of_their_own_are_swept_as_trained(task, tmp_path):
    tags = task == "token_classification"
    make, table = (tiny_job.make_model, "word_embeddings") if tags else (tiny_job.make_llama, "embed_tokens")
    toml = tiny_job.make_other_job(tmp_path / "job", make(tmp_path / "model"), task)
    tiny_job.change(toml, "rank = 4\n", f'rank = 4\nranks = {{ ".*{table}/embedding" = 2 }}\n')
    tiny_job.change(toml, "max_length = 32\n", "max_length = 32\npack = false\n")
    records = [json.loads(line) for line in (toml.parent / "train.jsonl").read_text().splitlines()]
    # Some of the rows are longer than the others: the seeds meet them at other steps.
    longer = lambda value: (value + " " if isinstance(value, str) else value) * 20
    long = [{name: longer(value) for name, value in record.items()} for record in records[::4]]
    tiny_job.write_lines(toml.parent / "train.jsonl", records + long)
    flags = ["--optimisation.steps", "6", "--run.evaluate-every", "3"]
    assert main(["sweep", str(toml), "--ranks", "2,64", "--seeds", "0,3", *flags]) == 0
    numbers = json.loads((tmp_path / "job" / "run-sweep" / "sweep.json").read_text())
    assert numbers["capped"] and not any(table in path for path in numbers["capped"])
    folder = tmp_path / "job" / "run-sweep" / "members" / "rank-2_lr-0.02_seed-3"
    assert main(["train", str(folder / "config.toml"), "--output.folder", str(tmp_path / "alone")]) == 0
    found, expected = (flatten(runs.load_run(place).params) for place in (folder, tmp_path / "alone"))
    assert found.keys() == expected.keys() and any(table in path and path.endswith("_lora_a") for path in found)
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, rtol=0, atol=1e-4)


def test_the_winner_answers_like_any_run(swept, capsys):
    chosen = json.loads((swept / "sweep.json").read_text())["recommendation"]
    members = sorted((swept / "members").glob(f"rank-{chosen['rank']}_*"))
    capsys.readouterr()
    assert main(["predict", str(members[0]), "where is my courier"]) == 0
    assert "delivery" in capsys.readouterr().out


def test_a_members_folder_is_a_run_for_every_command_and_its_files_have_digests(swept, job, tmp_path, capsys):
    member = shutil.copytree(swept / "members" / "rank-2_lr-0.02_seed-0", tmp_path / "member")
    test = ["--data", str(job.parent / "test.jsonl"), "--json"]
    for argv in (
        ["inspect", str(member), "--model", str(job.parent.parent / "model")],
        ["merge", str(member), "--out", str(tmp_path / "merged")],
        ["export", str(member), "--out", str(tmp_path / "peft")],
    ):
        assert main(argv) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(["eval", str(member), *test]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert main(["eval", str(tmp_path / "merged"), "--config", str(job), *test]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.pop("data") == expected.pop("data") and found == pytest.approx(expected, rel=1e-4)
    files = ["config.toml", "labels.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]
    for name in [*files, "adapter/adapter.json"]:
        whole = (member / name).read_bytes()
        (member / name).write_bytes(whole[:20] + bytes([whole[20] ^ 1]) + whole[21:])
        assert main(["predict", str(member), "where is my courier"]) == 2, name
        message = capsys.readouterr().err
        assert Path(name).name in message and "\nFix: " in message and "Traceback" not in message
        (member / name).write_bytes(whole)
    assert main(["predict", str(member), "where is my courier"]) == 0


class Reader(html.parser.HTMLParser):
    """What a page would load from elsewhere, its text, and its tables' cells."""

    def __init__(self, text: str):
        super().__init__()
        self.outside: list[str] = []
        self.cells: list[str] = []
        self.open = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.open = tag
        self.outside += [f"{name}={value}" for name, value in attrs if name in ("src", "action", "data") and value]
        self.outside += [value for name, value in attrs if name == "href" and tag == "link"]

    def handle_data(self, data):
        if self.open == "td" and data.strip():
            self.cells.append(data.strip())


def test_the_page_holds_the_evidence_and_needs_nothing_beside_it(swept):
    text, numbers = (swept / "report.html").read_text(), json.loads((swept / "sweep.json").read_text())
    found = Reader(text)
    assert found.outside == [] and "@import" not in text and "url(http" not in text
    for member in numbers["members"]:
        assert f"{member['trainable']:,}" in found.cells and f"{member['best_accuracy']:.4f}" in found.cells
    inside = re.search(r'<script type="application/json" id="numbers">(.*?)</script>', text, re.DOTALL)
    assert json.loads(inside[1]) == numbers
    assert numbers["capped"] and all(path in text for path in numbers["capped"])
    assert (swept / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
def test_a_browser_shows_the_page(swept, tmp_path):
    command = [CHROMIUM, *BROWSER, f"--user-data-dir={tmp_path / 'profile'}"]
    address = (swept / "report.html").as_uri()
    done = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((swept / "sweep.json").read_text())
    advice = numbers["recommendation"]
    assert f"<p>Rank {advice['rank']}, learning rate 0.02</p>" in done.stdout
    assert all(reason in done.stdout for reason in advice["reasons"])
    assert done.stdout.count("<svg") == 1 and done.stdout.count('<tr class="chosen">') == 1
    shot = tmp_path / "page.png"
    subprocess.run([*command, f"--screenshot={shot}", address], capture_output=True, check=True, timeout=120)
    from matplotlib.image import imread

    shown = imread(shot)
    # The verdict's bar, and a curve's colour.
    assert len(np.unique(shown.reshape(-1, shown.shape[-1]), axis=0)) > 100


def test_rates_that_differ_have_folders_that_do():
    assert name_of(Member(4, 0.00123456781, 0)) != name_of(Member(4, 0.00123456782, 0))
    assert name_of(Member(4, 1e-3, 0)) == "rank-4_lr-0.001_seed-0"


def test_the_bar_shows_the_best_of_every_rank_over_its_seeds():
    for metric, shown in (("accuracy", "4: 0.900"), ("loss", "4: 0.500")):
        console = Console(force_terminal=True, width=160, file=io.StringIO())
        with progress(console, metric) as show:
            for seed, value in enumerate((0.9, 0.5, 0.7)):
                show(Judged(Member(4, 1e-3, seed), 5, {metric: value}, True, None))
            show(Progressed(5, 10, (1, 1), {}, 1.0))
        assert shown in console.file.getvalue()


def test_what_a_page_is_given_can_not_end_its_script(swept):
    numbers = json.loads((swept / "sweep.json").read_text())
    text = page(numbers | {"metric": "accuracy", "note": "</script><b>"}, "<i>title</i>", "<svg></svg>")
    assert "</script><b>" not in text and "<i>title</i>" not in text


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ("--ranks", "4,x,"),
            r"--ranks '4,x,' has 2 values .*\n  'x'  expected: a whole number\n  ''  .*\nFix: .*4,8,16",
        ),
        (("--ranks", "0,4"), r"--ranks '0,4' has 1 value .*\n  '0'  expected: a whole number from 1\nFix:"),
        (("--metric", "f1"), r"no such metric.\n  'f1'  there are: loss, accuracy"),
        (("--memory", "20kB", "--ranks", "4"), r"a step of one member takes(.|\n)*Fix:"),
        (("--run.mesh", "data=1"), r"a sweep runs on one device"),
        (("--data.validation", "nowhere.jsonl"), r"nowhere.jsonl"),
    ],
)
def test_mistakes_are_told_before_training(flags, words, job, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", str(job), *flags, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert re.search(words, said) and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_an_empty_validation_file_is_an_error(job, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    flags = ["--data.validation", str(tmp_path / "empty.jsonl"), "--out", str(tmp_path / "out")]
    assert main(["sweep", str(job), *flags]) == 2
    assert "empty.jsonl" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_sweep_is_not_written_over_unless_asked(swept, job, tmp_path, capsys):
    assert main(["sweep", str(job), *GRID]) == 2
    assert "is not empty" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["sweep", str(job), *GRID, "--out", str(tmp_path), "--overwrite"]) == 2
    assert (tmp_path / "mine.txt").exists() and "mine.txt" in capsys.readouterr().err


# The recommendation.


def trial(rank, value, seed=0, rate=1e-3, losses=(), validation=()):
    return Trial(rank, rate, seed, value, losses, validation)


def test_the_smallest_rank_within_one_standard_error_of_the_best_is_recommended():
    values = {4: (0.80, 0.82), 8: (0.90, 0.91), 16: (0.915, 0.905), 32: (0.92, 0.90)}
    trials = [trial(rank, value, seed) for rank, pair in values.items() for seed, value in enumerate(pair)]
    found = recommend(trials, metric="accuracy", maximize=True)
    # 16 and 32 are the best, with means of 0.91; the smaller one's standard error is 0.01 / sqrt(2) / sqrt(2).
    assert found.tolerance == pytest.approx(0.005) and found.rank == 8
    assert [grade.mean for grade in found.grades] == pytest.approx([0.81, 0.905, 0.91, 0.91])
    assert "Rank 4 is too small: its accuracy is 0.095 worse." in found.reasons


def test_less_is_better_where_it_is_a_loss_and_a_tolerance_may_be_given():
    trials = [trial(4, 1.30), trial(8, 1.02), trial(16, 1.00)]
    assert recommend(trials, metric="loss", maximize=False).rank == 16
    assert recommend(trials, metric="loss", maximize=False, tolerance=0.03).rank == 8
    shares = [trial(4, 0.90), trial(8, 0.92)]
    assert recommend(shares, metric="accuracy", maximize=True, tolerance=0.02).rank == 4
    assert recommend(shares, metric="accuracy", maximize=True, tolerance=0.0199).rank == 8
    assert recommend(trials, metric="loss", maximize=False, noise=lambda value: 0.5 * value).rank == 4


def test_each_rank_is_judged_at_the_rate_that_suits_it_and_one_that_diverged_at_a_rate_not_by_it():
    trials = [trial(4, 0.7, rate=1e-3), trial(4, 0.9, rate=1e-2), trial(8, 0.8, rate=1e-3), trial(8, None, rate=1e-2)]
    found = recommend(trials, metric="accuracy", maximize=True)
    assert (found.rank, found.learning_rate) == (4, 1e-2)
    assert [grade.learning_rate for grade in found.grades] == [1e-2, 1e-3]
    assert "Diverged, and left out with all seeds of its rank and rate: rank 8 at 0.01, seed 0." in found.reasons
    with pytest.raises(ValueError, match=r"every member diverged(.|\n)*Fix:"):
        recommend([trial(4, None)], metric="accuracy", maximize=True)


def test_signs_of_too_small_and_too_large_a_rank_are_told():
    flat, falling = [2.0] * 40, list(np.linspace(2, 0.1, 40))
    early, steady = [1.0, 0.5, 0.7, 0.9], [1.0, 0.8, 0.6, 0.5]
    trials = [trial(4, 0.5, losses=flat, validation=steady), trial(8, 0.9, losses=falling, validation=steady)]
    trials += [trial(64, 0.9, losses=falling, validation=early)]
    found = recommend(trials, metric="accuracy", maximize=True)
    assert found.rank == 8
    assert "Rank 4 is too small: its accuracy is 0.4 worse; its training loss stalled at 2.000." in found.reasons
    assert "Rank 64 is too large for these data: its validation loss rose early." in found.reasons


def test_a_loss_that_ends_as_no_number_rose_and_one_that_stays_below_zero_did_not():
    assert rising([1.0, 0.5, 0.6, float("nan")]) is not None
    assert rising([float("nan"), 0.5, 0.51]) is None
    assert rising([-2.0, -2.0, -1.9, -2.0]) is None and rising([-2.0, -1.9, -1.5, -1.0]) is not None
