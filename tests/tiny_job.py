"""Whole training jobs in small: random models, their tokenizers and some data, all made on the spot."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel, WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from jlora.hf.families import FAMILIES, weights
from jlora.hf.load import load_model

TOPICS = {
    "delivery": ["parcel", "courier", "shipping", "delivered"],
    "refund": ["money", "refund", "repaid", "reimbursed"],
    "account": ["password", "login", "account", "email"],
}
FRAMES = {
    "train": ["{}", "where is my {}", "{} please", "i have a question about {}", "tell me about the {}", "{} {}"],
    "validation": ["why no {}", "help with the {} please"],
    "test": ["is there a {}", "problem with my {}"],
}
# The type that a word is of, wherever it stands: what the tags of token classification say.
KINDS = {"parcel": "GOODS", "courier": "PERSON", "money": "GOODS", "password": "SECRET", "email": "SECRET"}
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
LLAMA = {**SIZES, "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
CHAT = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} "
    "{% if message.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def questions(split: str) -> list[dict[str, str]]:
    return [
        {"text": frame.format(word, word), "label": label}
        for frame in FRAMES[split]
        for label, words in TOPICS.items()
        for word in words
    ]


def tagged(split: str) -> list[dict[str, list[str]]]:
    """Sentences whose every word of KINDS is an entity; a word said twice in a row is one of two words."""
    records = []
    for question in questions(split):
        tokens, tags = question["text"].split(), []
        for n, token in enumerate(tokens):
            again = n > 0 and tokens[n - 1] == token
            tags.append(f"{'I' if again else 'B'}-{KINDS[token]}" if token in KINDS else "O")
        records.append({"tokens": tokens, "tags": tags})
    return records


def chats(split: str) -> list[dict[str, str]]:
    return [{"question": record["text"], "answer": f"ask {record['label']}"} for record in questions(split)]


def write_lines(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def words() -> list[str]:
    return sorted({word for split in FRAMES for record in questions(split) for word in record["text"].split()})


def make_tokenizer(folder: Path) -> int:
    vocab = {token: n for n, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words()])}
    tokenizer = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, vocab[name]) for name in ("[CLS]", "[SEP]")]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)
    return len(vocab)


def make_chat_tokenizer(folder: Path) -> int:
    """As Llama's: a token that begins a text, one that ends it, none to fill up with, and a chat template."""
    special = ["<unk>", "<s>", "</s>", "<user>", "<assistant>"]
    vocab = {token: n for n, token in enumerate([*special, "ask", *words(), *TOPICS])}
    vocab = {token: n for n, token in enumerate(vocab)}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
    return len(vocab)


def make_model(folder: Path) -> Path:
    """A random BERT in Hugging Face form, its weights large enough for its hidden states to differ."""
    folder.mkdir(parents=True)
    size = make_tokenizer(folder)
    return write_model(folder, "bert", {"architectures": ["BertModel"], "vocab_size": size, **SIZES}, None)


def make_llama(folder: Path) -> Path:
    """A random Llama in Hugging Face form."""
    folder.mkdir(parents=True)
    size = make_chat_tokenizer(folder)
    special = {"bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu"}
    settings = {"architectures": ["LlamaForCausalLM"], "vocab_size": size, **special, **LLAMA}
    return write_model(folder, "llama", settings, "causal_lm")


def write_model(folder: Path, kind: str, settings: dict[str, Any], head: str | None) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **settings}))
    params = load_model(folder, abstract=True, head=head).params
    rng = np.random.default_rng(7)
    draw = {
        "kernel": lambda shape: rng.normal(0, 1.2 * shape[0] ** -0.5, shape),
        "embedding": lambda shape: rng.normal(0, 0.2, shape),
        "scale": np.ones,
        "bias": np.zeros,
    }
    flat = flatten_dict(params, sep="/")
    values = {path: draw[path.split("/")[-1]](leaf.shape).astype(np.float32) for path, leaf in flat.items()}
    # Words have to stand out from their places, or a few questions teach nothing.
    for path in ("embeddings/position_embeddings/embedding", "embeddings/token_type_embeddings/embedding"):
        if path in values:
            values[path] *= 0.1
    save_file(
        {
            weight.tensors[0]: np.ascontiguousarray(values[weight.path].T if weight.transpose else values[weight.path])
            for weight in weights(FAMILIES[kind], params)
        },
        folder / "model.safetensors",
    )
    return folder


def make_job(folder: Path, model: Path) -> Path:
    """The files of a job that classifies texts; gives the path of its TOML file."""
    folder.mkdir(parents=True)
    for split in FRAMES:
        write_lines(folder / f"{split}.jsonl", questions(split))
    answers = [{"label": label, "answer": f"All about {label}."} for label in TOPICS]
    write_lines(folder / "answers.jsonl", answers)
    (folder / "job.toml").write_text(f"""
[model]
name = "{model}"
pooling = "mean"

[data]
train = "train.jsonl"
validation = "validation.jsonl"
test = "test.jsonl"
answers = "answers.jsonl"
max_length = 32
questions = ["where is my courier"]

[adapter]
rank = 4
alpha = 8
dropout = 0.05

[optimisation]
learning_rate = 0.02
b_ratio = 1.0
head_ratio = 3.0
epochs = 5
batch_size = 8
clip = 1.0

[output]
folder = "run"
log_every = 2
""")
    return folder / "job.toml"


def make_other_job(folder: Path, model: Path, task: str) -> Path:
    """The files of a job of another task; gives the path of its TOML file."""
    folder.mkdir(parents=True)
    records = {"token_classification": tagged, "causal_lm": questions, "instruction": chats}[task]
    for split in ("train", "validation"):
        write_lines(folder / f"{split}.jsonl", records(split))
    question = "where is my courier" if task != "causal_lm" else "where is"
    (folder / "job.toml").write_text(f"""
[model]
name = "{model}"

[data]
task = "{task}"
train = "train.jsonl"
validation = "validation.jsonl"
max_length = 32
allow_overlap = true
questions = ["{question}"]

[adapter]
rank = 4

[optimisation]
learning_rate = 0.02
b_ratio = 1.0
epochs = 6
batch_size = 8
clip = 1.0

[output]
folder = "run"
log_every = 3
""")
    return folder / "job.toml"


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Compiles in less time to slower code: there are many programs here, and little to compute."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def change(toml: Path, old: str, new: str) -> None:
    """Writes something else into a file."""
    text = toml.read_text()
    assert old in text
    toml.write_text(text.replace(old, new))


def lines(run: Path) -> list[dict]:
    """What a run has written down of its steps and evaluations."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def hold_lock(file: Path) -> subprocess.Popen:
    """A process that has locked a file, until it is killed."""
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); "
    holder = subprocess.Popen([sys.executable, "-c", code + "time.sleep(600)", str(file)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    return holder


def environment(cache: Path, devices: int = 1, **more: str) -> dict[str, str]:
    """The variables of a process that compiles nothing twice."""
    flags = {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    return os.environ | flags | more


def start(*args: object, env: dict[str, str]) -> subprocess.Popen:
    """`jlora` in a process of its own."""
    command = [sys.executable, "-m", "jlora", *map(str, args)]
    # One pipe: a child that fills another that nobody reads would wait for ever.
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
