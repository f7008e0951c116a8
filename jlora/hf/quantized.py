"""Checkpoints whose weights are quantized: how they are recognized, and what is said of them."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# Tensors that quantization adds beside a weight, or puts in its place, by the end of their names.
PARTS = re.compile(
    r".*\.(qweight|qzeros|scales|g_idx|SCB|weight_format|weight_packed|weight_shape|weight_scale(_inv|_2)?"
    r"|weight_zero_point|input_scale|(weight\.)?(absmax|quant_map|nested_\w+|quant_state\.\w+|_data|_scale|SCB))"
)
DTYPES = ("I8", "U8", "I32", "F8_E4M3", "F8_E5M2", "F4")
# Where the tools write what they did: in config.json, or in a separate file.
FILES = ("config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json")
GUESSES = (
    ("quant_state.bitsandbytes", "bitsandbytes"),
    (".SCB", "bitsandbytes"),
    (".qweight", "GPTQ or AWQ"),
    (".weight_packed", "compressed-tensors"),
)


def find_quantization(folder: Path, tensors: Mapping[str, str]) -> str | None:
    """The method that a checkpoint's weights are quantized by, with its bits; None for plain weights.

    Args:
        folder: of the checkpoint.
        tensors: the dtype of every tensor by its name, as safetensors has them.
    """
    # A bias is never quantized: one of a wrong dtype is a misfit, which is reported with all others.
    narrow = [name for name, dtype in tensors.items() if dtype in DTYPES and not name.endswith("bias")]
    parts = [*narrow, *filter(PARTS.fullmatch, tensors)]
    if not parts:
        return None
    found = next(filter(None, (read_method(folder / name) for name in FILES)), None)
    return found or guess_method(parts, {tensors[name] for name in parts})


def read_method(file: Path) -> str | None:
    """The method that a config names, None where it names none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    nested = content.get("quantization_config") or content.get("quantization") or content.get("compression_config")
    config = nested if isinstance(nested, dict) else {} if file.name == "config.json" else content
    method = config.get("quant_method") or config.get("quant_algo")
    if method is None and file.name in ("quantize_config.json", "quant_config.json"):
        method = "GPTQ" if file.name == "quantize_config.json" else "AWQ"
    bits = read_bits(config)
    return None if method is None else f"{method}" + (f" ({bits} bits)" if bits else "")


def read_bits(config: Mapping[str, Any]) -> int | None:
    bits = config.get("bits") or config.get("w_bit")
    if config.get("load_in_4bit") or config.get("_load_in_4bit"):
        bits = 4
    elif config.get("load_in_8bit") or config.get("_load_in_8bit"):
        bits = 8
    return bits if isinstance(bits, int) else None


def guess_method(parts: Iterable[str], dtypes: set[str]) -> str:
    """What the names of the tensors say, where no config does."""
    parts = list(parts)
    named = (method for sign, method in GUESSES if any(sign in name for name in parts))
    return next(named, "fp8" if any(dtype.startswith("F8") for dtype in dtypes) else "an unknown method")
