"""Tokenizers: read or refused with the file and field that is wrong, and carried with an adapter."""

import importlib.util
import json
import shutil

import jax
import pytest
import tiny_job
from transformers import AutoTokenizer

from jlora.cli.main import main
from jlora.hf.chat import render_chat
from jlora.hf.load import load_model, save_model
from jlora.hf.peft import save_peft
from jlora.hf.tokenizer import save_tokenizer
from jlora.runs.folder import load_run
from jlora.training.checkpoint import save_adapter
from jlora.tree.wrapping import wrap

quick = tiny_job.quick
OTHER = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<user>{% endif %}"
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_job.make_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture
def folder(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "model")


def problems(folder) -> list[str]:
    """The lines of the error."""
    with pytest.raises(ValueError) as error:
        load_model(folder, abstract=True)
    lines = str(error.value).splitlines()
    assert lines[0] == f"load_model: the tokenizer in {str(folder)!r} can't be read."
    assert lines[-1].startswith("Fix: fetch the files again")
    return [line.strip() for line in lines[1:-1]]


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
)
@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"{", b"", b"[1]"])
def test_a_damaged_file_is_named(folder, name, content):
    (folder / name).write_bytes(content)
    if name in ("special_tokens_map.json", "added_tokens.json"):
        # transformers reads these where tokenizer_config.json has no added tokens.
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings.pop("added_tokens_decoder", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (problem,) = problems(folder)
    assert problem.startswith(f"{name}: ")


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"])
def test_a_template_that_is_no_text_is_named(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"\xff\xfe")
    assert problems(folder) == [f"{name}: it is not text in UTF-8 (byte 0)"]


@pytest.mark.parametrize(
    "field, value",
    [
        ("eos_token", 3),
        ("bos_token", {"a": 1}),
        ("tokenizer_class", ["LlamaTokenizer"]),
        ("added_tokens_decoder", [3]),
        ("extra_special_tokens", 1.5),
        ("auto_map", "x"),
        ("padding_side", "top"),
        ("model_input_names", 3),
        ("model_max_length", "many"),
    ],
)
def test_a_field_of_a_wrong_type_is_named(folder, field, value):
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {field: value}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert problems(folder) == [f"tokenizer_config.json: {field} is {value!r}"]


def test_a_part_of_tokenizer_json_that_is_wrong_is_an_error(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    for field, value in (("model", {}), ("pre_tokenizer", 3), ("version", None)):
        (folder / "tokenizer.json").write_text(json.dumps(content | {field: value}))
        (problem,) = problems(folder)
        assert problem.startswith("tokenizer.json: ")


def test_a_panic_of_the_tokenizers_library_is_an_error(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"]["single"][0]["SpecialToken"]["id"] = "<r>"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (problem,) = problems(folder)
    assert problem.startswith("tokenizer.json: ")


def test_code_that_comes_with_a_tokenizer_is_never_run(folder):
    (folder / "mine.py").write_text("raise SystemExit('it ran')\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoConfig": "mine.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    try:
        loaded = load_model(folder, abstract=True)
    except ValueError as error:
        assert "code that comes with a tokenizer is never run" in str(error)
    else:
        assert type(loaded.tokenizer).__module__.startswith("transformers.")


@pytest.mark.parametrize(
    "content, package", [(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02", "sentencepiece"), (b"YQ== 0\nYg== 1\n", "tiktoken")]
)
def test_a_vocabulary_whose_package_is_missing_names_it(folder, content, package):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_model(folder, abstract=True)
    path = str(folder / "tokenizer.model")
    assert str(error.value).startswith(
        f"load_model: {path!r} needs {package}, which is not installed.\nFix: pip install {package}"
    )


def test_a_saved_tokenizer_leaves_nothing_of_an_earlier_one(llama, folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("a user's")
    loaded = load_model(folder)
    loaded.tokenizer.chat_template = {"default": OTHER, "tool_use": "tools"}
    save_model(out, loaded.model, loaded.params, loaded.tokenizer)
    assert AutoTokenizer.from_pretrained(out).chat_template == {"default": OTHER, "tool_use": "tools"}
    loaded.tokenizer.chat_template = None
    (out / "vocab.txt").write_text("of another")
    save_tokenizer(out, loaded.tokenizer)
    assert AutoTokenizer.from_pretrained(out).chat_template is None
    assert not (out / "vocab.txt").exists() and (out / "mine.txt").read_text() == "a user's"
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


@pytest.fixture(scope="module")
def adapters(llama, tmp_path_factory):
    """Folders of adapters: jlora's and PEFT's, each with a whole tokenizer, a template alone, or nothing."""
    place = tmp_path_factory.mktemp("adapters")
    loaded = load_model(llama)
    params = wrap(loaded.params, 2, targets=loaded.model.lora_targets, key=jax.random.key(0))
    for kind in ("jlora", "peft"):
        for form in ("whole", "template", "nothing"):
            folder = place / f"{kind}-{form}"
            if kind == "jlora":
                save_adapter(folder, params)
            else:
                save_peft(folder, loaded.model, params)
            if form == "whole":
                tokenizer = AutoTokenizer.from_pretrained(llama)
                tokenizer.chat_template = OTHER
                tokenizer.save_pretrained(folder)
            elif form == "template":
                (folder / "chat_template.jinja").write_text(OTHER)
    return place


@pytest.mark.parametrize("form", ["whole", "template", "nothing"])
@pytest.mark.parametrize("kind", ["jlora", "peft"])
def test_merge_and_export_write_the_tokenizer_of_the_adapters_folder(llama, adapters, kind, form, tmp_path):
    expected = tiny_job.CHAT if form == "nothing" else OTHER
    for command in ("merge", "export"):
        out = tmp_path / command
        assert main([command, str(adapters / f"{kind}-{form}"), "--out", str(out), "--model", str(llama)]) == 0
        assert AutoTokenizer.from_pretrained(out).chat_template == expected


@pytest.mark.parametrize("form", ["whole", "template"])
def test_a_chat_is_written_with_the_template_of_the_adapters_folder(llama, adapters, form, monkeypatch, capsys):
    prompts = []

    def record(tokenizer, messages, **options):
        prompts.append(render_chat(tokenizer, messages, **options))
        return prompts[-1]

    monkeypatch.setattr("jlora.data.batches.render_chat", record)
    argv = ["generate", str(llama), "where is my courier", "--chat", "--max-new-tokens", "1"]
    assert main([*argv, "--adapter", str(adapters / f"peft-{form}")]) == 0
    assert main(argv) == 0
    assert prompts == ["<user> where is my courier </s><user>", "<user> where is my courier <assistant> "]


def test_a_run_keeps_its_tokenizer_when_the_bases_changes(folder, tmp_path):
    toml = tiny_job.make_other_job(tmp_path / "job", folder, "instruction")
    assert main(["train", str(toml), "--optimisation.steps", "1"]) == 0
    run = tmp_path / "job" / "run"
    (folder / "chat_template.jinja").write_text(OTHER)
    assert load_run(run).task.loaded.tokenizer.chat_template == tiny_job.CHAT
    assert main(["merge", str(run), "--out", str(tmp_path / "merged")]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tiny_job.CHAT


def test_a_run_is_resumed_with_its_own_tokenizer(folder, tmp_path, capsys):
    toml = tiny_job.make_other_job(tmp_path / "job", folder, "instruction")
    argv = ["train", str(toml), "--optimisation.steps", "2"]
    assert main(argv) == 0
    run = tmp_path / "job" / "run"
    result, history = json.loads((run / "result.json").read_text()), (run / "metrics.jsonl").read_bytes()
    (run / "result.json").unlink()
    (folder / "chat_template.jinja").write_text(OTHER)
    # With the base's template, the rows would be others, and the run refused.
    assert main(argv) == 0
    assert "Going on after step 2" in capsys.readouterr().out
    again = json.loads((run / "result.json").read_text())
    assert (again["before"], again["after"]) == (result["before"], result["after"])
    assert (run / "metrics.jsonl").read_bytes() == history


@pytest.mark.parametrize("form", ["run", "whole", "template", "nothing"])
def test_training_from_an_adapter_takes_its_tokenizer_along(form, llama, adapters, folder, tmp_path):
    toml = tiny_job.make_other_job(tmp_path / "job", folder, "instruction")
    tiny_job.change(toml, "rank = 4", "rank = 2")
    argv = ["train", str(toml), "--optimisation.steps", "1"]
    start, own = tmp_path / "start", tiny_job.CHAT + "{# the adapter's #}"
    if form == "run":
        shutil.copytree(folder, tmp_path / "model with its template")
        (tmp_path / "model with its template" / "chat_template.jinja").write_text(own)
        named = ["--model.name", str(tmp_path / "model with its template"), "--output.folder", str(start)]
        assert main([*argv, *named]) == 0
    else:
        shutil.copytree(adapters / f"peft-{form}", start)
        if form != "nothing":
            (start / "chat_template.jinja").write_text(own)
    expected = tiny_job.CHAT if form == "nothing" else own
    assert main([*argv, "--adapter.from", str(start), "--output.folder", str(tmp_path / "next")]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "next" / "tokenizer").chat_template == expected
    assert AutoTokenizer.from_pretrained(folder).chat_template == tiny_job.CHAT
