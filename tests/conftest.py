"""Which tests are fast, and how the property tests draw their examples."""

from pathlib import Path

import pytest
from hypothesis import settings

TESTS = Path(__file__).parent
# The folders and files of the fast tests: with two free cores they take less than two minutes together. All others
# train jobs, compile models or compare with torch; they are slow, and with -m "not slow" they are not imported.
FAST = (
    "adapters",
    "cli/test_show.py",
    "data",
    "hf/test_folder.py",
    "runs/test_agreement.py",
    "runs/test_config.py",
    "tasks",
    "test_floors.py",
    "test_import.py",
    "training",
    "transform",
    "tree",
)

# Every run draws new examples, as many as each test allows. A failure prints the decorator that reproduces it, and the
# example is kept in .hypothesis. `--hypothesis-profile=same` draws the same examples each time.
settings.register_profile("new", derandomize=False, deadline=None, print_blob=True)
settings.register_profile("same", derandomize=True, deadline=None, print_blob=True, database=None)
settings.load_profile("new")


def is_slow(path: Path) -> bool:
    """Whether a test file is slow as a whole."""
    return path == TESTS / "transform" / "test_memory.py" or not any(path.is_relative_to(TESTS / name) for name in FAST)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves the slow files out of the fast tests, since importing torch takes longer than many a test."""
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    return True if config.option.markexpr == "not slow" and is_test and is_slow(collection_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test of a slow file."""
    for item in items:
        if is_slow(item.path):
            item.add_marker(pytest.mark.slow)
