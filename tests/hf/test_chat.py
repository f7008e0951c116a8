"""Chat templates: rendered as transformers does, within limits, and the tokens that end an answer."""

import json
import shutil
import time

import pytest
import tiny_job
from letter_tokenizer import CHATML, letters

from jlora.cli.main import main
from jlora.data.batches import make_rows
from jlora.data.readers import Chat
from jlora.hf.chat import ChatError, TemplateRenderer, describe_format, end_of_turn, render_chat, stop_tokens
from jlora.hf.load import load_model

quick = tiny_job.quick
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo", "name": None}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
RICH = (
    "{{ bos_token }}{% set ns = namespace(n=0) %}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{% if m.name is defined %}!{% endif %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
    "{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m.role }}:{{ m['content'] | trim }}"
    "{% generation %}{{ eos_token }}{% endgeneration %}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


@pytest.fixture(scope="module")
def renderer():
    """A renderer with low limits."""
    made = TemplateRenderer(seconds=1, bytes=1 << 28, characters=10_000)
    yield made
    made.close()


@pytest.mark.parametrize("template", [CHATML, tiny_job.CHAT, RICH])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_a_chat_is_written_as_transformers_writes_it(template, add_generation_prompt, tools):
    tokenizer = letters(template=template)
    for content in ("hi", "naïve 日本\n", "{{ 1 }}"):
        messages = [{"role": "system", "content": content}, *MESSAGES]
        options = {"tools": tools, "add_generation_prompt": add_generation_prompt}
        expected = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        assert render_chat(tokenizer, messages, **options) == expected


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
NESTED = "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}"
DOUBLED = "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"


@pytest.mark.parametrize(
    "template, reason",
    [
        (LOOP, "it needs more than 1 seconds for one chat"),
        (NESTED, "it needs more than "),
        (DOUBLED, "it needs more than 256 MiB of memory for one chat"),
        ("{{ 'x' * 10**10 }}", "it needs more than 256 MiB of memory for one chat"),
        ("{{ 'x'.center(10**10) }}", "it needs more than 256 MiB of memory for one chat"),
        ("{{ 'x' * 20000 }}", "it writes more than 10,000 characters for one chat"),
        ("{{ ''.__class__.__mro__ }}", "it is refused by the sandbox: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "it is refused by the sandbox: access to attribute 'append'"),
        ("{% include '/etc/passwd' %}", "it reads other templates (include, import or extends)"),
        ("{%- import 'a' as a %}", "it reads other templates (include, import or extends)"),
        ("{% for %}", "line 1: Expected an expression"),
    ],
)
def test_a_template_that_is_unsafe_or_exceeds_a_limit_is_one_error(template, reason, renderer):
    start = time.process_time()
    with pytest.raises(ValueError) as error:
        render_chat(letters(template=template), MESSAGES, add_generation_prompt=False, renderer=renderer)
    assert not isinstance(error.value, ChatError)
    lines = str(error.value).splitlines()
    assert lines[0] == "chat template: the tokenizer's chat template can't be used."
    assert lines[1].startswith("  " + reason) and lines[2].startswith("Fix: correct the template")
    assert len(lines) == 3 and time.process_time() - start < 5
    # The next chat is written as if nothing had been.
    text = render_chat(letters(template="{{ eos_token }}"), MESSAGES, add_generation_prompt=False, renderer=renderer)
    assert text == "</s>"


def test_a_template_that_can_not_be_used_is_not_tried_on_every_chat():
    chats = [Chat(tuple(MESSAGES), f"f:{n}") for n in range(50)]
    with pytest.raises(ValueError) as error:
        make_rows(letters(template="{{ ''.__class__.__mro__ }}"), chats, max_length=64)
    assert str(error.value).count("sandbox") == 1 and "f:1" not in str(error.value)


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{{ raise_exception('no roles') }}", "the chat template says: no roles"),
        ("{{ messages[9].content }}", "the chat template fails: list object has no element 9"),
        ("{{ 1 / 0 }}", "the chat template fails: ZeroDivisionError: division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "the chat template fails: RecursionError"),
    ],
)
def test_a_chat_that_a_template_refuses_gets_its_reason(template, reason, renderer):
    with pytest.raises(ChatError) as error:
        render_chat(letters(template=template), MESSAGES, add_generation_prompt=False, renderer=renderer)
    assert str(error.value).startswith(reason)


def test_several_templates_without_a_default_are_an_error():
    tokenizer = letters(template={"rag": CHATML})
    with pytest.raises(ValueError, match="the tokenizer's chat template can't be used") as error:
        render_chat(tokenizer, MESSAGES, add_generation_prompt=True)
    assert "\nFix: " in str(error.value)
    tokenizer.chat_template = {"default": CHATML, "tool_use": "tools"}
    assert render_chat(tokenizer, MESSAGES, add_generation_prompt=True).endswith("<|im_start|>assistant\n")
    assert render_chat(tokenizer, MESSAGES, tools=TOOLS, add_generation_prompt=True) == "tools"


@pytest.mark.parametrize(
    "template, token",
    [
        (CHATML, "<|im_end|>"),
        (RICH, "</s>"),
        (None, "</s>"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", None),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("{{ raise_exception('never') }}", None),
        ("{% for m in messages %}<|im_start|>{{ m.content | upper }}{% endfor %}", None),
    ],
)
def test_the_end_of_a_turn_is_the_token_that_the_template_writes_after_an_answer(template, token):
    tokenizer = letters(template=template)
    assert end_of_turn(tokenizer) == (None if token is None else tokenizer.convert_tokens_to_ids(token))


# As Gemma's: the end of a turn is not the tokenizer's end of a text.
TURNS = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} <end_of_turn> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def make_turns(folder):
    """A tiny Llama whose turns end in a token that is neither the tokenizer's eos nor special."""
    tiny_job.make_llama(folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    # The last word of the vocabulary gives way: the model keeps its size.
    word, size = max(data["model"]["vocab"].items(), key=lambda item: item[1])
    del data["model"]["vocab"][word]
    data["model"]["vocab"]["<end_of_turn>"] = size
    token = {"id": size, "content": "<end_of_turn>", "special": False, "single_word": False}
    data["added_tokens"].append(token | {"lstrip": False, "rstrip": False, "normalized": False})
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "chat_template.jinja").write_text(TURNS)
    return folder


def write_job(folder, model):
    """A job whose answer is always the same, so that a few steps learn where it ends."""
    toml = tiny_job.make_other_job(folder, model, "instruction")
    for split in ("train", "validation"):
        records = [{"question": record["text"], "answer": "ask parcel"} for record in tiny_job.questions(split)]
        tiny_job.write_lines(folder / f"{split}.jsonl", records)
    return toml


@pytest.fixture(scope="module")
def turns(tmp_path_factory):
    """The model, and a run that learnt to answer."""
    folder = tmp_path_factory.mktemp("turns")
    model = make_turns(folder / "model")
    assert main(["train", str(write_job(folder / "job", model))]) == 0
    return model, folder / "job" / "run"


def test_answers_stop_at_the_end_of_a_turn_in_predict_and_generate(turns, tmp_path, capsys):
    model, run = turns
    loaded = load_model(model)
    token = loaded.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert token not in loaded.tokenizer.all_special_ids
    assert stop_tokens(loaded, chat=True) == [2, token] and stop_tokens(loaded, chat=False) == [2]
    capsys.readouterr()
    assert main(["predict", str(run), "where is my courier", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"].split() == ["ask", "parcel"]
    assert main(["generate", str(model), "where is my courier", "--chat", "--adapter", str(run)]) == 0
    assert capsys.readouterr().out.split() == ["ask", "parcel"]


@pytest.mark.parametrize("stored", [None, {"eos_token_id": [2, 3], "max_length": 50}, {"do_sample": True}])
def test_transformers_stops_at_the_end_of_a_turn_of_a_merged_run(turns, stored, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle, and is not installed")
    torch = pytest.importorskip("torch", reason="torch is the oracle, and is not installed")
    model, run = shutil.copytree(turns[0], tmp_path / "model"), turns[1]
    if stored is not None:
        (model / "generation_config.json").write_text(json.dumps(stored))
    assert main(["merge", str(run), "--out", str(tmp_path / "merged"), "--model", str(model)]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    found = merged.generation_config
    assert set(found.eos_token_id) == {2, end} | ({3} if stored and "max_length" in stored else set())
    assert found.bos_token_id == (None if stored else 1) and bool(found.do_sample) == ("do_sample" in (stored or {}))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "where is my courier"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        new = merged.generate(ids, do_sample=False, max_new_tokens=10, pad_token_id=0)[0, ids.shape[1] :]
    assert tokenizer.decode(new).split() == ["ask", "parcel", "<end_of_turn>"]


@pytest.mark.parametrize("chat", [False, True])
def test_stop_tokens_are_those_of_all_places(turns, tmp_path, chat):
    folder = shutil.copytree(turns[0], tmp_path / "model")
    token = load_model(folder, abstract=True).tokenizer.convert_tokens_to_ids("<end_of_turn>")
    for stored, expected in (([5, 7], {2, 5, 7}), (6, {2, 6}), ([10**6], {2}), (None, {2})):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stored}))
        loaded = load_model(folder, abstract=True)
        assert set(stop_tokens(loaded, chat=chat)) == expected | ({token} if chat else set())


def test_an_instruction_run_reports_its_format_before_training(tmp_path, capsys):
    assert describe_format(letters(template=CHATML)) is None
    assert describe_format(letters(template="{{ raise_exception('never') }}")) is None
    assert describe_format(letters()) == (
        "The tokenizer has no chat template: a chat is written as its question, a line break, its answer and '</s>'."
    )
    model = tiny_job.make_llama(tmp_path / "model")
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    toml = tiny_job.make_other_job(tmp_path / "job", model, "instruction")
    assert main(["train", str(toml), "--optimisation.steps", "1"]) == 0
    written = " ".join(capsys.readouterr().out.split())
    note = describe_format(load_model(model, abstract=True).tokenizer)
    assert note.startswith("Warning: the chat template writes no token that ends an answer")
    assert note.endswith("Let the template write '</s>' after each answer.")
    assert 0 < written.index(note) < written.index("A step takes")
