"""The two files of a PEFT folder, their digests, and what other folders are that are taken for one.

What jlora writes has two digests in the metadata of `adapter_model.safetensors`: of its tensors, and of the content of
`adapter_config.json`, where PEFT would warn of unknown keys. A folder without digests is read as it is.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save_file

from jlora.errors import JloraValueError
from jlora.hf.files import staged

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
TENSORS_DIGEST, CONFIG_DIGEST = "jlora_tensors_sha256", "jlora_config_sha256"
DTYPES = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16},
    **{"F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8},
    **{"U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_},
}
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def write_files(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes the config and the tensors with their digests, both or neither."""
    metadata = {"format": "pt"}
    metadata |= {
        TENSORS_DIGEST: digest_tensors(tensors, metadata),
        CONFIG_DIGEST: digest_config(config),
    }
    with staged(folder, last=CONFIG) as stage:
        save_file(dict(tensors), stage / TENSORS, metadata=metadata)
        (stage / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def digest_config(config: Mapping[str, Any]) -> str:
    """A digest of the content; spaces and the order of keys do not count."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def digest_tensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """A digest of all tensors with their names, and of the metadata beside the digests."""
    rest = {key: value for key, value in metadata.items() if key not in (TENSORS_DIGEST, CONFIG_DIGEST)}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name}\0{value.dtype}\0{value.shape}\0".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def read_config_file(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json.

    Raises:
        ValueError: it is missing, damaged or changed, or the folder is of another kind.
    """
    if advice := advise(folder):
        problem, fix = advice
        raise JloraValueError("load_peft", problem, [], fix)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"an object was expected, not a {type(config).__name__}")
    except FileNotFoundError:
        fix = "pass the folder that PEFT's save_pretrained or jlora.save_peft wrote."
        raise JloraValueError("load_peft", f"{str(folder)!r} has no {CONFIG}.", [], fix) from None
    except OSError as error:
        problem = f"{str(folder / CONFIG)!r} can't be read."
        raise JloraValueError("load_peft", problem, [str(error)], "make it readable.") from error
    except (ValueError, RecursionError) as error:
        problem = f"{str(folder / CONFIG)!r} is no JSON object."
        raise JloraValueError("load_peft", problem, [str(error)], "fetch the file again.") from error
    if digest_config(config) != read_digests(folder).get(CONFIG_DIGEST, digest_config(config)):
        raise changed_file(folder, CONFIG)
    return config


def read_digests(folder: Path) -> dict[str, str]:
    """The metadata of the tensors' file; empty where that is missing or damaged, which `read_tensors` reports."""
    try:
        with safe_open(folder / TENSORS, framework="np") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of the file; those of 8 bits become float32.

    Raises:
        ValueError: the file is missing, damaged or changed, or has a tensor of another dtype.
    """
    file = folder / TENSORS
    try:
        stored = deserialize(file.read_bytes())
    except FileNotFoundError:
        offenders, fix = [], "save the adapter again with PEFT's save_pretrained."
        if (folder / PICKLE).is_file():
            offenders = [f"{PICKLE}  (a pickle can run any code when it is read)"]
            fix = "convert it where you trust it: PeftModel.from_pretrained(base, FOLDER).save_pretrained(FOLDER)."
        raise JloraValueError("load_peft", f"{str(folder)!r} has no {TENSORS}.", offenders, fix) from None
    except (SafetensorError, OSError) as error:
        problem = f"{str(file)!r} is damaged."
        raise JloraValueError("load_peft", problem, [str(error)], "fetch the file again.") from error
    offenders = [f"{name!r} is stored as {value['dtype']}" for name, value in stored if value["dtype"] not in DTYPES]
    if offenders:
        problem = f"{str(file)!r} has tensors of a dtype that is not read."
        fix = f"save them as one of {', '.join(DTYPES)}."
        raise JloraValueError("load_peft", problem, offenders, fix)
    tensors = {
        name: np.frombuffer(value["data"], DTYPES[value["dtype"]]).reshape(value["shape"])
        for name, value in sorted(stored, key=lambda item: item[0])
    }
    metadata = read_digests(folder)
    digests = metadata.keys() & {TENSORS_DIGEST, CONFIG_DIGEST}
    # One digest without the other means that the name of one is damaged.
    if digests and (len(digests) == 1 or metadata[TENSORS_DIGEST] != digest_tensors(tensors, metadata)):
        raise changed_file(folder, TENSORS)
    return {name: widen(value) for name, value in tensors.items()}


def widen(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32) if value.dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2) else value


def changed_file(folder: Path, name: str) -> JloraValueError:
    """The error for a file that is not what its digest says."""
    fix = (
        "fetch the folder again. After an edit on purpose, drop the digests, here with F the path of "
        f"{TENSORS}: safetensors.numpy.save_file(safetensors.numpy.load_file(F), F, metadata={{'format': 'pt'}})."
    )
    return JloraValueError("load_peft", f"{str(folder / name)!r} was changed after jlora wrote it.", [], fix)


def advise(path: Path) -> tuple[str, str] | None:
    """What is wrong with a path that is no PEFT folder, and what to do; None where nothing is known of it."""
    name = path.as_posix()
    if not path.exists():
        if HUB_NAME.fullmatch(name):
            fix = f"download it first, and pass the folder that huggingface_hub.snapshot_download({name!r}) gives."
            return f"{name!r} is not a local folder.", fix
        return f"{name!r} does not exist.", "check the path."
    if path.suffix == ".gguf" or (path.is_dir() and lacks(path, CONFIG) and has(path, "*.gguf")):
        fix = "pass the PEFT folder that it was converted from: GGUF is not read."
        return f"{name!r} holds a GGUF file, the format of llama.cpp.", fix
    if not path.is_dir():
        return f"{name!r} is a file, not a folder.", f"pass its folder: {path.parent.as_posix()!r}."
    if has(path, "adapters.safetensors") and lacks(path, TENSORS, PICKLE):
        fix = "fuse it with its base by `mlx_lm.fuse --save-path OUT`, and pass OUT to load_model."
        return f"{name!r} holds an adapter of mlx-lm.", fix
    if has(path, CONFIG):
        return None
    if has(path, "adapter.json"):
        return f"{name!r} holds an adapter of jlora.save_adapter.", "read it with jlora.restore_adapter."
    if has(path, "adapter/adapter.json"):
        fix = "read its folder adapter/ with jlora.restore_adapter, or convert it: jlora export FOLDER --out OUT."
        return f"{name!r} holds a run of `jlora train`.", fix
    if has(path, "config.json") and lacks(path, TENSORS, PICKLE):
        return f"{name!r} holds a whole model, not an adapter.", "load it with jlora.load_model."
    return None


def has(folder: Path, pattern: str) -> bool:
    return next(folder.glob(pattern), None) is not None


def lacks(folder: Path, *names: str) -> bool:
    return not any((folder / name).exists() for name in names)


def is_number(value: Any, kinds: Any = (int, float)) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def is_positive(value: Any, kinds: Any) -> bool:
    return is_number(value, kinds) and 0 < value < float("inf")


def is_names(value: Any) -> bool:
    """Whether a value is a list of strings."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def misfit_fields(config: Mapping[str, Any]) -> Iterable[str]:
    """The fields whose values are of another kind than PEFT's."""
    # PEFT would take 8 for a rank or alpha that is missing.
    for name, kinds in (("r", int), ("lora_alpha", (int, float))):
        value = config.get(name)
        if not is_positive(value, kinds):
            yield f"{name} = {json.dumps(value)}, not a number" + (" above 0" if is_number(value) else "")
    for name, kinds in (("rank_pattern", int), ("alpha_pattern", (int, float))):
        value = config.get(name) or {}
        if not isinstance(value, dict) or not all(is_positive(n, kinds) for n in value.values()):
            yield f"{name} = {json.dumps(value)}, not numbers above 0 by pattern"
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(name)
        if value is not None and not isinstance(value, str) and not is_names(value):
            yield f"{name} = {json.dumps(value)}, not a pattern or a list of names"
    value = config.get("modules_to_save")
    if value is not None and not is_names(value):
        yield f"modules_to_save = {json.dumps(value)}, not a list of names"
    value = config.get("layers_to_transform")
    if value is not None and not is_number(value, int) and not all(is_number(n, int) for n in listed(value)):
        yield f"layers_to_transform = {json.dumps(value)}, not numbers of layers"
    value = config.get("trainable_token_indices")
    groups = list(value.values()) if isinstance(value, dict) else [value or []]
    if not all(isinstance(group, list) and all(is_number(n, int) and n >= 0 for n in group) for group in groups):
        yield f"trainable_token_indices = {json.dumps(value)}, not lists of token ids"


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [None]
