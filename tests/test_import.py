"""`import jlora` is light, its names are where it says, and a missing extra is one error that names it."""

import ast
import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jlora
from jlora.extras import EXTRAS, is_installed

ROOT = Path(__file__).parents[1]
HEAVY = ("flax", "optax", "orbax", "grain", "transformers", "rich", "tyro")
# A finder that comes before all others and finds none of the packages in the first argument.
BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def run_python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)


def test_import_jlora_imports_no_heavy_package():
    program = """
import json, sys, time
import jax
before, start = set(sys.modules), time.perf_counter()
import jlora
seconds = time.perf_counter() - start
print(json.dumps([seconds, sorted({name.partition(".")[0] for name in set(sys.modules) - before})]))
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
    done = run_python(program)
    assert done.returncode == 0, done.stderr
    (seconds, added), everything = map(json.loads, done.stdout.splitlines())
    print(f"import jlora after import jax: {seconds:.3f} s; top-level packages: {', '.join(everything)}")
    assert not set(HEAVY) & set(everything)
    assert set(added) - set(sys.stdlib_module_names) == {"jlora"}
    # Measured: a few milliseconds. A busy machine may need ten times as long.
    assert seconds < 0.15


def test_every_public_name_is_imported_from_its_home():
    if missing := [module for module in EXTRAS["cli"] if not is_installed(module)]:
        pytest.skip(f"packages of the extra cli are not installed: {', '.join(missing)}")
    assert sorted(jlora.HOMES) == jlora.__all__
    for name in jlora.__all__:
        home = importlib.import_module(f"jlora.{jlora.HOMES[name]}")
        value = getattr(jlora, name)
        assert value is getattr(home, name)
        assert value.__module__ == home.__name__, f"{name} is defined in {value.__module__}"
    assert set(jlora.__all__) <= set(dir(jlora))


def test_type_checkers_see_the_same_names_in_the_same_homes():
    tree = ast.parse((ROOT / "jlora" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    names = {alias.name: node.module.removeprefix("jlora.") for node in imports for alias in node.names}
    assert names == jlora.HOMES and len(imports) == len(block.body)


def test_the_extras_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = {
        extra: {re.split(r"[>=<\[]", package)[0].replace("-", "_") for package in packages}
        for extra, packages in project["optional-dependencies"].items()
    }
    # Transformers installs tokenizers.
    assert set(EXTRAS["hf"]) == listed["hf"] | {"tokenizers"}
    assert set(EXTRAS["cli"]) == listed["cli"] - {"jlora"} | set(EXTRAS["hf"])


@pytest.mark.parametrize(
    ("name", "extra", "missing"),
    [
        ("load_model", "hf", ["transformers"]),
        ("save_peft", "hf", ["safetensors", "regex"]),
        ("sweep", "cli", ["grain"]),
        ("plan", "cli", ["tyro", "transformers"]),
    ],
)
def test_a_missing_extra_is_one_error_that_names_it(name, extra, missing):
    program = (
        BLOCKED
        + f"""
import jlora
try:
    jlora.{name}
except ImportError as error:
    assert isinstance(error, jlora.JloraError), type(error)
    print(error)
"""
    )
    done = run_python(program, ",".join(missing))
    assert done.returncode == 0, done.stderr
    lines, expected = done.stdout.splitlines(), [m for m in EXTRAS[extra] if m in missing or not is_installed(m)]
    noun = f"package of the extra '{extra}' is" if len(expected) == 1 else f"packages of the extra '{extra}' are"
    assert lines[0] == f"jlora.{name}: {len(expected)} {noun} not installed."
    assert lines[1:-1] == [f"  {module}" for module in expected]
    assert lines[-1] == f'Fix: install the extra: python -m pip install "jlora[{extra}]".'


def test_what_needs_no_extra_works_without_any():
    base = [name for name, home in jlora.HOMES.items() if home.split(".")[0] not in ("hf", "runs")]
    assert {"wrap", "adapt", "make_train_step", "save_adapter", "generate"} <= set(base)
    program = BLOCKED + f"import jlora\nprint([getattr(jlora, name).__name__ for name in {base}])"
    # Flax installs rich.
    done = run_python(program, ",".join(set(EXTRAS["cli"]) - {"rich"}))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("missing", ["tyro", "grain,rich"])
def test_the_command_without_its_extra_says_so_in_one_line(missing):
    run = "\nimport runpy\nrunpy.run_module('jlora', run_name='__main__')"
    done = run_python(BLOCKED + run, missing)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(
        r"jlora: \d+ packages? of the extra 'cli' (is|are) not installed\. "
        r'Fix: install the extra: python -m pip install "jlora\[cli\]"\.\n',
        done.stderr,
    )


def test_the_script_is_the_module():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, function = project["scripts"]["jlora"].split(":")
    assert module == "jlora.__main__" and callable(getattr(importlib.import_module(module), function))
