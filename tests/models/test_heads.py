"""Classification heads on decoders: torch's logits, PEFT's adapters, and whole jobs from the command line."""

import copy
import functools
import json

import jax
import numpy as np
import pytest
import tiny_job

import jlora
from jlora.cli.main import main
from jlora.hf.load import load_model, save_model
from jlora.hf.peft import load_peft, save_peft
from jlora.runs import folder as runs
from jlora.runs.inspection import load_adapted
from jlora.training.checkpoint import restore_adapter, save_adapter
from jlora.tree.paths import flatten
from jlora.tree.wrapping import is_wrapped

torch = pytest.importorskip("torch", reason="torch is the oracle, and is not installed")
peft = pytest.importorskip("peft", reason="peft is the oracle, and is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is the oracle, and is not installed")

quick = tiny_job.quick
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")

TOLERANCE = 2e-5
VOCAB, TIME, PAD, LABELS = 90, 11, 3, 3
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "attn_implementation": "eager",
}
WINDOW = {"sliding_window": 4}
CONFIGS = {
    "Llama": ("LlamaConfig", SIZES),
    "Mistral": ("MistralConfig", SIZES | WINDOW),
    "Qwen2": ("Qwen2Config", {name: value for name, value in SIZES.items() if name != "head_dim"}),
    "Qwen3": ("Qwen3Config", SIZES | {"tie_word_embeddings": True}),
    "Gemma": ("GemmaConfig", SIZES),
    "Gemma2": ("Gemma2Config", SIZES | WINDOW | {"final_logit_softcapping": 2.0}),
    "Gemma3Text": ("Gemma3TextConfig", SIZES | WINDOW),
    "GPT2": ("GPT2Config", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}),
}
HEADS = {"classification": "SequenceClassification", "token_classification": "TokenClassification"}
# Transformers has no token classifier of Gemma 3.
CASES = [(name, head) for name in CONFIGS for head in HEADS if (name, head) != ("Gemma3Text", "token_classification")]
TOKENS = [("Llama", "token_classification"), ("GPT2", "token_classification")]
AUTO = {
    "classification": transformers.AutoModelForSequenceClassification,
    "token_classification": transformers.AutoModelForTokenClassification,
    "causal_lm": transformers.AutoModelForCausalLM,
}


def make(name, head, folder, **changes):
    """A torch checkpoint with random biases and norms, scaled up until its logits spread."""
    kind, values = CONFIGS[name]
    special = {"num_labels": LABELS, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model = AUTO[head].from_config(getattr(transformers, kind)(**values | special | changes)).eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.normal_(std=1.5 * value.shape[-1] ** -0.5)
            else:
                value.add_(torch.empty_like(value).uniform_(-0.2, 0.2))
    model.save_pretrained(folder)
    return model


def texts():
    """Ids and mask of six texts, two padded on the right, two on the left; the last ends in the padding's token."""
    ids, mask = np.random.default_rng(1).integers(PAD + 1, VOCAB, (6, TIME)), np.ones((6, TIME), np.int64)
    for row, padding in ((1, slice(7, None)), (2, slice(3, None)), (3, slice(0, 2)), (4, slice(0, 8))):
        ids[row, padding], mask[row, padding] = PAD, 0
    ids[5, -1] = ids[5, 4] = PAD
    return ids, mask


def run_torch(model, ids, mask):
    positions = np.clip(np.cumsum(mask, axis=1) - 1, 0, None)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        return model(**{name: torch.tensor(value) for name, value in inputs.items()}).logits.numpy()


@functools.lru_cache
def forward(model):
    return jax.jit(model.apply)


def run_jax(model, params, *inputs):
    """Logits with the adapters merged in: one compile serves every tree of a model."""
    params = jlora.merge(params) if is_wrapped(flatten(params)) else params
    with jax.default_matmul_precision("highest"):
        return np.asarray(forward(model)({"params": params}, *inputs))


def fill(params):
    """Every B random."""

    def change(path, leaf):
        named = path[-1].key.endswith("_lora_b")
        return 0.2 * jax.random.normal(jax.random.key(len(str(path))), leaf.shape) if named else leaf

    return jax.tree_util.tree_map_with_path(change, params)


def wrapped(loaded):
    targets, layout = loaded.model.lora_targets, loaded.model.lora_layout
    return fill(jlora.wrap(loaded.params, rank=3, alpha=5, targets=targets, layout=layout))


@pytest.mark.parametrize(("name", "head"), CASES)
def test_a_classifiers_logits_equal_torch_with_padding_on_either_side(name, head, tmp_path):
    oracle = make(name, head, tmp_path)
    loaded = load_model(tmp_path, scan=name in ("Qwen2", "GPT2"))
    assert loaded.model.head_type == head and loaded.new == ()
    ids, mask = texts()
    expected = run_torch(oracle, ids, mask)
    assert expected.std() > 0.3 and expected.shape[-1] == LABELS
    kept = mask == 1 if head == "token_classification" else slice(None)
    logits = run_jax(loaded.model, loaded.params, ids, mask)
    np.testing.assert_allclose(logits[kept], expected[kept], atol=TOLERANCE, rtol=0)


def test_without_a_padding_token_the_mask_says_where_a_text_ends(tmp_path):
    oracle = make("Llama", "classification", tmp_path, pad_token_id=None)
    loaded = load_model(tmp_path)
    ids, mask = texts()
    logits = run_jax(loaded.model, loaded.params, ids, mask)
    for row, kept in enumerate(mask == 1):
        # Transformers takes one text at a time then.
        one = run_torch(oracle, ids[row][kept][None], mask[row][kept][None])
        np.testing.assert_allclose(logits[row], one[0], atol=TOLERANCE, rtol=0)
    alone = run_jax(loaded.model, loaded.params, ids[:1])
    np.testing.assert_allclose(alone[0], logits[0], atol=TOLERANCE, rtol=0)


def test_a_tokenizers_padding_token_stands_in_for_one_that_the_config_lacks(tmp_path):
    size = tiny_job.make_tokenizer(tmp_path)
    make("Llama", "causal_lm", tmp_path, pad_token_id=None, vocab_size=size)
    loaded = load_model(tmp_path, labels=["a", "b"])
    assert loaded.tokenizer.pad_token_id == loaded.model.pad_token_id == 0
    save_model(tmp_path / "saved", loaded.model, loaded.params, loaded.tokenizer)
    saved = AUTO["classification"].from_pretrained(tmp_path / "saved").eval()
    assert saved.config.pad_token_id == 0 and saved.config.id2label == {0: "a", 1: "b"}
    batch = loaded.tokenizer(["where is my parcel", "login"], padding=True, return_tensors="np")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = run_torch(saved, ids, mask)
    np.testing.assert_allclose(run_jax(loaded.model, loaded.params, ids, mask), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("name", "head"), [case for case in CASES if case[1] == "classification" or case in TOKENS])
def test_a_new_head_on_a_language_model_is_saved_and_adapted_as_torch_and_peft_read_it(name, head, tmp_path):
    make(name, "causal_lm", tmp_path / "base")
    loaded = load_model(tmp_path / "base", head=head, num_labels=LABELS, scan=name == "Mistral")
    module = loaded.model.label_module
    assert {path.split("/")[0] for path in loaded.new} == {module}
    leaves = {path: leaf + 0.3 if path.endswith("bias") else 20 * leaf for path, leaf in loaded.params[module].items()}
    loaded.params[module] = leaves
    params = wrapped(loaded)
    ids, mask = texts()
    kept = mask == 1 if head == "token_classification" else slice(None)
    expected = run_jax(loaded.model, params, ids, mask)[kept]
    assert np.abs(expected - run_jax(loaded.model, loaded.params, ids, mask)[kept]).max() > 0.1

    save_model(tmp_path / "merged", loaded.model, params)
    merged = AUTO[head].from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    assert type(merged).__name__ in merged.config.architectures
    np.testing.assert_allclose(run_torch(merged, ids, mask)[kept], expected, atol=TOLERANCE * 2, rtol=0)
    again = load_model(tmp_path / "merged", scan=name == "Mistral")
    np.testing.assert_allclose(run_jax(again.model, again.params, ids, mask)[kept], expected, atol=1e-5, rtol=0)

    save_peft(tmp_path / "peft", loaded.model, params)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["task_type"] == {"classification": "SEQ_CLS", "token_classification": "TOKEN_CLS"}[head]
    assert config["modules_to_save"] == [module]
    base = AUTO[head].from_pretrained(tmp_path / "base", num_labels=LABELS, attn_implementation="eager").eval()
    opened = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    np.testing.assert_allclose(run_torch(opened, ids, mask)[kept], expected, atol=TOLERANCE * 2, rtol=0)

    # What PEFT saves goes on the language model again, with its head.
    opened.save_pretrained(tmp_path / "again")
    adapted = load_adapted(tmp_path / "again", str(tmp_path / "base"))
    assert {path.split("/")[0] for path in adapted.train} == {module}
    logits = run_jax(adapted.loaded.model, adapted.params, ids, mask)[kept]
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=0)


def test_an_adapter_that_peft_trained_is_read(tmp_path):
    base = make("GPT2", "classification", tmp_path / "base")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=6, target_modules=["c_attn"])
    config.fan_in_fan_out, config.init_lora_weights = True, False
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.normal_()
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_model(tmp_path / "base")
    params = load_peft(tmp_path / "adapter", loaded.model, loaded.params)
    ids, mask = texts()
    expected = run_torch(model, ids, mask)
    np.testing.assert_allclose(run_jax(loaded.model, params, ids, mask), expected, atol=TOLERANCE * 4, rtol=0)


def test_arguments_that_a_classifier_cannot_use_are_one_error(tmp_path):
    make("Llama", "classification", tmp_path / "llama")
    loaded = load_model(tmp_path / "llama")
    ids = texts()[0]
    with pytest.raises(ValueError, match=r"one whole text\.\n  segment_ids\n  cache\nFix: "):
        cache = loaded.model.init_cache(len(ids), TIME)
        loaded.model.apply({"params": loaded.params}, ids, segment_ids=np.ones_like(ids), cache=cache)
    with pytest.raises(ValueError, match="head 'classification': only 'causal_lm' can generate"):
        jlora.generate(loaded.model, loaded.params, [[1, 2]], max_new_tokens=2)
    with pytest.raises(ValueError, match="pooling='mean' was given for a decoder"):
        load_model(tmp_path / "llama", pooling="mean")
    make("Gemma3Text", "causal_lm", tmp_path / "gemma")
    with pytest.raises(ValueError, match="head is 'token_classification', known: causal_lm, classification\n"):
        load_model(tmp_path / "gemma", head="token_classification", num_labels=2)


@pytest.fixture(scope="module", params=["sequence_classification", "token_classification"])
def trained(request, tmp_path_factory):
    """A run of a Llama that classifies, and its task."""
    folder = tmp_path_factory.mktemp("trained")
    model, task = tiny_job.make_llama(folder / "llama"), request.param
    if task == "sequence_classification":
        toml = tiny_job.make_job(folder / "job", model)
        tiny_job.change(toml, 'pooling = "mean"\n', "")
    else:
        toml = tiny_job.make_other_job(folder / "job", model, task)
    assert main(["train", str(toml)]) == 0
    return folder / "job" / "run", task


def test_a_llama_learns_classes_and_every_command_takes_its_run(trained, tmp_path, capsys):
    folder, task = trained
    head = {"sequence_classification": "classification"}.get(task, task)
    result = json.loads((folder / "result.json").read_text())
    measure = "accuracy" if head == "classification" else "f1"
    assert result["best"][measure] > 0.7 and result["after"][measure] > result["before"][measure] + 0.1

    capsys.readouterr()
    assert main(["predict", str(folder), "where is my courier", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    if head == "classification":
        assert answer["entries"][0]["label"] == "delivery"
    else:
        assert answer["entities"] == [{"type": "PERSON", "text": "courier"}]
    data = folder.parent / "validation.jsonl"
    assert main(["eval", str(folder), "--data", str(data), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[measure] == pytest.approx(result["best"][measure])

    run = runs.load_run(folder)
    assert main(["inspect", str(folder), "--model", run.config.model.name, "--json"]) == 0
    whole = [leaf["path"] for leaf in json.loads(capsys.readouterr().out)["whole"]]
    assert {path.split("/")[0] for path in whole} == {"score"}
    assert main(["merge", str(folder), "--out", str(tmp_path / "merged")]) == 0
    assert main(["export", str(folder), "--out", str(tmp_path / "peft")]) == 0
    ids = np.array(run.task.loaded.tokenizer(["where is my courier"])["input_ids"])
    ones = np.ones_like(ids)
    expected = run_jax(run.task.loaded.model, run.params, ids)
    merged = AUTO[head].from_pretrained(tmp_path / "merged").eval()
    assert list(merged.config.id2label.values()) == list(run.task.labels)
    np.testing.assert_allclose(run_torch(merged, ids, ones), expected, atol=TOLERANCE * 2, rtol=0)
    base = AUTO[head].from_pretrained(run.config.model.name, num_labels=len(run.task.labels))
    exported = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    np.testing.assert_allclose(run_torch(exported, ids, ones), expected, atol=TOLERANCE * 2, rtol=0)

    # The adapter's folder alone, on the language model that is named for it.
    adapted = load_adapted(folder / "adapter", run.config.model.name)
    leaves = flatten(run.params)
    for path, leaf in flatten(adapted.params).items():
        np.testing.assert_array_equal(leaf, leaves[path], err_msg=path)


def test_an_adapter_on_a_pooler_that_no_output_reads_is_kept_and_written_back(tmp_path):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    base = transformers.BertModel(transformers.BertConfig(vocab_size=VOCAB, **sizes)).eval()
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(base), config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor(texts()[0])
    with torch.no_grad():
        expected = adapted(ids)
        assert np.abs((expected.pooler_output - base(ids).pooler_output).numpy()).max() > 0.05

    loaded = load_model(tmp_path / "base")
    assert loaded.model.head is None and "pooler" not in loaded.params
    params = load_peft(tmp_path / "adapter", loaded.model, loaded.params)
    assert params["pooler"]["dense"]["kernel_lora_b"].shape == (3, 32)
    states = jax.jit(jlora.adapt(loaded.model.apply))({"params": params}, ids.numpy())
    np.testing.assert_allclose(states, expected.last_hidden_state.numpy(), atol=TOLERANCE)

    def check(model):
        with torch.no_grad():
            actual = model.eval()(ids)
        np.testing.assert_allclose(actual.last_hidden_state, expected.last_hidden_state, atol=TOLERANCE)
        np.testing.assert_allclose(actual.pooler_output, expected.pooler_output, atol=TOLERANCE)

    save_peft(tmp_path / "again", loaded.model, params)
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["modules_to_save"] is None
    check(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again"))
    save_model(tmp_path / "merged", loaded.model, params)
    check(transformers.AutoModel.from_pretrained(tmp_path / "merged"))
    # The same by the commands.
    named = ["--model", str(tmp_path / "base")]
    assert main(["export", str(tmp_path / "adapter"), "--out", str(tmp_path / "exported"), *named]) == 0
    check(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "exported"))
    assert main(["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "whole"), *named]) == 0
    check(transformers.AutoModel.from_pretrained(tmp_path / "whole"))


def test_a_tree_with_a_pooler_that_no_output_reads_goes_through_save_adapter(tmp_path):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    base = transformers.BertModel(transformers.BertConfig(vocab_size=VOCAB, **sizes)).eval()
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(base), config).eval()
    adapted.save_pretrained(tmp_path / "peft")
    loaded = load_model(tmp_path / "base")
    params = load_peft(tmp_path / "peft", loaded.model, loaded.params)
    save_adapter(tmp_path / "own", params, model=loaded.model)
    again = flatten(restore_adapter(tmp_path / "own", jlora.unwrap(params), model=loaded.model))
    assert again.keys() == flatten(params).keys()
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)
    # The commands find the pooler in the base's folder.
    argv = [str(tmp_path / "own"), "--out", str(tmp_path / "merged"), "--model", str(tmp_path / "base")]
    assert main(["merge", *argv]) == 0
    merged = transformers.AutoModel.from_pretrained(tmp_path / "merged").eval()
    ids = torch.tensor(texts()[0])
    with torch.no_grad():
        actual, expected = merged(ids), adapted(ids)
    np.testing.assert_allclose(actual.last_hidden_state, expected.last_hidden_state, atol=TOLERANCE)
    np.testing.assert_allclose(actual.pooler_output, expected.pooler_output, atol=TOLERANCE)


def test_inspect_lists_the_adapter_of_a_pooler_that_no_output_reads(tmp_path, capsys):
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    base = transformers.BertModel(transformers.BertConfig(vocab_size=VOCAB, **sizes))
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, target_modules=["pooler.dense", "query"], init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path / "adapter")
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "adapter"), "--model", str(tmp_path / "base"), "--json"]) == 0
    actual = json.loads(capsys.readouterr().out)
    assert "pooler/dense/kernel" in {target["path"] for target in actual["targets"]} and actual["whole"] == []
