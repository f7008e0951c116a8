"""Checkpoints in other forms: what jlora says of them, and that its advice gives the right model."""

import json
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tiny_job
from safetensors.numpy import load_file, save_file

from jlora import load_model
from jlora.cli.main import main
from jlora.hf.families import FAMILIES
from jlora.tree.paths import flatten

quick = tiny_job.quick


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_job.make_llama(tmp_path_factory.mktemp("formats") / "model")


def copy(model: Path, folder: Path, *, weights: bool = True) -> Path:
    folder.mkdir()
    for file in model.iterdir():
        if weights or file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def message(folder: Path, capsys) -> str:
    """What the command line says of a model that it refuses."""
    capsys.readouterr()
    assert main(["generate", str(folder), "where is"]) == 2
    text = capsys.readouterr().err
    assert text.count("\nFix: ") == 1 and "Traceback" not in text
    return text


@pytest.mark.parametrize(
    "model_type, architecture",
    [
        ("phi3", "Phi3ForCausalLM"),
        ("granite", "GraniteForCausalLM"),
        ("smollm3", "SmolLM3ForCausalLM"),
        ("t5", "T5ForConditionalGeneration"),
    ],
)
def test_another_model_is_named_and_no_edit_is_suggested(model_type, architecture, llama, tmp_path, capsys):
    folder = copy(llama, tmp_path / "model")
    tiny_job.change(folder / "config.json", '"model_type": "llama"', f'"model_type": "{model_type}"')
    tiny_job.change(folder / "config.json", "LlamaForCausalLM", architecture)
    text = message(folder, capsys)
    assert text.startswith(f"load_model: unknown model_type in '{folder}'.\n  model_type '{model_type}', ")
    assert f"architectures: {architecture}\n  known: {', '.join(FAMILIES)}\n" in text
    advice = text.split("\nFix: ")[1]
    assert all(name in advice for name in ("jlora.wrap", "jlora.adapt", "jlora.infer_layout", "save_peft(..., names="))
    assert "nearest" not in text and "model_type" not in advice and "config.json" not in advice


@pytest.mark.parametrize("value", [None, [], 7, {}])
def test_a_model_type_that_is_no_name_is_one_error(value, llama, tmp_path, capsys):
    folder = copy(llama, tmp_path / "model")
    content = json.loads((folder / "config.json").read_text()) | {"model_type": value}
    (folder / "config.json").write_text(json.dumps(content))
    words = "names no model_type" if value is None else f"model_type {value!r}"
    assert words in message(folder, capsys)


@pytest.mark.parametrize("tied", [True, False])
def test_the_text_part_of_a_multimodal_model_is_what_the_advice_saves(tied, tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="no torch, the oracle")
    transformers = pytest.importorskip("transformers")
    folder, sizes = tmp_path / "it", {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    vision = {"num_hidden_layers": 1, "hidden_size": 16, "image_size": 28, "patch_size": 14, "projection_dim": 16}
    text = sizes | {"num_hidden_layers": 2, "num_key_value_heads": 1, "vocab_size": 60, "max_position_embeddings": 64}
    if tied:
        options = {"vision_config": sizes | vision, "mm_tokens_per_image": 4}
        config = transformers.Gemma3Config(text_config=text | {"head_dim": 16, "sliding_window": 8}, **options)
        model = transformers.Gemma3ForConditionalGeneration(config)
    else:
        options = {"vision_config": {"model_type": "clip_vision_model"} | sizes | vision, "image_token_index": 59}
        text |= {"model_type": "llama", "tie_word_embeddings": False}
        config = transformers.LlavaConfig(text_config=text, **options, tie_word_embeddings=False)
        model = transformers.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    model.save_pretrained(folder)
    tiny_job.make_chat_tokenizer(folder)
    said = message(folder, capsys)
    part = "gemma3_text" if tied else "llama"
    assert f"architectures: {config.architectures[0]}\n" in said and f"its text part, a '{part}' model" in said
    exec(textwrap.dedent(said.split("of its own:\n")[1]), {})
    loaded = load_model(f"{folder}-text")
    ids = np.arange(5, 15)[None]
    with torch.no_grad():
        wanted = model.eval()(torch.from_numpy(ids)).logits.numpy()
    logits = loaded.model.apply({"params": loaded.params}, ids, np.ones_like(ids))
    assert wanted.std() > 0.1
    np.testing.assert_allclose(np.asarray(logits), wanted, atol=2e-5)
    assert loaded.tokenizer is not None


def write_shards(folder: Path, total: int = 3) -> list[Path]:
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, files = sorted(stored), []
    for n in range(total):
        files.append(folder / f"model-{n + 1:05}-of-{total:05}.safetensors")
        save_file({name: stored[name] for name in names[n::total]}, files[-1])
    return files


def test_shards_without_an_index_are_read_where_all_are_there(llama, tmp_path, capsys):
    folder = copy(llama, tmp_path / "model")
    files = write_shards(folder)
    single, sharded = flatten(load_model(llama).params), flatten(load_model(folder).params)
    assert single.keys() == sharded.keys()
    for path, leaf in single.items():
        np.testing.assert_array_equal(leaf, sharded[path])
    files[1].rename(tmp_path / files[1].name)
    assert f"1 shard of 3 missing in '{folder}'.\n  {files[1].name}\nFix: fetch" in message(folder, capsys)
    (folder / "model-00001-of-00002.safetensors").write_bytes(files[0].read_bytes())
    assert f"holds shards of 2 checkpoints and no index.\n  {'model-00001-of-00002.safetensors'}" in message(
        folder, capsys
    )


@pytest.mark.parametrize(
    "name, words",
    [
        ("llama-q4_k_m.gguf", "gguf_file=FILE"),
        ("consolidated.safetensors", "fetch the same model in Hugging Face form"),
        ("consolidated.00.pth", "fetch the same model in Hugging Face form"),
        ("pytorch_model.bin", "convert the weights to safetensors"),
        ("flax_model.msgpack", "convert the weights to safetensors"),
        ("adapter_model.safetensors", "give the adapter's base as the model"),
        ("adapter.json", "give the adapter's base as the model"),
    ],
)
@pytest.mark.parametrize("config", [True, False])
def test_weights_in_another_form_have_their_own_advice(name, words, config, llama, tmp_path, capsys):
    folder = copy(llama, tmp_path / "model", weights=False)
    if not config:
        (folder / "config.json").unlink()
    (folder / name).write_bytes(b"something")
    text = message(folder, capsys)
    missing = "model.safetensors" if config else "config.json"
    assert text.startswith(f"load_model: '{folder}' has no {missing}.\n  {name}  (")
    assert words in text.split("\nFix: ")[1]
    text = message(folder / name, capsys)
    assert text.startswith(f"load_model: '{folder / name}' is a file, not a model's folder.\n")


def test_a_folder_without_weights_says_what_to_fetch(llama, tmp_path, capsys):
    text = message(copy(llama, tmp_path / "model", weights=False), capsys)
    assert text.endswith(
        "has no model.safetensors.\nFix: fetch the weights: model.safetensors, or all of its shards with their index.\n"
    )
