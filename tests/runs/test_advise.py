"""A rank to begin with: the three cases, the bands, and what a model and a memory have room for."""

import json
from pathlib import Path

import pytest
import tiny_job
from llama_configs import TINY, write

from jlora.cli.main import main
from jlora.runs.advise import BANDS, KINDS, advise
from jlora.runs.plan import plan

SIZES = (1, 50, 99, 260, 936, 4_999, 5_432, 20_000, 60_000, 1_000_000)
EXAMPLES = Path(__file__).parents[2] / "examples"
quick = tiny_job.quick


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write(tmp_path_factory.mktemp("tiny") / "model", TINY)


@pytest.mark.parametrize(
    "task, examples, rank",
    [
        ("instruction", 260, 8),  # a Llama on a desk's questions and answers
        ("token_classification", 5_432, 32),  # a BERT on diseases in abstracts
        ("causal_lm", 154, 16),  # a GPT-2 on a poet's sonnets
    ],
)
def test_the_three_cases_begin_where_their_examples_do(task, examples, rank):
    found = advise(task, examples=examples)
    assert found.rank == rank and found.alpha == 2 * rank and found.low <= rank <= found.high
    names = {"instruction": "llama_faq", "token_classification": "bert_ner", "causal_lm": "gpt2_poetry"}
    assert f"rank = {rank}\n" in (EXAMPLES / f"{names[task]}.toml").read_text()


@pytest.mark.parametrize("difficulty, low, high", [("simple", 4, 16), ("medium", 16, 64), ("complex", 64, 256)])
@pytest.mark.parametrize("task", KINDS)
def test_ranks_stay_in_the_band_and_grow_with_the_examples(task, difficulty, low, high):
    found = [advise(task, examples=examples, difficulty=difficulty) for examples in SIZES]
    assert all((advice.low, advice.high) == (low, high) for advice in found)
    ranks = [advice.rank for advice in found]
    assert ranks == sorted(ranks) and (ranks[0], ranks[-1]) == (low, high)
    assert set(ranks) <= set(BANDS[difficulty].ranks)
    assert f"A {difficulty} task (as you say)" in str(found[0])


def test_few_examples_call_for_dropout_and_many_do_not():
    assert advise("instruction", examples=260).dropout > 0 == advise("instruction", examples=20_000).dropout


def test_no_rank_is_advised_that_a_kernel_has_no_room_for(tiny):
    # Keys and values are 16 x 8.
    found = advise("causal_lm", examples=154, model=tiny)
    assert (found.low, found.rank, found.high) == (8, 8, 8)
    assert "The smallest kernel has room for rank 8" in str(found)
    # Those of the feed-forward layers are larger.
    assert advise("causal_lm", examples=154, model=tiny, targets=".*(gate|up|down)_proj/kernel").rank == 16
    assert advise("causal_lm", examples=154, model=tiny, targets=["gate_proj", "up_proj", "down_proj"]).rank == 16
    assert advise("causal_lm", examples=154, model=tiny, targets=["gate_proj", "k_proj"]).rank == 8
    for targets in ("nothing", ["gate_proj", "nothing"]):
        with pytest.raises(ValueError, match="matched no kernel"):
            advise("causal_lm", examples=154, model=tiny, targets=targets)


def test_memory_lowers_the_rank_to_one_whose_step_the_plan_finds_to_fit(tiny):
    rest = {"sequence": 16, "remat": True}
    room = plan(tiny, rank=4, task="causal_lm", **rest).total_bytes
    tight = advise("causal_lm", examples=154, model=tiny, memory=room, **rest)
    assert (tight.rank, tight.high, tight.step_bytes) == (4, 4, room)
    assert "no step above rank 4 fits" in str(tight)
    with pytest.raises(
        ValueError, match=r"advise: no step fits in 0.00 MB, not even at rank 1.\n  the least(.|\n)*Fix:"
    ):
        advise("causal_lm", examples=154, model=tiny, memory=1_000, **rest)


def test_what_can_not_be_advised_on_is_one_error():
    with pytest.raises(ValueError) as error:
        advise("token_clasification", examples=0, difficulty="hard", memory="24GB", targets=".*", batch_size=4)
    for words in ("nearest: token_classification", "examples = 0", "difficulty = 'hard'", "memory = '24GB'", "Fix:"):
        assert words in str(error.value)
    assert "targets = '.*'  is of no use without a model" in str(error.value)
    with pytest.raises(ValueError, match="batch_size = 4  is of no use without memory"):
        advise("causal_lm", examples=154, model="somewhere", batch_size=4)


def test_the_command_says_the_same_and_reads_a_job(tiny, tmp_path, capsys):
    assert main(["advise", "--task", "token_classification", "--examples", "5432"]) == 0
    assert capsys.readouterr().out.strip() == str(advise("token_classification", examples=5432))
    (tmp_path / "texts.txt").write_text("\n\n".join(f"a poem of the number {n}" for n in range(20)))
    job = f'[model]\nname = "{tiny}"\n[data]\ntask = "causal_lm"\ntrain = "texts.txt"\nmax_length = 32\n'
    (tmp_path / "job.toml").write_text(job + '[optimisation]\nbatch_size = 2\n[output]\nfolder = "run"\n')
    assert main(["advise", "--config", str(tmp_path / "job.toml"), "--memory", "1GB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    step = plan(tiny, rank=8, batch_size=2, sequence=32, scan=False)
    assert found["rank"] == 8 and found["step_bytes"] == step.total_bytes
    assert any("18 examples" in reason for reason in found["reasons"])
    names = '["gate_proj", "up_proj"]'
    (tmp_path / "named.toml").write_text((tmp_path / "job.toml").read_text() + f"[adapter]\ntargets = {names}\n")
    assert main(["advise", "--config", str(tmp_path / "named.toml"), "--memory", "1GB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    step = plan(tiny, rank=16, batch_size=2, sequence=32, scan=False, targets=("gate_proj", "up_proj"))
    assert found["rank"] == 16 and found["step_bytes"] == step.total_bytes
    assert main(["advise", "--task", "causal_lm"]) == 2
    assert "too little is known.\n  --examples\nFix:" in capsys.readouterr().err
