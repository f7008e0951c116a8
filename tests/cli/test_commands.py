"""Every command: what the documents say of it runs, and what it writes is what torch reads."""

import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_job
from safetensors.numpy import load_file, save_file

from jlora.cli import main as commands
from jlora.cli.main import main
from jlora.hf.load import load_model, save_model
from jlora.runs import folder as runs
from jlora.tree.paths import flatten

torch = pytest.importorskip("torch", reason="no torch, the oracle")
peft = pytest.importorskip("peft", reason="no peft, the oracle")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
COMMANDS = {
    name.lower(): kind
    for name, kind in vars(commands).items()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and hasattr(kind, "run")
}
LINE = re.compile(rf"jlora (?:{'|'.join(COMMANDS)}) (?!\.|--help)[^`\n|]+")
quick = tiny_job.quick
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
    pytest.mark.filterwarnings("ignore:Model (has|with) .tie_word_embeddings"),
]


def documented() -> list[str]:
    """Every command line of the documents, its options and its dots left out."""
    examples = ROOT / "examples"
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(examples.rglob("README.md"))]
    files = [*pages, *sorted(examples.glob("*.toml"))]
    found = {}
    for file in files:
        for line in LINE.findall(file.read_text()):
            line = re.sub(r"\[.*?\]|\.\.\.|  #.*", "", line).strip()
            found.setdefault(line)
    return list(found)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"bert": tiny_job.make_model(folder / "bert"), "llama": tiny_job.make_llama(folder / "llama")}


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory):
    """A run of every kind, its best adapter not its last."""
    folder, found = tmp_path_factory.mktemp("trained"), {}
    for task, model in (("causal_lm", "llama"), ("token_classification", "bert")):
        toml = tiny_job.make_other_job(folder / task, models[model], task)
        assert main(["train", str(toml), "--optimisation.epochs", "3", "--adapter.alpha", "12"]) == 0
        found[task] = folder / task / "run"
    return found


def tokens(run: runs.Run) -> np.ndarray:
    words = run.task.loaded.tokenizer(["where is my courier"])["input_ids"]
    return np.array(words)


def torch_logits(model, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.from_numpy(ids)).logits.float().numpy()


CLASSES = {"causal_lm": "AutoModelForCausalLM", "token_classification": "AutoModelForTokenClassification"}


@pytest.mark.parametrize("task", CLASSES)
def test_what_merge_and_export_write_has_the_runs_logits_in_torch(task, trained, models, tmp_path):
    run = runs.load_run(trained[task])
    ids, auto = tokens(run), getattr(transformers, CLASSES[task])
    with jax.default_matmul_precision("highest"):
        wanted = np.asarray(jax.jit(_logits(run))(run.params, ids))
    base = np.asarray(jax.jit(_logits(run))(run.task.loaded.params, ids))
    assert abs(wanted - base).max() > 0.1
    assert main(["merge", str(trained[task]), "--out", str(tmp_path / "merged")]) == 0
    merged = torch_logits(auto.from_pretrained(tmp_path / "merged"), ids)
    np.testing.assert_allclose(merged, wanted, atol=2e-5)
    options = {} if task == "causal_lm" else {"num_labels": len(run.task.labels)}
    for form in ("peft", "vllm") if task == "causal_lm" else ("peft",):
        assert main(["export", str(trained[task]), "--out", str(tmp_path / form), "--format", form]) == 0
        loaded = auto.from_pretrained(run.config.model.name, **options)
        exported = torch_logits(peft.PeftModel.from_pretrained(loaded, tmp_path / form), ids)
        np.testing.assert_allclose(exported, wanted, atol=2e-5)


def _logits(run: runs.Run):
    from jlora import adapt

    return adapt(lambda params, ids: run.task.loaded.model.apply({"params": params}, ids))


def test_eval_is_torchs_mean_loss_and_on_validation_the_best_evaluations(trained, tmp_path, capsys):
    run = trained["causal_lm"]
    data = run.parent / "validation.jsonl"
    capsys.readouterr()
    assert main(["eval", str(run), "--data", str(data), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    result = json.loads((run / "result.json").read_text())
    assert found["loss"] == pytest.approx(result["best"]["loss"], abs=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"]))
    assert main(["merge", str(run), "--out", str(tmp_path / "merged")]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    total, count = 0.0, 0
    for line in data.read_text().splitlines():
        ids = np.array([[*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]])
        logits = torch.from_numpy(torch_logits(model, ids))
        losses = torch.nn.functional.cross_entropy(logits[0, :-1], torch.from_numpy(ids[0, 1:]), reduction="sum")
        total, count = total + float(losses), count + ids.shape[1] - 1
    assert found["loss"] == pytest.approx(total / count, abs=1e-4)
    assert found["records"] == len(data.read_text().splitlines())


@pytest.mark.parametrize("task", CLASSES)
def test_eval_of_a_merged_folder_is_that_of_its_run(task, trained, tmp_path, capsys):
    run, merged = trained[task], tmp_path / "merged"
    data = str(run.parent / "validation.jsonl")
    assert main(["merge", str(run), "--out", str(merged)]) == 0
    capsys.readouterr()
    assert main(["eval", str(run), "--data", data, "--json"]) == 0
    wanted = json.loads(capsys.readouterr().out)
    assert main(["eval", str(merged), "--task", task, "--data", data, "--max-length", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.pop("data") == wanted.pop("data") and found == pytest.approx(wanted, rel=1e-4)
    for argv, words in (
        ([str(merged)], "--task is missing  expected: one of sequence_classification, "),
        ([str(merged), "--task", task], "--data is missing"),
        ([str(merged), "--task", task, "--data", data, "--max-length", "99"], "the model reads 64 tokens"),
        ([str(merged), "--task", task, "--data", data, "--model", "x"], "a merged model has none"),
        ([str(run), "--task", task, "--data", data], "leave these options out"),
    ):
        assert main(["eval", *argv]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\nFix: ") == 1


def test_eval_of_a_merged_text_classifier_reads_the_columns_that_a_job_names(models, tmp_path, capsys):
    toml = tiny_job.make_job(tmp_path / "job", models["bert"])
    for split in tiny_job.FRAMES:
        renamed = [{"query": record["text"], "intent": record["label"]} for record in tiny_job.questions(split)]
        tiny_job.write_lines(toml.parent / f"{split}.jsonl", renamed)
    tiny_job.change(toml, "[data]", '[data]\ntext = "query"\nlabel = "intent"')
    assert main(["train", str(toml), "--optimisation.epochs", "2"]) == 0
    run, merged = toml.parent / "run", tmp_path / "merged"
    assert main(["merge", str(run), "--out", str(merged)]) == 0
    capsys.readouterr()
    assert main(["eval", str(run), "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert expected.pop("data") == str(toml.parent / "test.jsonl") and 0 < expected["accuracy"] < 1
    test = ["--data", str(toml.parent / "test.jsonl")]
    for options in (["--config", str(toml)], ["--config", str(run / "config.toml"), *test]):
        assert main(["eval", str(merged), *options, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found.pop("data") == test[1] and found == pytest.approx(expected, rel=1e-4)
    # Columns of the default names need no config.
    plain = tiny_job.write_lines(tmp_path / "plain.jsonl", tiny_job.questions("test"))
    options = ["--task", "sequence_classification", "--data", str(plain), "--max-length", "32"]
    assert main(["eval", str(merged), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.pop("data") == str(plain) and found == pytest.approx(expected, rel=1e-4)
    for argv, words in (
        ([str(merged), "--task", "sequence_classification", *test], "columns: 'query', 'intent'"),
        ([str(merged), "--config", str(toml), *test, "--max-length", "99"], "the model reads 64 tokens"),
        ([str(merged), "--config", str(tmp_path)], "can't be read: Is a directory"),
        ([str(run), "--config", str(toml)], "leave these options out"),
    ):
        assert main(["eval", *argv]) == 2
        message = capsys.readouterr().err
        assert words in message and message.count("\nFix: ") == 1, message


def test_inspect_tells_of_every_kernel_what_float64_numpy_does(trained, models, capsys):
    folder = trained["causal_lm"]
    capsys.readouterr()
    assert main(["inspect", str(folder), "--model", str(models["llama"]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    leaves = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(runs.load_run(folder).params).items()}
    told = {target["path"]: target for target in found["targets"]}
    assert set(told) == {path.removesuffix("_lora_a") for path in leaves if path.endswith("_lora_a")}
    for path, target in told.items():
        a, b = leaves[path + "_lora_a"], leaves[path + "_lora_b"]
        norm = np.linalg.norm(leaves[path + "_lora_scaling"] * a @ b)
        assert target["norm"] == pytest.approx(norm, rel=1e-5)
        assert target["ratio"] == pytest.approx(norm / np.linalg.norm(leaves[path]), rel=1e-5)
        assert (target["rank"], target["alpha"], target["scaling"]) == (4, 12.0, 3.0)
        assert target["parameters"] == a.size + b.size
    assert found["base"] == str(models["llama"])
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert all(path in shown for path in told)


def test_inspect_draws_what_an_adapter_used_of_its_rank_and_says_it(trained, capsys):
    folder = trained["causal_lm"]
    capsys.readouterr()
    assert main(["inspect", str(folder), "--spectrum", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    leaves = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(runs.load_run(folder).params).items()}
    for target in found["targets"]:
        a, b, scaling = (leaves[target["path"] + affix] for affix in ("_lora_a", "_lora_b", "_lora_scaling"))
        values = np.linalg.svd(scaling * a @ b, compute_uv=False)[:4]
        shares, energy = values / values.sum(), np.cumsum(values**2) / np.sum(values**2)
        used = target["used"]
        np.testing.assert_allclose(used["singular_values"], values, rtol=1e-5)
        assert used["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
        assert [used["rank_90"], used["rank_99"]] == [1 + np.sum(energy < share) for share in (0.9, 0.99)]
    assert (folder / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    assert main(["inspect", str(folder), "--spectrum"]) == 0
    assert "effective rank" in capsys.readouterr().out
    assert main(["inspect", str(folder)]) == 0
    assert "effective rank" not in capsys.readouterr().out


def test_folders_may_be_given_by_relative_paths(trained, tmp_path, capsys, monkeypatch):
    run = trained["causal_lm"]
    monkeypatch.chdir(run.parent)
    for argv in (
        ["inspect", run.name],
        ["inspect", f"{run.name}/adapter", "--spectrum"],
        ["eval", run.name, "--data", "validation.jsonl"],
        ["merge", run.name, "--out", f"{tmp_path.name} 1/merged model"],
        ["generate", f"{tmp_path.name} 1/merged model", "where is", "--max-new-tokens", "2"],
        ["export", run.name, "--out", f"{tmp_path.name} 1/peft adapter"],
        ["inspect", f"{tmp_path.name} 1/peft adapter"],
        ["predict", run.name, "where is"],
    ):
        assert main(argv) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert [main(["inspect", str(folder), "--json"]) for folder in (run, run.name)] == [0, 0]
    absolute, relative = (
        json.loads(part) for part in re.split(r"(?<=^\})\n", capsys.readouterr().out.strip(), flags=re.M)
    )
    assert relative == absolute | {"folder": run.name}


@pytest.fixture(scope="module")
def tied(models, tmp_path_factory):
    """The Llama with its head tied to its table, and an adapter of PEFT for its table alone."""
    folder = tmp_path_factory.mktemp("tied")
    base = shutil.copytree(models["llama"], folder / "base")
    tensors = load_file(base / "model.safetensors")
    save_file({name: value for name, value in tensors.items() if name != "lm_head.weight"}, base / "model.safetensors")
    tiny_job.change(base / "config.json", '"tie_word_embeddings": false', '"tie_word_embeddings": true')
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return base, folder / "adapter", model


def test_a_tied_head_is_separated_where_an_adapter_of_peft_needs_it(tied, tmp_path, capsys):
    base, adapter, model = tied
    ids = np.array([[1, 6, 7, 8, 9]])
    expected = torch_logits(model, ids)
    for name, command in {
        "merge": ["merge", adapter, "--out", tmp_path / "merged"],
        "export": ["export", adapter, "--out", tmp_path / "exported"],
        "inspect": ["inspect", adapter, "--model", base],
        "generate": ["generate", base, "where is", "--adapter", adapter, "--max-new-tokens", "2"],
    }.items():
        assert main([*map(str, command)]) == 2
        assert "Fix: load the base with load_model(..., untie=True), or with --untie" in capsys.readouterr().err, name
        assert main([*map(str, command), "--untie"]) == 0, name
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.tie_word_embeddings is False
    np.testing.assert_allclose(torch_logits(merged, ids), expected, atol=2e-5)


def test_a_vocabulary_smaller_than_the_tokenizers_is_an_error_of_the_rows_that_need_it(models, tmp_path, capsys):
    whole = load_model(models["llama"])
    size = whole.config.vocab_size
    cut, base = load_model(models["llama"], vocab_size=size - 1), tmp_path / "base"
    save_model(base, cut.model, cut.params, cut.tokenizer)
    last = whole.tokenizer.convert_ids_to_tokens(size - 1)
    toml = tiny_job.make_other_job(tmp_path / "job", base, "causal_lm")
    train = ["train", str(toml), "--optimisation.epochs", "1"]
    # A token that no row holds does no harm, as the one that pads.
    assert main(train) == 0, capsys.readouterr().err
    run = str(tmp_path / "job" / "run")
    tiny_job.write_lines(tmp_path / "job" / "validation.jsonl", [{"text": f"where is {last}"}])
    for command, argv in {
        "train": [*train, "--output.overwrite"],
        "eval": ["eval", run, "--data", str(tmp_path / "job" / "validation.jsonl")],
    }.items():
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert f"{command}: the model has {size - 1} tokens, the tokenizer {size}, and the data needs" in error
        assert f"{last!r} (id {size - 1}) in 1 row\n" in error and f"Fix: set model.vocab_size = {size}" in error
    for argv in (["predict", run, last], ["generate", str(base), last]):
        assert main(argv) == 2
        assert f"prompt 0 has {size - 1}, the vocabulary 0 to {size - 2}" in capsys.readouterr().err
    assert main(["generate", str(base), last, "--vocab-size", str(size), "--max-new-tokens", "2"]) == 0
    grown = [*train, "--output.overwrite", "--model.vocab-size", str(size), "--model.untie"]
    assert main(grown) == 0, capsys.readouterr().err
    # The adapter alone records how its base is loaded.
    assert main(["merge", f"{run}/adapter", "--model", str(base), "--out", str(tmp_path / "merged")]) == 0
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.vocab_size == size


WRONG = ["", ".", "nowhere", "{file}", "{binary}", "/", "[x]", "~nobody/x", "-1", "nan", "1e999", "\u00e9", "\udcff"]


@pytest.mark.parametrize(
    "line",
    [
        "predict {x} text",
        "predict {run} --input {x}",
        "predict {run} text --top {x} --output {file}",
        "predict {run} text --temperature {x} --output {file}",
        "eval {x}",
        "eval {run} --data {x}",
        "eval {model} --task causal_lm --data {x}",
        "eval {model} --config {x}",
        "generate {x} text",
        "generate {model} text --adapter {x}",
        "generate {model} text --top-p {x} --merge",
        "inspect {x}",
        "inspect {run} --model {x}",
        "merge {x} --out {out}",
        "merge {run} --out {file} --model {x}",
        "export {x} --out {out}",
        "plan {x}",
        "plan {model} --sequence {x} --memory 1",
        "advise --config {x}",
        "train {x}",
        "sweep {config} --ranks {x} --metric none",
        "sweep {config} --seeds {x} --metric none",
    ],
)
def test_no_value_of_a_flag_ends_in_a_traceback(line, trained, models, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("hello")
    (tmp_path / "binary").write_bytes(b"\xff\x00\xfe")
    run = trained["causal_lm"]
    names = {"run": run, "model": models["llama"], "config": run.parent / "job.toml", "out": tmp_path / "out"}
    names |= {"file": tmp_path / "file", "binary": tmp_path / "binary"}
    for wrong in WRONG:
        value = wrong.format(**names)
        argv = [value if word == "{x}" else word.format(**names) for word in line.split()]
        capsys.readouterr()
        try:
            code, form = main(argv), "\nFix: "
        except SystemExit as ended:
            # The parser's own form, of a flag whose value has another type.
            code, form = ended.code, "rror"
        said = capsys.readouterr().err
        assert code == 2 and form in said and "Traceback" not in said, (argv, said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["binary", "file"]


def stand_ins(folder: Path, models: dict, trained: dict) -> dict[str, str]:
    """What the words of the documents stand for here."""
    return {
        "FOLDER": str(trained["causal_lm"]),
        "RUN": str(trained["causal_lm"]),
        "MODEL": str(models["llama"]),
        "FILE": str(trained["causal_lm"].parent / "validation.jsonl"),
        "OUT": str(folder / "out"),
        "CONFIG.toml": str(trained["causal_lm"].parent / "job.toml"),
        "SONNETS.txt": str(folder / "sonnets.txt"),
        "STORIES": str(models["llama"]),
    }


def small(argv: list[str], folder: Path, models: dict) -> list[str]:
    """A command line with its models made tiny, its steps few, and its files in a folder of the test's."""
    if argv[0] == "plan":
        argv += ["--sequence", "48"]
    if argv[0] in ("train", "sweep"):
        name = Path(argv[1]).stem
        model = models["llama" if name in ("llama_faq", "gpt2_poetry", "job") else "bert"]
        argv += ["--model.name", str(model), "--optimisation.steps", "2", "--run.evaluate-every", "2"]
        argv += ["--output.folder", str(folder / "runs" / name), "--output.overwrite", "--data.max-length", "48"]
        argv += ["--model.dtype", "float32"]
        argv += ["--model.pooling", "mean"] if name == "faq" else []
        if name == "bert_ner":
            for split, file in (("train", "train"), ("validation", "devel"), ("test", "test")):
                argv += [f"--data.{split}", str(folder / f"{file}.tsv")]
    return [str(folder / word) if word.startswith("runs/") else word for word in argv]


def write_data(folder: Path) -> None:
    for name, split in (("train", "train"), ("devel", "validation"), ("test", "test")):
        sentences = (
            "\n".join(map("\t".join, zip(r["tokens"], r["tags"], strict=True))) for r in tiny_job.tagged(split)
        )
        (folder / f"{name}.tsv").write_text("\n\n".join(sentences) + "\n")
    (folder / "sonnets.txt").write_text("\n\n".join(record["text"] for record in tiny_job.questions("train")))


def test_every_documented_command_line_runs(models, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = documented()
    assert {line.split()[1] for line in found} >= {"train", "predict", "generate"}
    write_data(tmp_path)
    words = stand_ins(tmp_path, models, trained)
    for n, line in enumerate(found):
        argv = [words.get(word, word) for word in shlex.split(line)[1:]]
        # No two write to one place.
        argv = [f"{word}{n}" if word == words["OUT"] else word for word in argv]
        assert main(small(argv, tmp_path, models)) == 0, f"{line}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_describes_every_flag_of_every_command(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    described = re.findall(r"^    +(\w+): (.*)$", COMMANDS[name].__doc__, re.M)
    assert described
    for field, words in described:
        if field != "settings":
            assert " ".join(words.split()[:4]) in shown, field
    flags = [item.name for item in dataclasses.fields(COMMANDS[name]) if item.name not in ("settings",)]
    assert {field for field, _ in described} >= set(flags)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["eval", "{empty}"], "holds no run"),
        (["eval", "{run}"], "was trained without a test file"),
        (["eval", "{run}", "--data", "gone.jsonl"], "no such file"),
        (["inspect", "{empty}"], "holds no adapter"),
        (["merge", "{empty}", "--out", "{out}"], "holds no adapter"),
        (["merge", "{run}", "--out", "{run}"], "is not empty"),
        (["export", "{run}", "--out", "{file}"], "is a file, not a folder"),
        (["export", "{run}", "--out", "{out}", "--model", "./nowhere"], "nowhere"),
        (["plan", "./nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_told_with_their_fix_and_exit_with_2(argv, words, trained, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    run = trained["causal_lm"]
    places = {"empty": tmp_path / "empty", "run": run, "out": tmp_path / "out", "file": run / "config.toml"}
    capsys.readouterr()
    assert main([word.format(**places) for word in argv]) == 2
    said = capsys.readouterr().err
    assert words in said and "\nFix: " in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()
