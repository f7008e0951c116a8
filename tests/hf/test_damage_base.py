"""A damaged model folder: `jlora generate` prints one error or an answer, and never a traceback."""

import contextlib
import io
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny_job
from safetensors.numpy import load_file, save_file

from jlora.cli.main import DONE, MISTAKE, main

quick = tiny_job.quick
FLIPS = 30
COMMANDS = {
    "single": ["where is my courier", "--chat", "--max-new-tokens", "6"],
    "sharded": ["where is my courier", "--max-new-tokens", "6"],
}


def make_base(folder: Path, form: str) -> Path:
    """A tiny Llama with every small file that a checkpoint may have, in one file of weights or in two."""
    tiny_job.make_llama(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2], "do_sample": False}))
    if form == "single":
        return folder
    single = folder / "model.safetensors"
    stored, weight_map = load_file(single), {}
    for n, names in enumerate((sorted(stored)[::2], sorted(stored)[1::2]), 1):
        file = f"model-0000{n}-of-00002.safetensors"
        save_file({name: stored[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    single.unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def generate(folder: Path, form: str) -> tuple[int, str, str]:
    """The exit code, the answer and the messages of `jlora generate`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["generate", str(folder), *COMMANDS[form]])
    return code, out.getvalue(), err.getvalue()


def damages(content: bytes, rng: np.random.Generator) -> dict[str, bytes | None]:
    """A file's content truncated, emptied, deleted (None) and with one bit flipped at several places."""
    made: dict[str, bytes | None] = {"truncated": content[: len(content) // 2], "emptied": b"", "deleted": None}
    made["last byte cut"] = content[:-1]
    # The header of weights is at their beginning, where most of what can go wrong is.
    places = sorted({*rng.integers(0, len(content), FLIPS // 2), *rng.integers(0, min(len(content), 400), FLIPS // 2)})
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        made[f"flipped at {place}"] = bytes(flipped)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("form", list(COMMANDS))
def test_no_damage_to_a_file_of_a_model_folder_prints_a_traceback(form, tmp_path, capsys, record_property):
    base = make_base(tmp_path / "base", form)
    code, answer, messages = generate(base, form)
    assert code == DONE, messages
    rng, counts = np.random.default_rng(0), Counter()
    for file in sorted(base.iterdir()):
        for damage, content in damages(file.read_bytes(), rng).items():
            folder = tmp_path / "damaged"
            shutil.copytree(base, folder)
            if content is None:
                (folder / file.name).unlink()
            else:
                (folder / file.name).write_bytes(content)
            code, given, messages = generate(folder, form)
            where = f"{file.name}, {damage}: exit code {code}\n{messages}"
            assert code in (DONE, MISTAKE) and "Traceback" not in messages, where
            assert code == DONE or "\nFix: " in messages, where
            kind = "detected" if code == MISTAKE else "harmless" if given == answer else "unseen"
            counts[kind] += 1
            counts[f"{file.name} {kind}"] += 1
            # Nothing digests a base; what leaves no tensor to be read is always seen.
            if file.suffix == ".safetensors" and damage in ("truncated", "emptied", "deleted", "last byte cut"):
                assert kind == "detected", where
            shutil.rmtree(folder)
    record_property("counts", dict(counts))
    with capsys.disabled():
        print(f"\n{form}:", ", ".join(f"{counts[kind]} {kind}" for kind in ("detected", "harmless", "unseen")))
    assert counts["detected"] > counts["unseen"]
