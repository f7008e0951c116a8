"""PEFT folders: what jlora writes PEFT opens on torch with the same logits, and what PEFT writes jlora reads."""

import copy
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import peft_oracle
import pytest
from flax import core
from peft_oracle import (
    MODELS,
    TIED,
    TOLERANCE,
    close,
    config_of,
    equal,
    fill,
    make,
    opened,
    peft,
    rewrite,
    run_adapted,
    run_jax,
    run_torch,
    torch,
    wrapped,
)
from safetensors.numpy import load_file

import jlora
from jlora.hf.load import load_model
from jlora.hf.modules import PeftModule
from jlora.hf.peft import load_peft, save_peft
from jlora.models.decoder import Decoder, DecoderConfig
from jlora.tree.paths import flatten, map_with_path

pytestmark = peft_oracle.WARNINGS
bases = peft_oracle.bases


@pytest.fixture(scope="module", params=["llama", "gpt2", "bert"])
def case(request, bases):
    """A torch model and its logits, the same on our side unrolled and scanned."""
    base, folder = bases(request.param)
    return request.param, base, run_torch(base), {scan: load_model(folder, scan=scan) for scan in (False, True)}


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_peft_opens_what_is_saved_with_the_same_logits_and_it_reads_back_to_the_bit(case, scan, tmp_path):
    name, base, before, loaded = case
    loaded = loaded[scan]
    train = ("classifier",) if name == "bert" else ("lm_head" if name == "llama" else "ln_f",)
    params = map_with_path(
        lambda path, leaf: leaf * 1.3 + 0.1 if path.split("/")[0] in train else leaf, wrapped(loaded)
    )
    save_peft(tmp_path, loaded.model, params, train=train, dropout=0.1)
    close(run_adapted(loaded.model, params), run_torch(opened(base, tmp_path)), before)
    equal(load_peft(tmp_path, loaded.model, loaded.params), params)

    config = config_of(tmp_path)
    assert config["fan_in_fan_out"] == (name == "gpt2")
    assert config["task_type"] == ("SEQ_CLS" if name == "bert" else "CAUSAL_LM")
    assert config["base_model_name_or_path"] == loaded.model.origin.name
    assert config["lora_dropout"] == 0.1 and config["inference_mode"] is True
    assert set(config["rank_pattern"].values()) | {config["r"]} == {2, 3, 4, 5}
    assert any(isinstance(value, float) for value in config["alpha_pattern"].values()), "sqrt(7) is kept exactly"
    # PEFT's own copy of the folder reads the same: names, shapes and numbers are as PEFT writes them.
    opened(base, tmp_path).save_pretrained(tmp_path / "again")
    equal(load_peft(tmp_path / "again", loaded.model, loaded.params), params)


def test_the_form_for_vllm_has_one_rank_and_scaling_one_and_the_same_logits(case, tmp_path):
    _, base, before, loaded = case
    loaded = loaded[True]
    params = wrapped(loaded, table=False)
    save_peft(tmp_path, loaded.model, params, target="vllm")
    close(run_jax(loaded.model, params), run_torch(opened(base, tmp_path)), before)
    config = config_of(tmp_path)
    assert config["r"] == config["lora_alpha"] == 5
    assert config["rank_pattern"] == config["alpha_pattern"] == {} and config["modules_to_save"] is None
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {5} == {value.shape[0] if "lora_A" in name else value.shape[1] for name, value in tensors.items()}


PEFTS = {
    "llama": {
        "target_modules": ["q_proj", "v_proj", "down_proj", "embed_tokens"],
        "rank_pattern": {"down_proj": 6, r"layers\.1\..*q_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 5, "q_proj": 11},
        "modules_to_save": ["norm", "lm_head"],
    },
    "gpt2": {
        "target_modules": ["c_attn", "mlp.c_proj"],
        "rank_pattern": {r"h\.1\.attn\.c_attn": 6},
        "modules_to_save": ["wpe"],
        "fan_in_fan_out": True,
    },
    "bert": {
        "target_modules": r".*(query|intermediate\.dense|word_embeddings)",
        "alpha_pattern": {"query": 9},
        "task_type": "SEQ_CLS",
        "bias": "lora_only",
    },
}


@pytest.mark.parametrize("rslora", [False, True], ids=["alpha over rank", "rslora"])
def test_what_peft_saves_has_the_same_logits_here(case, rslora, tmp_path):
    name, base, before, loaded = case
    config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, init_lora_weights=False, **PEFTS[name])
    torch.manual_seed(1)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for path, value in model.named_parameters():
            if "lora_" in path:
                value.normal_(std=0.15)
            elif value.requires_grad:
                value.add_(0.3 * torch.randn_like(value))
    model.save_pretrained(tmp_path, save_embedding_layers=not rslora)
    theirs = run_torch(model)
    for scan in (False, True):
        params = load_peft(tmp_path, loaded[scan].model, loaded[scan].params)
        close(run_jax(loaded[scan].model, params), theirs, before)
    scalings = {
        round(float(s), 4) for path, leaf in flatten(params).items() if "scaling" in path for s in np.ravel(leaf)
    }
    one = (lambda alpha, r: round(alpha / math.sqrt(r), 4)) if rslora else (lambda alpha, r: round(alpha / r, 4))
    # Layers that the adapter leaves out borrow the scaling of another.
    assert (
        scalings
        == {
            "llama": {one(11, 4), one(11, 2), one(6, 6), one(5, 4), one(6, 4)},
            "gpt2": {one(6, 4), one(6, 6)},
            "bert": {one(9, 4), one(6, 4)},
        }[name]
    )


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("llama", "gpt2", "bert")])
def test_the_other_families_and_heads_open_in_peft_too(name, bases, tmp_path):
    base, folder = bases(name)
    loaded = load_model(folder, scan=True)
    params = wrapped(loaded)
    save_peft(tmp_path, loaded.model, params)
    model = opened(base, tmp_path)
    close(run_jax(loaded.model, params), run_torch(model), run_torch(base))
    model.save_pretrained(tmp_path / "again")
    equal(load_peft(tmp_path / "again", loaded.model, loaded.params), params)


def test_a_table_that_is_the_head_too_changes_both_in_peft(bases, tmp_path):
    base, folder = bases("qwen3 tied")
    loaded = load_model(folder)
    params = wrapped(loaded, table=False)
    params["embed_tokens"] = {"embedding": params["embed_tokens"]["embedding"] * 1.2 + 0.1}
    save_peft(tmp_path, loaded.model, params, train=["embed_tokens"])
    close(run_jax(loaded.model, params), run_torch(opened(base, tmp_path)), run_torch(base))
    equal(load_peft(tmp_path, loaded.model, loaded.params), params)

    for change in ({"target_modules": ["embed_tokens", "q_proj"]}, {"modules_to_save": ["lm_head"]}):
        config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"]} | change)
        model = peft.get_peft_model(copy.deepcopy(base), config)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.1 * value.requires_grad)
        model.save_pretrained(tmp_path / "apart", save_embedding_layers=False)
        with pytest.raises(ValueError, match=r"'lm_head.weight' and 'model.embed_tokens.weight' are one in the model"):
            load_peft(tmp_path / "apart", loaded.model, loaded.params)


def tied_parts(name):
    """The input embedding, the output head, and another module of a tied model."""
    others = {"gpt2": ("wte", "lm_head", "c_fc"), "bert masked": ("word_embeddings", "decoder", "query")}
    return others.get(name, ("embed_tokens", "lm_head", "q_proj"))


def tied_forms(name):
    """What an adapter can change of a tied model, as LoraConfig says it."""
    table, head, other = tied_parts(name)
    forms = {"the table": [table], "the head": [head], "both": [table, head]}
    forms = {form: {"target_modules": [other, *names]} for form, names in forms.items()} | {
        f"{form} in full": {"target_modules": [other], "modules_to_save": names} for form, names in forms.items()
    }
    # PEFT matches a regular expression with the bare name embed_tokens to find out whether to tie.
    forms["an expression"] = {"target_modules": rf"(.*\.)?({table}|{other}|embed_tokens)"}
    forms["another expression"] = {"target_modules": rf".*\.({table}|{other})"}
    return forms


def train_in_peft(base, folder, **config):
    """A PEFT adapter with random values in a folder, and the model that has it."""
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, init_lora_weights=False, **config)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for path, value in model.named_parameters():
            if "lora_" in path:
                value.normal_(std=0.15)
            elif value.requires_grad:
                value.add_(0.3 * torch.randn_like(value))
    model.save_pretrained(folder)
    return model


def full_leaves(before, after):
    before = flatten(before)
    return [path for path, leaf in flatten(after).items() if path in before and not np.array_equal(leaf, before[path])]


@pytest.mark.parametrize("follow", [False, True], ids=["apart", "ensure_weight_tying"])
@pytest.mark.parametrize("name", TIED)
def test_every_adapter_of_a_tied_model_has_pefts_logits(name, follow, bases, tmp_path):
    base, folder = bases(name)
    before, tied, loaded = run_torch(base), load_model(folder), load_model(folder, untie=True)
    forms = tied_forms(name)
    if name not in ("llama tied", "gpt2", "bert masked"):
        forms = {form: forms[form] for form in ("the table", "the head in full")}
    alike = set()
    for form, config in forms.items():
        out = tmp_path / form
        model = train_in_peft(base, out, ensure_weight_tying=follow, fan_in_fan_out=name == "gpt2", **config)
        expected = run_torch(model)
        params = load_peft(out, loaded.model, loaded.params)
        close(run_jax(loaded.model, params), expected, before)
        # What is read is written again for the tied base.
        save_peft(tmp_path / "again", loaded.model, params, train=full_leaves(loaded.params, params))
        close(run_torch(opened(base, tmp_path / "again")), expected)
        try:
            params = load_peft(out, tied.model, tied.params)
        except ValueError as error:
            assert "are one in the model, but the adapter changes them apart" in str(error)
            assert "Fix: load the base with load_model(..., untie=True), or with --untie" in str(error)
        else:
            close(run_jax(tied.model, params), expected, before)
            alike.add(form)
    if not follow or name == "bert masked":
        assert alike == set()
    elif name == "gpt2":
        assert alike == {"the head", "both", "the head in full", "both in full", "an expression"}
    else:
        assert alike == forms.keys() - {"another expression"}


@pytest.mark.parametrize("name", ["llama tied", "gpt2", "bert masked"])
def test_an_untied_copy_of_a_tied_base_ignores_the_flag_as_peft_does(name, tmp_path):
    base = make(name)
    head = base.get_output_embeddings()
    for kind, value in list(head.named_parameters()):
        setattr(head, kind, torch.nn.Parameter(value.detach().clone()))
    base.config.tie_word_embeddings = False
    base.save_pretrained(tmp_path / "base")
    loaded = load_model(tmp_path / "base")
    for form in ("the table", "the head in full"):
        out = tmp_path / form
        model = train_in_peft(
            base, out, ensure_weight_tying=True, fan_in_fan_out=name == "gpt2", **tied_forms(name)[form]
        )
        params = load_peft(out, loaded.model, loaded.params)
        close(run_jax(loaded.model, params), run_torch(model), run_torch(base))


@pytest.mark.parametrize("name", ["llama", "qwen3 tied", "bert masked"])
def test_an_adapter_over_a_vocabulary_padded_to_a_multiple_fits_a_base_resized_so(name, bases, tmp_path):
    base, folder = bases(name)
    grown = copy.deepcopy(base)
    grown.name_or_path = str(folder)
    grown.resize_token_embeddings(pad_to_multiple_of=32)
    other = tied_parts(name)[2]
    with pytest.warns(UserWarning, match="the embedding layer has been resized"):
        model = train_in_peft(grown, tmp_path, target_modules=[other])
    loaded = load_model(folder, vocab_size=64)
    params = load_peft(tmp_path, loaded.model, loaded.params)
    close(run_jax(loaded.model, params), run_torch(model))


@pytest.mark.parametrize("untie", [False, True], ids=["tied", "untied"])
def test_the_rows_of_a_resized_base_go_along_with_the_adapter(untie, bases, tmp_path):
    base, folder = bases("llama tied")
    loaded = load_model(folder, vocab_size=64, untie=untie)
    params = fill(jlora.wrap(loaded.params, rank=2, targets=["q_proj", "embed_tokens"]))
    save_peft(tmp_path, loaded.model, params)
    grown = copy.deepcopy(base)
    # Its new rows are random, and the file's take their place.
    grown.resize_token_embeddings(64, mean_resizing=False)
    close(run_jax(loaded.model, params), run_torch(opened(grown, tmp_path)))
    equal(load_peft(tmp_path, loaded.model, loaded.params), params)


def test_values_that_one_tied_tensor_can_not_hold_are_refused(bases, tmp_path):
    loaded = load_model(bases("llama tied")[1], untie=True)
    params = fill(jlora.wrap(loaded.params, rank=2, targets=["q_proj", "embed_tokens"]))
    params["embed_tokens"] |= {"embedding": params["embed_tokens"]["embedding"] + 0.1}
    with pytest.raises(ValueError, match="for PEFT the base ties them, and keeps one of the two"):
        save_peft(tmp_path / "out", loaded.model, params)
    assert not (tmp_path / "out").exists()


def test_a_tied_heads_adapter_that_the_file_lacks_is_that_of_its_table(bases, tmp_path):
    base, folder = bases("llama tied")
    model = train_in_peft(base, tmp_path, target_modules=["embed_tokens"], ensure_weight_tying=True)
    rewrite(tmp_path, lambda tensors: {key: value for key, value in tensors.items() if "lm_head" not in key})
    with pytest.warns(UserWarning, match="missing adapter keys"):
        close(run_torch(opened(base, tmp_path)), run_torch(model), run_torch(base))
    for untie in (False, True):
        loaded = load_model(folder, untie=untie)
        close(run_jax(loaded.model, load_peft(tmp_path, loaded.model, loaded.params)), run_torch(model))


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_layers_without_an_adapter_stay_without_one_in_the_file(bases, scan, tmp_path):
    base, folder = bases("llama")
    loaded = load_model(folder, scan=scan)
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], layers_to_transform=[1], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    model.save_pretrained(tmp_path)
    params = load_peft(tmp_path, loaded.model, loaded.params)
    close(run_jax(loaded.model, params), run_torch(model), run_torch(base))
    save_peft(tmp_path / "again", loaded.model, params)
    first, again = (load_file(path / "adapter_model.safetensors") for path in (tmp_path, tmp_path / "again"))
    assert first.keys() == again.keys() and all(np.array_equal(first[key], again[key]) for key in first)
    assert config_of(tmp_path / "again")["target_modules"] == ["model.layers.1.self_attn.q_proj"]


def test_patterns_reach_their_own_module_alone(tmp_path):
    rng = np.random.default_rng(0)
    paths = [*(f"layers_{n}/proj" for n in (1, 11, 21)), "proj", "other_proj"]
    params = {path: {"kernel": jnp.asarray(rng.normal(size=(6, 6)), jnp.float32)} for path in paths}
    params = {"layers_1": {"proj": params[paths[0]]}, "layers_11": {"proj": params[paths[1]]}} | {
        "layers_21": {"proj": params[paths[2]]},
        "proj": params["proj"],
        "other_proj": params["other_proj"],
    }
    ranks = {"layers_1/proj/kernel": 2, "layers_11/proj/kernel": 3, "proj/kernel": 4, "layers_21/proj/kernel": 3}
    names = {path: path.replace("layers_", "layers.").replace("/kernel", "").replace("/", ".") for path in ranks}
    names["other_proj/kernel"] = "other_proj"
    save_peft(tmp_path, None, fill(jlora.wrap(params, targets=ranks)), names=names)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    utils = pytest.importorskip("peft.utils.other")
    tuners = pytest.importorskip("peft.tuners.tuners_utils")
    for path, name in names.items():
        key = utils.get_pattern_key(config.rank_pattern, name)
        assert bool(tuners.check_target_module_exists(config, name)) == (path in ranks)
        assert path not in ranks or config.rank_pattern.get(key, config.r) == ranks[path]


class Net(torch.nn.Module):
    """One of each kind of module."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(11, 8)
        self.q, self.k, self.v = torch.nn.Linear(8, 8), torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)
        self.heads = torch.nn.Linear(16, 6)
        self.back = torch.nn.Linear(6, 7, bias=False)
        self.up = torch.nn.ModuleList(torch.nn.Linear(7, 7) for _ in range(3))
        self.turned = torch.nn.Linear(7, 5, bias=False)
        self.conv = torch.nn.Conv2d(3, 5, (3, 2))
        self.head = torch.nn.Linear(5, 3)

    def forward(self, ids, image):
        x = self.table(ids)
        x = self.back(self.heads(torch.tanh(torch.cat([self.q(x), self.k(x), self.v(x)], -1))))
        for layer in self.up:
            x = torch.tanh(layer(x))
        return self.head(self.turned(x) + self.conv(image).mean((2, 3)))


NAMES = {
    "table/embedding": "table",
    "qkv/kernel": ("q", PeftModule("k"), "v"),
    "heads/kernel": "heads",
    "back/kernel": "back",
    "up/kernel": "up.{}",
    "turned/w": "turned",
    "conv/kernel": PeftModule("conv", kind="conv"),
    "head/kernel": "head",
}
NAMES["qkv/kernel"] = tuple(PeftModule(name, width=width) for name, width in (("q", 8), ("k", 4), ("v", 4)))
INPUTS = (np.random.default_rng(3).integers(0, 11, 6), np.random.default_rng(4).normal(size=(6, 3, 5, 4)).astype("f"))


def net(params, ids, image):
    """The same in JAX: q, k and v fused, heads kept apart, the layers stacked, one kernel in torch's order."""
    x = params["table"]["embedding"][ids]
    x = jnp.tanh(x @ params["qkv"]["kernel"] + params["qkv"]["bias"])
    x = jnp.einsum("nd,dhk->nhk", x, params["heads"]["kernel"]) + params["heads"]["bias"]
    x = jnp.einsum("nhk,hko->no", x, params["back"]["kernel"])

    def layer(x, each):
        return jnp.tanh(x @ each["kernel"] + each["bias"]), None

    x, _ = jax.lax.scan(layer, x, params["up"])
    x = jnp.einsum("ni,oi->no", x, params["turned"]["w"])
    dims = ("NCHW", "HWIO", "NCHW")
    image = jax.lax.conv_general_dilated(image, params["conv"]["kernel"], (1, 1), "VALID", dimension_numbers=dims)
    x = x + (image + params["conv"]["bias"][:, None, None]).mean((2, 3))
    return x @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.fixture(scope="module")
def own():
    """The torch net, its parameters as a tree, and their layout."""
    torch.manual_seed(0)
    module = Net().eval()
    value = {name: tensor.detach().numpy().copy() for name, tensor in module.named_parameters()}
    join = lambda names, kind, axis: np.concatenate([value[f"{n}.{kind}"] for n in names], axis)
    stack = lambda kind: np.stack([value[f"up.{n}.{kind}"] for n in range(3)])
    params = {
        "table": {"embedding": value["table.weight"]},
        "qkv": {"kernel": join("qkv", "weight", 0).T, "bias": join("qkv", "bias", 0)},
        "heads": {"kernel": value["heads.weight"].T.reshape(16, 2, 3), "bias": value["heads.bias"].reshape(2, 3)},
        "back": {"kernel": value["back.weight"].T.reshape(2, 3, 7)},
        "up": {"kernel": stack("weight").swapaxes(1, 2), "bias": stack("bias")},
        "turned": {"w": value["turned.weight"]},
        "conv": {"kernel": value["conv.weight"].transpose(2, 3, 1, 0), "bias": value["conv.bias"]},
        "head": {"kernel": value["head.weight"].T, "bias": value["head.bias"]},
    }
    params = jax.tree.map(jnp.asarray, params)
    layout = jlora.infer_layout(net, params, *INPUTS)
    assert layout["turned/w"] == "oi" and layout["heads/kernel"] == "ioo" and layout["up/kernel"] == "sio"
    np.testing.assert_allclose(net(params, *INPUTS), run_net(module), atol=1e-5)
    return module, params, layout


def run_net(module):
    with torch.no_grad():
        return module(*map(torch.tensor, INPUTS)).numpy()


def run_own(params):
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(jlora.adapt(net))(params, *INPUTS))


def test_a_tree_of_the_users_opens_in_peft_by_its_names(own, tmp_path):
    module, params, layout = own
    targets = {r"(?!head/|table/).*/(kernel|w)": jlora.Rule(rank=3, alpha=4), "table/embedding": 2, "qkv/kernel": 4}
    tree = fill(jlora.wrap(params, targets=targets, layout=layout), scale=0.5)
    tree["head"] = {name: leaf * 1.5 + 0.2 for name, leaf in tree["head"].items()}
    save_peft(tmp_path, None, tree, names=NAMES, train=["head"], base_model="own/net")
    model = opened(module, tmp_path)
    np.testing.assert_allclose(run_own(tree), run_net(model), atol=TOLERANCE, rtol=0)
    assert np.abs(run_net(model) - run_net(module)).max() > 0.3
    equal(load_peft(tmp_path, None, params, names=NAMES, layout=layout), tree)
    assert config_of(tmp_path)["base_model_name_or_path"] == "own/net" and config_of(tmp_path)["task_type"] is None
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    shared = [tensors[f"base_model.model.{name}.lora_A.weight"] for name in "qkv"]
    assert all(np.array_equal(shared[0], a) for a in shared)
    assert tensors["base_model.model.conv.lora_A.weight"].shape == (3, 3, 3, 2)


def test_leaves_trained_in_full_become_modules_to_save_whatever_their_form(own, tmp_path):
    module, params, layout = own
    full = [name for name in params if name != "turned"]
    tree = fill(jlora.wrap(core.freeze(params), rank=2, targets=["turned"], layout=layout))
    moved = lambda path, leaf: leaf if path.startswith("turned") else leaf * 0.8 + 0.05
    tree = map_with_path(moved, tree)
    save_peft(tmp_path, None, tree, names=NAMES, layout=layout, train=full)
    np.testing.assert_allclose(run_own(tree), run_net(opened(module, tmp_path)), atol=TOLERANCE, rtol=0)
    again = load_peft(tmp_path, None, core.freeze(params), names=NAMES, layout=layout)
    assert isinstance(again, core.FrozenDict)
    equal(again, tree)
    with pytest.raises(ValueError, match=r"'heads/kernel' \[16, 2, 3\]: its layout can't be told, pass layout="):
        save_peft(tmp_path, None, tree, names=NAMES, train=full)
    with pytest.raises(ValueError, match=r"'back' would be saved in full too, because its name ends with 'k'"):
        save_peft(tmp_path, None, tree, names=NAMES, layout=layout, train=["qkv"])


@pytest.mark.parametrize("alphas", [{}, {"k": 7}], ids=["one scaling", "scalings that differ"])
def test_peft_adapters_of_parts_become_one_of_the_fused_kernel(own, alphas, tmp_path):
    module, params, layout = own
    targets = ["q", "k", "v", "heads", "back", "up.0", "up.2", "turned", "conv", "table"]
    ranks = {"k": 2, r"up\.2": 5}
    config = peft.LoraConfig(r=3, lora_alpha=4, target_modules=targets, rank_pattern=ranks, alpha_pattern=alphas)
    config.init_lora_weights = False
    model = peft.get_peft_model(copy.deepcopy(module), config).eval()
    model.save_pretrained(tmp_path)
    tree = load_peft(tmp_path, None, params, names=lambda path: NAMES.get(path), layout=layout)
    np.testing.assert_allclose(run_own(tree), run_net(model), atol=TOLERANCE, rtol=0)
    assert np.abs(run_net(model) - run_net(module)).max() > 0.05
    assert tree["qkv"]["kernel_lora_a"].shape == (8, 3 + 2 + 3)
    assert tree["up"]["kernel_lora_a"].shape == (3, 7, 5) and not tree["up"]["kernel_lora_a"][1].any()


def test_bfloat16_adapters_are_kept_in_the_file_and_widened_in_the_tree(bases, tmp_path):
    base, folder = bases("llama")
    loaded = load_model(folder, dtype=jnp.bfloat16)
    params = wrapped(loaded, table=False)
    assert params["layers_0"]["mlp"]["up_proj"]["kernel_lora_a"].dtype == jnp.float32
    narrow = map_with_path(
        lambda path, leaf: leaf.astype(jnp.bfloat16) if path.endswith(("_a", "_b")) else leaf, params
    )
    save_peft(tmp_path, loaded.model, narrow, train=["lm_head"])
    assert {value.dtype.name for value in load_file(tmp_path / "adapter_model.safetensors").values()} == {"bfloat16"}
    again = load_peft(tmp_path, loaded.model, loaded.params)
    equal(again, jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), narrow, params))
    assert again["lm_head"]["kernel"].dtype == jnp.bfloat16
    opened(base, tmp_path)


def test_keys_that_hold_the_adapters_name_are_read(bases, tmp_path):
    _, folder = bases("bert")
    loaded = load_model(folder)
    params = wrapped(loaded)
    save_peft(tmp_path, loaded.model, params)

    def spelled(tensors):
        named = {re.sub(r"(lora_(embedding_)?[AB])", r"\1.default", key): value for key, value in tensors.items()}
        return {key.replace("classifier.", "classifier.modules_to_save.default."): v for key, v in named.items()}

    rewrite(tmp_path, spelled)
    equal(load_peft(tmp_path, loaded.model, loaded.params), params)


@pytest.fixture
def saved(bases, tmp_path):
    """A Llama and a folder with an adapter for it."""
    _, folder = bases("llama")
    loaded = load_model(folder)
    params = jlora.wrap(loaded.params, rank=2, targets=["q_proj", "embed_tokens"])
    save_peft(tmp_path / "adapter", loaded.model, fill(params))
    return loaded, tmp_path / "adapter"


def test_an_adapter_that_does_not_fit_is_refused_with_every_reason(saved):
    loaded, folder = saved
    prefix = "base_model.model.model."

    def spoil(tensors):
        first, second = (f"{prefix}layers.{n}.self_attn.q_proj.lora_" for n in (0, 1))
        tensors[f"{first}A.weight"] = tensors[f"{first}A.weight"][:, :-1].copy()
        del tensors[f"{second}B.weight"]
        tensors[f"{prefix}layers.7.self_attn.q_proj.lora_A.weight"] = np.zeros((2, 32), np.float32)
        tensors[f"{prefix}embed_tokens.lora_embedding_A"] = np.zeros((2, 61), np.float32)
        tensors[f"{prefix}layers.0.self_attn.q_proj.lora_magnitude_vector"] = np.zeros(32, np.float32)
        tensors[f"{prefix}norm.weight"] = np.zeros(33, np.float32)
        tensors[f"{prefix}layers.0.mlp.up_proj.lora_A.weight"] = np.zeros((2, 32), np.int8)
        return tensors

    rewrite(folder, spoil, modules_to_save=["lm_head"], target_modules=["q_proj", "embed_tokens", "k_proj"])
    with pytest.raises(ValueError) as error:
        load_peft(folder, loaded.model, loaded.params)
    text = str(error.value)
    assert text.startswith(f"load_peft: the adapter in {str(folder)!r} does not fit the model.\n")
    for reason in (
        "'model.layers.0.self_attn.q_proj' has lora_A (2, 31), the model and rank 2 ask for (2, 32)",
        "'model.layers.1.self_attn.q_proj' lacks its lora_B",
        "'model.layers.7.self_attn.q_proj' is no module of the model",
        "'model.embed_tokens' has lora_embedding_A (2, 61), the model and rank 2 ask for (2, 60)",
        "'model.layers.0.self_attn.q_proj.lora_magnitude_vector' is not used by the model",
        "'model.norm.weight' has shape (33,), the model (32,)",
        "up_proj.lora_A.weight' is stored as int8, not as floats",
        "'lm_head.weight' is missing, its module is one of modules_to_save",
        "'model.layers.0.self_attn.k_proj' is one of target_modules, but has no lora_A and lora_B",
    ):
        assert reason in text, reason
    assert not any(path.endswith("_lora_a") for path in flatten(loaded.params))


def test_an_adapter_for_another_architecture_is_refused(saved, bases):
    _, folder = saved
    other = load_model(bases("gpt2")[1])
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.q_proj' is no module of the model"):
        load_peft(folder, other.model, other.params)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True, "target_parameters": ["w"]}, r"target_parameters = \[\"w\"\]\n  use_dora = true"),
        ({"peft_type": "IA3"}, r'peft_type = "IA3", known: LORA'),
        (
            {"init_lora_weights": "pissa_niter_4"},
            r"init_lora_weights = 'pissa_niter_4', which changed the base: save it from PEFT with",
        ),
        ({"lora_alpha": None}, r"lora_alpha = null, not a number"),
    ],
)
def test_a_config_that_asks_for_something_else_is_refused(saved, config, reason):
    loaded, folder = saved
    rewrite(folder, **config)
    with pytest.raises(
        ValueError, match=r"adapter_config.json' asks for what is not computed here\.\n(.*\n)*  " + reason
    ):
        load_peft(folder, loaded.model, loaded.params)


def test_missing_damaged_and_pickled_files_are_refused(saved):
    loaded, folder = saved
    weights = folder / "adapter_model.safetensors"
    with pytest.raises(ValueError, match=r"^load_peft: params is already wrapped"):
        load_peft(folder, loaded.model, load_peft(folder, loaded.model, loaded.params))
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors' is damaged"):
        load_peft(folder, loaded.model, loaded.params)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(
        ValueError, match=r"has no adapter_model.safetensors\.\n  adapter_model.bin  \(a pickle can run"
    ):
        load_peft(folder, loaded.model, loaded.params)
    (folder / "adapter_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="is no JSON object"):
        load_peft(folder, loaded.model, loaded.params)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no adapter_config.json"):
        load_peft(folder, loaded.model, loaded.params)


def test_what_vllm_does_not_take_is_refused_with_every_reason(bases, tmp_path):
    loaded = load_model(bases("llama")[1])
    params = jlora.wrap(loaded.params, rank=2, targets=["q_proj", "embed_tokens", "lm_head"])
    with pytest.raises(ValueError) as error:
        save_peft(tmp_path / "out", loaded.model, fill(params), target="vllm", train=["norm"], dropout=1.5)
    text = str(error.value)
    assert text.startswith("save_peft: this can't become an adapter for vLLM.\n")
    assert "'model.norm' is trained in full, and vLLM takes no modules_to_save" in text
    assert "'model.embed_tokens' is an adapted embedding" in text and "'lm_head' is an adapted output head" in text
    assert "dropout=1.5" in text
    assert not (tmp_path / "out").exists()


def test_what_the_format_can_not_express_is_refused_with_every_reason(own, bases, tmp_path):
    loaded = load_model(bases("bert")[1])
    params = jlora.wrap(loaded.params, rank=2, targets=["query", "classifier"])
    with pytest.raises(
        ValueError, match="'classifier' has an adapter and is saved in full, always so for the task SEQ_CLS"
    ):
        save_peft(tmp_path, loaded.model, fill(params))
    save_peft(tmp_path / "no task", loaded.model, fill(params), task_type=None)
    pooled = load_model(bases("bert")[1], pooling="mean")
    with pytest.raises(ValueError, match=r"task_type is 'SEQ_CLS', but the classifier reads pooling='mean'"):
        save_peft(tmp_path / "pooled", pooled.model, jlora.wrap(pooled.params, targets=["query"]), task_type="SEQ_CLS")
    assert not (tmp_path / "pooled").exists()

    _, tree, layout = own
    tree = fill(jlora.wrap(tree, rank=2, targets=r"(?!table).*/(kernel|w)", layout=layout))
    names = {
        "qkv/kernel": ("q", "k", "v"),
        "up/kernel": "up",
        "conv/kernel": PeftModule("conv", kind="konv"),
        "heads/kernel": "heads",
        "back/kernel": "heads",
        "haed/kernel": "head",
    }
    with pytest.raises(ValueError) as error:
        save_peft(tmp_path / "out", None, tree, names=names)
    text = str(error.value)
    for reason in (
        "'haed/kernel' in names= is no leaf  nearest: 'head/kernel'",
        "'qkv/kernel': widths [None, None, None] of its modules do not make its 16 columns",
        "'up/kernel': 1 stacked axis, but 0 {} in its name",
        "'conv/kernel': kind 'konv', known: linear, conv1d, conv, embedding",
        "'turned/w' has no name in names=",
        "'head/kernel' has no name in names=",
        "'heads.weight' is named 2 times",
    ):
        assert reason in text, reason
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"the model or names= says what the modules are called, one of them"):
        save_peft(tmp_path / "out", None, tree)


def test_a_model_made_by_hand_has_an_adapter_without_a_base_name(tmp_path):
    model = Decoder(DecoderConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2))
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    save_peft(tmp_path, model, fill(jlora.wrap(params, rank=2, targets=["q_proj"])))
    assert config_of(tmp_path)["base_model_name_or_path"] is None
    with pytest.raises(ValueError, match="'norm/scale' is missing in params"):
        save_peft(tmp_path, model, fill(jlora.wrap({k: v for k, v in params.items() if k != "norm"}, rank=2)))
