"""The first example's classifier, over pooled states: merged, exported and read back with the run's logits.

The oracle is torch with the modules that the folder names: transformers' body, the mean of its states over the mask,
and a linear layer.
"""

import json

import jax
import numpy as np
import pytest
import tiny_job
from safetensors.numpy import load_file

import jlora
from jlora.cli.main import main
from jlora.hf.load import load_model, save_model
from jlora.hf.peft import load_peft, save_peft
from jlora.runs import folder as runs
from jlora.runs.inspection import load_adapted
from jlora.tree.paths import flatten

torch = pytest.importorskip("torch", reason="torch is the oracle, and is not installed")
peft = pytest.importorskip("peft", reason="peft is the oracle, and is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is the oracle, and is not installed")

quick = tiny_job.quick
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")

TEXTS = ["where is my courier", "tell me about the refund please", "login"]


def make_bert(folder):
    """A random BERT with the pooler that MiniLM has too."""
    size = tiny_job.make_tokenizer(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=size, pad_token_id=0, **tiny_job.SIZES)
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1:
                value.normal_(std=0.2 if "word" in name else 0.02 if "embed" in name else 1.2 * value.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    """A run of the first example's form: a classifier over the mean of the states."""
    toml = tiny_job.make_job(tmp_path_factory.mktemp("job") / "job", model)
    assert main(["train", str(toml), "--optimisation.epochs", "3", "--adapter.alpha", "16"]) == 0
    return toml.parent / "run"


@pytest.fixture(scope="module")
def logits(trained):
    """The run's, of TEXTS padded to one length."""
    run = runs.load_run(trained)
    found = run_jax(run.task.loaded.model, run.params, run.task.loaded.tokenizer)
    base = run_jax(run.task.loaded.model, run.task.loaded.params, run.task.loaded.tokenizer)
    assert np.abs(found - base).max() > 0.1 and found.std() > 0.3
    return found


def run_jax(model, params, tokenizer):
    batch = tokenizer(TEXTS, padding=True, return_tensors="np")
    with jax.default_matmul_precision("highest"):
        forward = jax.jit(jlora.adapt(model.apply))
        return np.asarray(forward({"params": params}, batch["input_ids"], batch["attention_mask"]))


def run_torch(body, folder):
    """The logits of a folder by the modules that it names, over its body."""
    modules = json.loads((folder / "modules.json").read_text())
    assert [module["type"].rpartition(".")[2] for module in modules] == ["Transformer", "Pooling", "Dense"]
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Dense"]
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    modes = [name for name, value in pooling.items() if value is True]
    dense = json.loads((folder / "2_Dense" / "config.json").read_text())
    assert dense["activation_function"] == "torch.nn.modules.linear.Identity"
    tensors = load_file(folder / "2_Dense" / "model.safetensors")
    linear = torch.nn.Linear(dense["in_features"], dense["out_features"], bias=dense["bias"])
    linear.load_state_dict({name.removeprefix("linear."): torch.tensor(value) for name, value in tensors.items()})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = body.eval()(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].float()
        means = (states * mask).sum(1) / mask.sum(1)
        return linear({"pooling_mode_mean_tokens": means, "pooling_mode_cls_token": states[:, 0]}[modes[0]]).numpy()


def test_a_merged_run_has_its_logits_as_sentence_transformers_modules_and_here(trained, logits, tmp_path, capsys):
    assert main(["merge", str(trained), "--out", str(tmp_path / "out")]) == 0
    assert "its embeddings are the logits" in capsys.readouterr().out
    body = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert type(body).__name__ == "BertModel"
    np.testing.assert_allclose(run_torch(body, tmp_path / "out"), logits, atol=2e-5)

    loaded = load_model(tmp_path / "out")
    assert (loaded.model.head, loaded.model.pooling, loaded.new) == ("classification", "mean", ())
    assert list(loaded.config.id2label.values()) == list(runs.load_run(trained).task.labels)
    np.testing.assert_allclose(run_jax(loaded.model, loaded.params, loaded.tokenizer), logits, atol=1e-5)
    # Hidden states, and a head over another pooling, do not take the classifier.
    assert load_model(tmp_path / "out", head=None).model.head is None
    assert load_model(tmp_path / "out", pooling="cls", num_labels=3).new == ("classifier/bias", "classifier/kernel")


def test_sentence_transformers_itself_gives_the_logits(trained, logits, tmp_path):
    package = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    for command in ("merge", "export"):
        assert main([command, str(trained), "--out", str(tmp_path / command)]) == 0
    found = package.SentenceTransformer(str(tmp_path / "merge"), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(found, logits, atol=2e-5)
    runs.load_run(trained).task.loaded.tokenizer.save_pretrained(tmp_path / "export")
    found = package.SentenceTransformer(str(tmp_path / "export"), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(found, logits, atol=2e-5)


def test_an_exported_run_has_its_logits_in_peft_and_comes_back(trained, model, logits, tmp_path, capsys):
    assert main(["export", str(trained), "--out", str(tmp_path / "out")]) == 0
    assert "train with --model.pooling pooler" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("FEATURE_EXTRACTION", None)
    body = peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(model), tmp_path / "out")
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "out")
    np.testing.assert_allclose(run_torch(body, tmp_path / "out"), logits, atol=2e-5)

    adapted = load_adapted(tmp_path / "out")
    assert {path.split("/")[0] for path in adapted.train} == {"classifier"}
    np.testing.assert_allclose(
        run_jax(adapted.loaded.model, adapted.params, adapted.loaded.tokenizer), logits, atol=1e-5
    )
    # Merged and exported from there, it is the same again.
    assert main(["merge", str(tmp_path / "out"), "--out", str(tmp_path / "merged")]) == 0
    body = transformers.AutoModel.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(run_torch(body, tmp_path / "merged"), logits, atol=2e-5)


def test_inspect_takes_the_run_with_its_base(trained, model, tmp_path, capsys):
    capsys.readouterr()
    assert main(["inspect", str(trained), "--model", str(model), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {leaf["path"] for leaf in found["whole"]} == {"classifier/kernel", "classifier/bias"}
    assert all(target["ratio"] > 0 for target in found["targets"])
    # The exported folder holds the same parameters, its classifier in a file of sentence-transformers.
    assert main(["export", str(trained), "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    exported = json.loads(capsys.readouterr().out)
    assert {leaf["path"] for leaf in exported["whole"]} == {"classifier.weight", "classifier.bias"}
    assert exported["parameters"] == found["parameters"]


def test_the_pooler_is_pefts_own_form_and_is_named_where_another_has_none(trained, model, tmp_path, capsys):
    toml = tiny_job.make_job(tmp_path / "job", model)
    assert main(["train", str(toml), "--model.pooling", "pooler", "--optimisation.epochs", "1"]) == 0
    run = runs.load_run(toml.parent / "run")
    assert main(["export", str(toml.parent / "run"), "--out", str(tmp_path / "out")]) == 0
    base = transformers.AutoModelForSequenceClassification.from_pretrained(model, num_labels=3)
    opened = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    tokenizer = run.task.loaded.tokenizer
    with torch.no_grad():
        expected = opened(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits.numpy()
    np.testing.assert_allclose(run_jax(run.task.loaded.model, run.params, tokenizer), expected, atol=2e-5)

    # An adapter that was trained with the pooler is not put on a mean of states, and not made into one for vLLM.
    loaded = load_model(model, num_labels=3, pooling="mean")
    with pytest.raises(
        ValueError, match=r"reads the pooler, the model's pooling='mean'\nFix: .*model.pooling = \"pooler\""
    ):
        load_peft(tmp_path / "out", loaded.model, loaded.params)
    assert main(["export", str(trained), "--out", str(tmp_path / "vllm"), "--format", "vllm"]) == 2
    assert 'model.pooling = "pooler"' in capsys.readouterr().err
    assert not (tmp_path / "vllm").exists()


def test_a_sentence_transformers_base_takes_pefts_adapter_with_its_pooler(model, tmp_path):
    base = tmp_path / "base"
    plain = load_model(model, num_labels=3, pooling="mean")
    save_model(base, plain.model, plain.params, plain.tokenizer)
    body = transformers.AutoModel.from_pretrained(model)
    body.save_pretrained(base)  # with its pooler, as MiniLM's folder
    oracle = transformers.AutoModelForSequenceClassification.from_pretrained(model, num_labels=3)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], init_lora_weights=False)
    adapted = peft.get_peft_model(oracle, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    found = load_adapted(tmp_path / "adapter", str(base))
    assert found.loaded.model.pooling == "pooler"
    with torch.no_grad():
        expected = adapted(**plain.tokenizer(TEXTS, padding=True, return_tensors="pt")).logits.numpy()
    logits = run_jax(found.loaded.model, found.params, plain.tokenizer)
    np.testing.assert_allclose(logits, expected, atol=2e-5)


def test_a_classifier_with_an_adapter_is_exported_merged(model, tmp_path):
    loaded = load_model(model, num_labels=3, pooling="cls")
    params = jlora.wrap(loaded.params, rank=2, targets=["query", "classifier"])
    fill = lambda path, leaf: leaf + 0.1 if path[-1].key.endswith("_lora_b") else leaf
    params = jax.tree_util.tree_map_with_path(fill, params)
    save_peft(tmp_path / "out", loaded.model, params)
    back = load_peft(tmp_path / "out", loaded.model, loaded.params)
    assert not any(path.startswith("classifier") and "_lora_" in path for path in flatten(back))
    expected = run_jax(loaded.model, params, loaded.tokenizer)
    np.testing.assert_allclose(run_jax(loaded.model, back, loaded.tokenizer), expected, atol=1e-5)


def test_a_model_saved_over_a_pooled_one_is_not_taken_for_it(model, tmp_path):
    pooled = load_model(model, num_labels=3, pooling="mean")
    save_model(tmp_path / "out", pooled.model, pooled.params)
    other = load_model(model, num_labels=3, pooling="pooler")
    save_model(tmp_path / "out", other.model, other.params)
    again = load_model(tmp_path / "out")
    assert again.model.pooling == "pooler"
    jax.tree.map(np.testing.assert_array_equal, again.params, other.params)


def test_a_damaged_module_is_one_error(model, tmp_path):
    pooled, out = load_model(model, num_labels=3, pooling="mean"), tmp_path / "out"
    save_model(out, pooled.model, pooled.params)
    outside = (out / "modules.json").read_text().replace("1_Pooling", "../1_Pooling").encode()
    for file, content in (
        ("modules.json", b'{"linear'),
        ("modules.json", b'[{"path": ""}]'),
        ("modules.json", outside),
        ("2_Dense/config.json", b"[]"),
        ("2_Dense/model.safetensors", b'{"linear'),
    ):
        whole = (out / file).read_bytes()
        (out / file).write_bytes(content)
        with pytest.raises(ValueError, match=rf"^load_model: .*{file}' (is|can't).*\.\n  .+\nFix: "):
            load_model(out)
        (out / file).write_bytes(whole)


def test_a_pooling_in_the_newer_form_is_read(model, tmp_path):
    pooled = load_model(model, num_labels=3, pooling="cls")
    save_model(tmp_path / "out", pooled.model, pooled.params)
    newer = {"embedding_dimension": 32, "pooling_mode": "cls", "include_prompt": True}
    (tmp_path / "out" / "1_Pooling" / "config.json").write_text(json.dumps(newer))
    assert load_model(tmp_path / "out").model.pooling == "cls"
    (tmp_path / "out" / "1_Pooling" / "config.json").write_text(json.dumps(newer | {"pooling_mode": ["mean", "cls"]}))
    with pytest.raises(ValueError, match=r"not computed here\.\n  mean\n  cls\nFix: "):
        load_model(tmp_path / "out")
