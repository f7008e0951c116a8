"""Host memory and seconds of loading a checkpoint of more than 1 GB.

    python benchmarks/loading.py

Writes a Llama of random bfloat16 weights in shards and as one file, then loads each in a process of its own: peak
resident memory over what the process held before, as a ratio to the checkpoint's bytes. Written as JSON and Markdown.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32_000,
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 18,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
CASES = (
    ("shards of 200 MB", "bfloat16", False),
    ("shards of 200 MB", "bfloat16", True),
    ("one file", "bfloat16", False),
    ("one file", "bfloat16", True),
)


def write(folder: Path, shard: str, **changes: int) -> int:
    """Writes a checkpoint; gives its bytes."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jlora.hf.load import save_model, shapes
    from jlora.models.decoder import Decoder, DecoderConfig
    from jlora.models.layers import Origin

    values = CONFIG | changes
    config = DecoderConfig(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        scan=True,
    )
    model = Decoder(config, origin=Origin("", json.dumps(values)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.random(leaf.shape, np.float32), jnp.bfloat16), shapes(model))
    save_model(folder, model, params, max_shard_size=shard)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def resident(kind: str) -> int:
    """Bytes this process holds ("VmRSS") or held at most ("VmHWM")."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) * 1024
    raise KeyError(kind)


def load(folder: str, dtype: str, scan: str) -> None:
    """Loads a checkpoint and prints what that took."""
    import jax

    from jlora import load_model

    # A first small model, so that the libraries in memory do not count as the checkpoint's.
    load_model(Path(folder).parent / "small")
    before, started = resident("VmRSS"), time.perf_counter()
    loaded = load_model(folder, dtype=dtype, scan=scan == "True")
    jax.block_until_ready(loaded.params)
    seconds = time.perf_counter() - started
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.params))
    print(json.dumps({"peak": resident("VmHWM") - before, "held": held, "seconds": seconds}))


def main() -> None:
    import jax

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        sizes = {}
        for name, shard in (("shards of 200 MB", "200MB"), ("one file", "100GB")):
            command = [sys.executable, __file__, "write", f"{scratch}/{name}", shard]
            sizes[name] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        for name, dtype, scan in CASES:
            command = [sys.executable, __file__, "load", f"{scratch}/{name}", dtype, str(scan)]
            facts = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            rows.append({"checkpoint": name, "dtype": dtype, "scan": scan, "bytes": sizes[name], **facts})
    lines = [
        "# Loading a checkpoint",
        "",
        "- Command: `python benchmarks/loading.py`",
        f"- Python {platform.python_version()}, jax {jax.__version__}, {os.cpu_count()} cores, {platform.system()}",
        f"- A Llama of {rows[0]['bytes'] / 1e9:.2f} GB, bfloat16; memory is the peak over what the process held before",
        "",
        "| checkpoint | parameters | peak memory / bytes | GB/s |",
        "| --- | --- | --- | --- |",
        *(
            f"| {row['checkpoint']} | {'stacked' if row['scan'] else 'one a layer'} | {row['peak'] / row['bytes']:.2f} "
            f"| {row['bytes'] / row['seconds'] / 1e9:.2f} |"
            for row in rows
        ),
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "loading.json").write_text(json.dumps(rows, indent=2) + "\n")
    (RESULTS / "loading.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    if sys.argv[1:2] == ["write"]:
        write(Path(sys.argv[2]).parent / "small", "1GB", hidden_size=24, intermediate_size=8, num_hidden_layers=1)
        print(write(Path(sys.argv[2]), sys.argv[3]))
    elif sys.argv[1:2] == ["load"]:
        load(*sys.argv[2:5])
    else:
        main()
