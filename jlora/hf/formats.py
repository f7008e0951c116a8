"""Checkpoints in another form than jlora reads: what they are, and what to do with each."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jlora.errors import JloraValueError, count
from jlora.hf.families import FAMILIES

SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
OTHER_MODEL = (
    "jlora.wrap, jlora.adapt and jlora.infer_layout take any parameter tree and any JAX function: adapt another "
    "implementation of this model, in JAX or in torch through torchax. jlora.save_peft(..., names=...) writes its "
    "adapter for PEFT."
)
TEXT_PART = """save its text part, a {text!r} model, as a folder of its own:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
    whole = AutoModelForImageTextToText.from_pretrained({folder!r})
    text = AutoModelForCausalLM.from_config(whole.config.text_config)
    text.model, text.lm_head = whole.model.language_model, whole.lm_head
    text.save_pretrained({out!r})
    AutoTokenizer.from_pretrained({folder!r}).save_pretrained({out!r})"""


class Format(NamedTuple):
    """A form of weights that jlora does not read.

    Attributes:
        patterns: globs of its files.
        description: what the files are.
        fix: what to do.
    """

    patterns: tuple[str, ...]
    description: str
    fix: str


FORMATS = (
    Format(
        ("adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors", "adapter_config.json"),
        "an adapter, not a model",
        "give the adapter's base as the model, and this folder as the adapter: --adapter FOLDER, or jlora.load_peft.",
    ),
    Format(
        ("adapter.json", "adapter/adapter.json"),
        "an adapter of jlora, not a model",
        "give the adapter's base as the model, and this folder as the adapter: --adapter FOLDER, or restore_adapter.",
    ),
    Format(
        ("*.gguf",),
        "GGUF, the quantized weights of llama.cpp",
        "fetch the original checkpoint in safetensors, or convert the file with transformers: "
        "AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE).save_pretrained(OUT).",
    ),
    Format(
        ("consolidated*.safetensors", "consolidated*.pth", "params.json"),
        "the model maker's own format, with other names of the tensors",
        "fetch the same model in Hugging Face form: config.json and model*.safetensors, most often in the same "
        "repository of the hub.",
    ),
    Format(
        ("*.bin", "*.pt", "*.pth", "*.ckpt"),
        "a pickle can run any code when it is read",
        "convert the weights to safetensors: save_pretrained does so in any recent transformers.",
    ),
    Format(
        ("*.msgpack", "*.h5", "*.onnx"),
        "weights for another library",
        "convert the weights to safetensors: save_pretrained does so in any recent transformers.",
    ),
)


def missing_weights(folder: Path) -> ValueError:
    """The error for a folder without safetensors that jlora reads."""
    default = "fetch the weights: model.safetensors, or all of its shards with their index."
    return _missing(folder, "model.safetensors", default)


def missing_config(folder: Path) -> ValueError:
    """The error for a folder without config.json."""
    return _missing(folder, "config.json", "give a folder in Hugging Face form.")


def _missing(folder: Path, file: str, fix: str) -> ValueError:
    offenders = []
    for kind in FORMATS:
        names = sorted({found.relative_to(folder).as_posix() for glob in kind.patterns for found in folder.glob(glob)})
        if names:
            offenders, fix = [f"{name}  ({kind.description})" for name in names], kind.fix
            break
    return JloraValueError("load_model", f"{str(folder)!r} has no {file}.", offenders, fix)


def not_a_folder(file: Path) -> ValueError:
    """The error for a file where a model's folder is expected."""
    kind = next((kind for kind in FORMATS if any(file.match(glob) for glob in kind.patterns)), None)
    offenders = [] if kind is None else [f"{file.name}  ({kind.description})"]
    fix = "name the folder that holds config.json and the weights." if kind is None else kind.fix
    return JloraValueError("load_model", f"{str(file)!r} is a file, not a model's folder.", offenders, fix)


def find_shards(folder: Path) -> list[str]:
    """The names of a folder's shards that no index lists; empty where there is none.

    Raises:
        ValueError: some are missing, or shards of two checkpoints lie together.
    """
    shards = {file.name: SHARD.fullmatch(file.name) for file in folder.glob("model-*.safetensors")}
    present = {name: (int(found[1]), int(found[2])) for name, found in shards.items() if found}
    totals = sorted({total for _, total in present.values()})
    if len(totals) > 1:
        problem = f"{str(folder)!r} holds shards of {count(len(totals), 'checkpoint')} and no index."
        raise JloraValueError("load_model", problem, sorted(present), "delete those of the other checkpoints.")
    expected = {f"model-{n:05}-of-{total:05}.safetensors" for total in totals for n in range(1, total + 1)}
    missing = sorted(expected - present.keys())
    if missing:
        problem = f"{count(len(missing), 'shard')} of {len(expected)} missing in {str(folder)!r}."
        raise JloraValueError("load_model", problem, missing, "fetch the folder again.")
    return sorted(present)


def unknown_model(folder: Path, content: Mapping[str, Any]) -> ValueError:
    """The error for a checkpoint of a model that jlora does not have.

    Args:
        folder: the checkpoint's folder.
        content: its config.json.
    """
    model_type, architectures = content.get("model_type"), content.get("architectures")
    if model_type is None:
        problem = f"config.json in {str(folder)!r} names no model_type."
        return JloraValueError("load_model", problem, [], "fetch config.json again, from the model's own source.")
    names = ", ".join(map(str, architectures)) if isinstance(architectures, list) else "not named"
    offenders = [f"model_type {model_type!r}, architectures: {names}", f"known: {', '.join(FAMILIES)}"]
    part = content.get("text_config")
    text = part.get("model_type") if isinstance(part, Mapping) else None
    out = str(folder.with_name(f"{folder.name}-text"))
    multimodal = isinstance(text, str) and text in FAMILIES
    fix = TEXT_PART.format(text=text, folder=str(folder), out=out) if multimodal else OTHER_MODEL
    return JloraValueError("load_model", f"unknown model_type in {str(folder)!r}.", offenders, fix)
