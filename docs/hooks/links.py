"""Pages of the repository in the site: what a page links to outside docs/ becomes a page too.

Links in docs/ are relative paths in the repository, so that they also work where the sources are read.
"""

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PREFIX = "repository/"
START = ("CONTRIBUTING.md", "CHANGELOG.md")  # named in mkdocs.yml
LINK = re.compile(r"\[([^\[\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"(^```.*?^```$)", re.M | re.S)
LANGUAGES = {".py": "python", ".toml": "toml", ".json": "json", ".jsonl": "json"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds every file of the repository that a page links to, directly or through another."""
    left = list(START)
    for file in files.documentation_pages():
        left += targets(f"docs/{file.src_uri}", file.content_string)
    added: set[str] = set()
    while left:
        path = left.pop()
        if path in added or path.startswith("docs/") or path == "README.md" or not (ROOT / path).is_file():
            continue
        added.add(path)
        if path.endswith(".md"):
            left += targets(path, (ROOT / path).read_text(encoding="utf-8"))
        files.append(generate(path, config))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links between files of the repository into links between pages."""
    path = page.file.src_uri.removeprefix(PREFIX)
    source = path if path != page.file.src_uri else f"docs/{path}"
    if not (ROOT / source).is_file():  # a page made of code
        return markdown
    here = posixpath.dirname(page.file.src_uri)

    def rewrite(match: re.Match[str]) -> str:
        target = resolve(source, match[2])
        if target is None:
            return match[0]
        if (ROOT / target).is_dir():  # a folder has no page
            return match[1]
        uri = site_uri(target)
        # A missing file stays as it is, and the strict build reports it.
        found = files.get_file_from_path(uri) is not None
        return f"[{match[1]}]({posixpath.relpath(uri, here) if found else match[2]}{match[3] or ''})"

    return outside_code(markdown, lambda text: LINK.sub(rewrite, text))


def outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """Changes the text outside of fenced blocks."""
    return "".join(part if part.startswith("```") else change(part) for part in FENCE.split(markdown))


def targets(source: str, markdown: str) -> list[str]:
    """The files of the repository that a page links to, as paths from its root."""
    found: list[str] = []
    outside_code(markdown, lambda text: found.extend(match[2] for match in LINK.finditer(text)) or text)
    return [target for link in found if (target := resolve(source, link)) is not None]


def resolve(source: str, link: str) -> str | None:
    """A link's path from the root of the repository; None for an address or a path outside of it.

    >>> resolve("docs/howto/rank.md", "../../benchmarks/README.md")
    'benchmarks/README.md'
    """
    if re.match(r"[a-z]+:|/", link):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return None if path.startswith("..") else path


def site_uri(path: str) -> str:
    """The source of the page that shows a file of the repository."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return PREFIX + path + ("" if path.endswith((".md", ".png")) else ".md")


def generate(path: str, config: MkDocsConfig) -> File:
    """A file of the repository as a page; a picture as it is."""
    options: dict[str, Any] = {"inclusion": InclusionLevel.NOT_IN_NAV}
    if path.endswith(".png"):
        return File.generated(config, site_uri(path), abs_src_path=str(ROOT / path), **options)
    text = (ROOT / path).read_text(encoding="utf-8")
    if not path.endswith(".md"):
        text = f"# {path}\n\n````{LANGUAGES.get(Path(path).suffix, 'text')}\n{text}\n````\n"
    return File.generated(config, site_uri(path), content=text, **options)
