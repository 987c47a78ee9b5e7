"""What mkdocs cannot do by itself: pages made of the code, and links to files beside the folder of the pages.

mkdocs loads this by `hooks` in mkdocs.yml and calls the functions that begin with `on_`. The pages of the repository
that lie outside of `docs/` are on the site, too, so that every link leads somewhere without a network; so are sources
that pages link to. It writes nothing into the repository.
"""

from __future__ import annotations

import os
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # mkdocs loads this file by its path

from tools.docs import cli, metrics, protos, settings, status  # noqa: E402

DOCS = "docs"
OUTSIDE = (
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "LICENSE",
    "pyproject.toml",
    "benchmarks/results/*.md",
    "benchmarks/*.py",
    "cluster/**/*",
    "constraints/*.txt",
    "examples/*.py",
    "ray_moe/config.py",
    "ray_moe/errors.py",
    "ray_moe/models/families.py",
    "ray_moe/ops/gates/*.py",
    "ray_moe/transport/*.py",
    "tests/tiny_models.py",
    "tests/unit/transport/*.py",
    "tests/unit/models/test_families.py",
)
"""Files of the repository that are pages of the site, or that pages may link to."""
LISTS = {"examples": ("Examples", "*.py"), "benchmarks/results": ("Measurements", "*.md")}
"""Folders that have a page which lists what is in them."""
REPLACED = {"README.md": "index.md", "docs": "index.md", "protos/ray_moe/v1": "reference/protos.md"}
"""What the site has a page of its own for."""

_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_FENCE = re.compile(r"^(```+|~~~+)[^\n]*\n.*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".json": "json"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made, and those from outside of `docs/`."""
    made = {
        "reference/settings.md": settings.page,
        "reference/cli.md": cli.page,
        "reference/protos.md": protos.page,
        "reference/metrics.md": metrics.page,
        "reference/errors.md": status.page,
    }
    for uri, page in made.items():
        files.append(File.generated(config, uri, content=page()))
    for path in _outside():
        files.append(File.generated(config, _uri(path), content=_text(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files beside `docs/` into links to their pages."""
    uri = page.file.src_uri
    source = uri.removeprefix("repository/") if uri.startswith("repository/") else f"{DOCS}/{uri}"
    parts: list[str] = []
    end = 0
    for fence in _FENCE.finditer(markdown):
        parts += [_rewritten(markdown[end : fence.start()], source, uri), fence.group()]
        end = fence.end()
    return "".join([*parts, _rewritten(markdown[end:], source, uri)])


def _rewritten(text: str, source: str, uri: str) -> str:
    def link(match: re.Match[str]) -> str:
        opening, target, anchor, closing = match.groups(default="")
        if re.match(r"[a-z]+:", target):
            return match.group()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path.startswith(f"{DOCS}/") and source.startswith(f"{DOCS}/"):
            return match.group()
        return f"{opening}{posixpath.relpath(_place(path, source), posixpath.dirname(uri) or '.')}{anchor}{closing}"

    return _LINK.sub(link, text)


def _place(path: str, source: str) -> str:
    """Where the file or folder `path` of the repository is on the site. Raises: `PluginError` where it is not."""
    if path.startswith(f"{DOCS}/"):
        return path.removeprefix(f"{DOCS}/")
    known = {**{outside: _uri(outside) for outside in _outside()}, **REPLACED}
    if path not in known:
        raise PluginError(
            f"{source} links to {path}, which is not on the site; add it to OUTSIDE in tools/docs/hooks.py"
        )
    return known[path]


def _outside() -> Iterator[str]:
    yield from LISTS
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                yield path.relative_to(ROOT).as_posix()


def _uri(path: str) -> str:
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def _text(path: str) -> str:
    if path in LISTS:
        title, pattern = LISTS[path]
        lines = [
            f"- [`{each.name}`]({Path(path).name}/{each.name}): {_title(each)}"
            for each in sorted((ROOT / path).glob(pattern))
        ]
        return f"# {title}\n\n" + "\n".join(lines) + "\n"
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    language = _LANGUAGES.get(os.path.splitext(path)[1], "text")
    return f"# {path}\n\n~~~~{language}\n{text.rstrip()}\n~~~~\n"


def _title(path: Path) -> str:
    """What a page's heading, or a module's docstring, says in its first words."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return next(line.removeprefix("# ") for line in text.splitlines() if line.startswith("# "))
    return " ".join(text.split('"""', 2)[1].strip().split("\n\n")[0].split())
