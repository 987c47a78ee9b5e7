"""Pages of Markdown whose blocks are run: the README and those of docs/.

A block that is marked ``<!-- parse only: REASON -->`` on the line before it is only read. One with a title
(``title="train.yaml"``) is a file of that name where the page's commands run.
"""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
import yaml
from typer.testing import CliRunner

from ray_moe.cli.commands import commands
from ray_moe.config_sources import load_config

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = tuple(sorted((ROOT / "docs").rglob("*.md")))

_BLOCK = re.compile(
    r"(?:<!-- parse only: (?P<reason>[^\n]+?) -->\n)?"
    r"^```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block."""

    language: str
    text: str
    title: str = ""
    reason: str = ""
    """Why it cannot run here; empty for one that runs."""

    @property
    def commands(self) -> tuple[str, ...]:
        """The lines of a block for a shell, without what a page shows of a prompt."""
        if self.language not in ("bash", "console"):
            return ()
        lines = self.text.replace("\\\n", " ").splitlines()
        return tuple(line.removeprefix("$ ") for line in lines if line.strip() and not line.startswith("#"))


def blocks(page: Path) -> tuple[Block, ...]:
    """All of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return tuple(
        Block(found["language"], found["text"], found["title"] or "", found["reason"] or "")
        for found in _BLOCK.finditer(text)
    )


# --- Reading -------------------------------------------------------------------------------------------------
def check(block: Block, folder: Path) -> None:
    """Whether a block is what it says it is, down to names of commands, options and settings. `folder` is empty."""
    if block.language == "python":
        ast.parse(block.text)
    if block.commands:
        subprocess.run(["bash", "-n", "-c", "\n".join(block.commands)], check=True, capture_output=True)
        for arguments in our_commands(block):
            parse(arguments)
    if block.language == "yaml":
        tree = yaml.safe_load(block.text)
        if not block.reason:  # else it is somebody else's
            file = folder / "settings.yaml"
            file.write_text(yaml.safe_dump(tree))
            load_config(file)


def our_commands(block: Block) -> list[list[str]]:
    """Arguments of each `ray-moe` of a block."""
    every = [shlex.split(line, comments=True) for line in block.commands]
    return [words[1:] for words in every if words and words[0] == "ray-moe"]


def parse(arguments: Sequence[str]) -> Mapping[str, Any]:
    """Values of all options of a command. Raises what the command line raises for those that cannot be."""
    command: Any = typer.main.get_command(commands)
    name, *rest = arguments
    while hasattr(command := command.commands[name], "commands"):
        name, *rest = rest
    parameters: Mapping[str, Any] = command.make_context(name, list(rest)).params
    return parameters


# --- Running -------------------------------------------------------------------------------------------------
def run(
    page: Path,
    names: dict[str, Any],
    adapt: Callable[[str], str] = lambda text: text,
    more: Callable[[Sequence[str]], Sequence[str] | None] = lambda arguments: (),
) -> dict[str, Any]:
    """Run a page from top to bottom in the present folder: its Python in one namespace, its commands in this process.

    Args:
        names: that its Python takes for granted; all that it defines are added.
        adapt: turns what is for anybody (addresses, paths) into what is here.
        more: options that a command needs here; None for one that is not run.

    Returns: `names`.
    """
    every = blocks(page)
    for block in every:
        if block.title:
            Path(block.title).write_text(adapt(block.text))
    for block in every:
        if block.reason:
            continue
        if block.language == "python":
            exec(compile(adapt(block.text), f"{page.name}: {block.text[:40]!r}", "exec"), names)
        for arguments in our_commands(Block(block.language, adapt(block.text))):
            options = more(arguments)
            if options is not None:
                result = CliRunner().invoke(commands, [*arguments, *options])
                assert result.exit_code == 0, f"{arguments}: {result.output}"
    return names
