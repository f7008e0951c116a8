"""The documentation is true: its programs run and print what it says, and it names all that is public."""

import contextlib
import doctest
import importlib
import inspect
import io
import re
import tomllib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import jlora
from jlora.runs import config as configs

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
# A setup that readers don't see, in an HTML comment; a program; the text it prints; a part of a job's file.
BLOCK = re.compile(r"^<!-- setup\n(.*?)^-->$|^```(python|text|toml)\n(.*?)^```$", re.M | re.S)
NOT_RUN = "# Not run in the tests: "
MAX_NOT_RUN = 6
NUMBER = re.compile(r"[-+]?\d+\.\d+(?:e[-+]?\d+)?")
EXAMPLES = [path for path in sorted((ROOT / "jlora").rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """The kind, text and first line's number of every block of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        (match[2] or "setup", match[3] or match[1], 1 + text[: match.start()].count("\n"))
        for match in BLOCK.finditer(text)
    ]


def programs() -> list[Any]:
    kinds = {"setup", "python"}
    return [pytest.param(page, id=name(page)) for page in PAGES if any(kind in kinds for kind, _, _ in blocks(page))]


@pytest.mark.parametrize("page", programs())
def test_the_programs_of_a_page_run_in_order_and_print_what_it_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "documentation"}
    printed = None
    for kind, text, line in blocks(page):
        if kind == "text":
            if printed is not None:
                assert_printed(printed, text, f"{name(page)}, line {line}")
            printed = None
        elif kind in ("python", "setup") and not text.startswith(NOT_RUN):
            output = io.StringIO()
            # Lines of a traceback are those of the page.
            code = compile("\n" * line + text, str(page), "exec")
            with contextlib.redirect_stdout(output):
                exec(code, names)
            printed = output.getvalue()


def assert_printed(printed: str, expected: str, where: str) -> None:
    """Compares two texts; decimal fractions may differ as another machine's rounding makes them differ."""
    tidy = lambda text: "\n".join(line.rstrip() for line in text.strip().splitlines())
    assert NUMBER.sub("#", tidy(printed)) == NUMBER.sub("#", tidy(expected)), where
    found, wanted = ([float(number) for number in NUMBER.findall(text)] for text in (printed, expected))
    assert found == pytest.approx(wanted, rel=0.05, abs=0.02), where


def test_few_programs_are_not_run_and_each_says_why():
    skipped = [
        (name(page), text.splitlines()[0].removeprefix(NOT_RUN))
        for page in PAGES
        for kind, text, _ in blocks(page)
        if kind == "python" and text.startswith(NOT_RUN)
    ]
    assert len(skipped) <= MAX_NOT_RUN
    assert all(reason.strip() for _, reason in skipped), skipped


def test_the_readme_shows_the_minimal_example_as_it_is():
    program = (ROOT / "examples" / "minimal.py").read_text(encoding="utf-8")
    assert program in [text for kind, text, _ in blocks(ROOT / "README.md") if kind == "python"]


def test_every_part_of_a_job_in_the_docs_is_read_by_train():
    required = {"model": {"name": "hub/model"}, "data": {"train": "train.jsonl"}, "output": {"folder": "run"}}
    for page in PAGES:
        for kind, text, line in blocks(page):
            if kind == "toml":
                given = tomllib.loads(text)
                job = required | {section: required.get(section, {}) | values for section, values in given.items()}
                configs.parse(job, source=f"{name(page)}, line {line}", folder=ROOT)


def test_the_reference_has_every_public_name_once():
    reference = "\n".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "api").glob("*.md")))
    documented = re.findall(r"^::: jlora\.(\w+)$", reference, re.M)
    assert sorted(documented) == sorted({*jlora.__all__, "__version__"})


def test_every_public_function_has_an_example_that_runs():
    """As a doctest, in a program of the docs, or in a program in a docstring, which a test of that module runs."""
    docstrings = {name: getattr(jlora, name).__doc__ or "" for name in jlora.__all__}
    programs = [text for page in PAGES for kind, text, _ in blocks(page) if kind == "python"]
    programs += [text for doc in docstrings.values() for text in re.findall(r"```python\n(.*?)```", doc, re.S)]
    assert [
        name
        for name, doc in docstrings.items()
        if inspect.isfunction(getattr(jlora, name))
        and ">>> " not in doc
        and not any(f"jlora.{name}(" in program for program in programs)
    ] == []


@pytest.mark.parametrize("path", [pytest.param(path, id=name(path)) for path in EXAMPLES])
def test_the_examples_in_a_modules_docstrings_are_true(path):
    module = importlib.import_module(name(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__"))
    names = {"jax": jax, "jnp": jnp, "optax": optax, "jlora": jlora}
    result = doctest.testmod(module, extraglobs=names, optionflags=doctest.ELLIPSIS)
    assert result.attempted and not result.failed
