"""The floors of the house: a file imports only from its own floor and those below."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "jlora"
STANDS_ON_JAX = ("errors", "extras", "tree", "transform", "adapters")
FLOORS = (
    "errors",
    "extras",
    "tree",
    "transform",
    "adapters",
    "training",
    "models",
    "hf",
    "data",
    "tasks",
    "runs",
    "cli",
)
FILES = sorted(
    [ROOT / "errors.py", ROOT / "extras.py", *(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))]
)


def imported(path: Path) -> list[str]:
    """Every module a file imports, at its top or inside a function."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def floor(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_from_its_floor_and_below(path: Path) -> None:
    own = floor(path)
    for name in imported(path):
        if name.startswith("jlora."):
            other = name.split(".")[1]
            assert other in FLOORS, f"{path.name} imports {name}: import from the floor that defines it"
            assert FLOORS.index(other) <= FLOORS.index(own), name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_core_stands_on_jax_alone_and_nobody_imports_torch(path: Path) -> None:
    allowed = {"jax", "jaxtyping", "numpy", "jlora"}
    for name in imported(path):
        root = name.split(".")[0]
        assert root not in ("torch", "peft"), f"{path.name} imports {name}"
        if floor(path) in STANDS_ON_JAX:
            assert root in allowed or root in sys.stdlib_module_names, f"{path.name} imports {name}"


def test_only_one_file_knows_the_versions_of_jax() -> None:
    knowing = {path.name for path in FILES if any(name.startswith("jax.extend") for name in imported(path))}
    reading = {path.name for path in FILES if floor(path) in STANDS_ON_JAX and ".params[" in path.read_text()}
    assert knowing == {"jaxprs.py"}
    assert reading <= {"jaxprs.py"}


def test_no_file_reaches_into_private_jax() -> None:
    assert not [path.name for path in FILES if any(name.startswith("jax._src") for name in imported(path))]


TESTS = sorted(Path(__file__).parent.rglob("test_*.py"))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(TESTS[0].parents[1])))
def test_a_test_imports_no_other_test(path: Path) -> None:
    """What tests share is in helper modules beside tests/tiny_job.py."""
    modules = {name.split(".")[0] for name in imported(path)}
    assert not modules & {other.stem for other in TESTS}
