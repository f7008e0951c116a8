"""Docstrings mark literal blocks with `::`; the site shows them as Python code."""

import textwrap
from typing import Any

import griffe


class LiteralBlocks(griffe.Extension):
    """Turns `::` and the indented block after it into a fenced block."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fence(obj.docstring.value)


def fence(text: str) -> str:
    r"""The text with every literal block fenced.

    >>> print(fence("Use it so::\n\n    f(x)\n\nArgs:\n  x: a number."))
    Use it so:
    <BLANKLINE>
    ```python
    f(x)
    ```
    <BLANKLINE>
    Args:
      x: a number.
    """
    lines, out, n = text.split("\n"), [], 0
    while n < len(lines):
        line = lines[n]
        n += 1
        if not line.endswith("::"):
            out.append(line)
            continue
        indent = len(line) - len(line.lstrip())
        start = n
        while n < len(lines) and (not lines[n].strip() or len(lines[n]) - len(lines[n].lstrip()) > indent):
            n += 1
        block = textwrap.dedent("\n".join(lines[start:n])).strip("\n")
        heading = [line[:-1], ""] if line.strip() != "::" else []
        code = ["```python", *block.split("\n"), "```", ""]
        out += [*heading, *(f"{' ' * indent}{part}" if part else part for part in code)]
    return "\n".join(out)
