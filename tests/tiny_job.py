"""A whole training job in small: a random BERT, its tokenizer and some questions, all made on the spot."""

import json
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from jlora.interop.huggingface import FAMILIES, weights
from jlora.models.bert import Bert, BertConfig

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
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


def questions(split: str) -> list[dict[str, str]]:
    return [
        {"text": frame.format(word, word), "label": label}
        for frame in FRAMES[split]
        for label, words in TOPICS.items()
        for word in words
    ]


def write_lines(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def make_tokenizer(folder: Path) -> int:
    words = {word for split in FRAMES for record in questions(split) for word in record["text"].split()}
    vocab = {token: n for n, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words)])}
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


def make_model(folder: Path) -> Path:
    """A random BERT in Hugging Face form, its weights large enough for its hidden states to differ."""
    folder.mkdir(parents=True)
    config = BertConfig(vocab_size=make_tokenizer(folder), initializer_range=0.2, **SIZES)
    model = Bert(config)
    ids = np.ones((1, 4), np.int32)
    params = jax.jit(model.init)(jax.random.key(7), ids)["params"]
    flat = flatten_dict(params, sep="/")
    # Words have to stand out from their places, or a few questions teach nothing.
    flat["embeddings/position_embeddings/embedding"] *= 0.1
    flat["embeddings/token_type_embeddings/embedding"] *= 0.1
    tensors = {
        w.tensor: np.ascontiguousarray(w.turn(np.asarray(flat[w.path]))) for w in weights(FAMILIES["bert"], params)
    }
    save_file(tensors, folder / "model.safetensors")
    settings = {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": config.vocab_size, **SIZES}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def make_job(folder: Path, model: Path) -> Path:
    """The files of a job; gives the path of its TOML file."""
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
head_ratio = 3.0
epochs = 5
batch_size = 8
clip = 1.0

[output]
folder = "run"
log_every = 2
""")
    return folder / "job.toml"
