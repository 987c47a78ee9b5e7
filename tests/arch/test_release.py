"""What a release promises is the same wherever it is written, and every bound on a dependency has a reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import noxfile
import ray_moe

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
REQUIREMENT = re.compile(r'"[A-Za-z][\w.-]*(\[[\w,.-]+\])?[<>=!~]')


def unexplained(text: str) -> list[str]:
    """Lines of a pyproject with a requirement whose bound has no comment, on the line or just above."""
    lines = text.partition("[project.scripts]")[0].partition("dependencies = [")[2].splitlines()
    return [
        line.strip()
        for before, line in zip(["", *lines], lines, strict=False)
        if REQUIREMENT.search(line) and "#" not in line and not before.strip().startswith("#")
    ]


def test_every_bound_has_a_reason() -> None:
    assert unexplained(PYPROJECT) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('dependencies = [\n    "a>=1",\n]', ['"a>=1",']),
        ('dependencies = [\n    "a>=1",  # why\n    "b[c]==2",\n]', ['"b[c]==2",']),
        ('dependencies = [\n    # why\n    "a>=1",\n]', []),
        ('dependencies = ["ray-moe[serve]"]', []),
    ],
)
def test_a_bound_without_one_is_found(text: str, said: list[str]) -> None:
    assert unexplained(text) == said


def test_the_pythons_are_the_same_everywhere() -> None:
    classifiers = re.findall(r"Programming Language :: Python :: (3\.\d+)", PYPROJECT)
    assert classifiers == noxfile.PYTHONS
    assert f'requires-python = ">={classifiers[0]}"' in PYPROJECT
    assert f'target-version = "py{classifiers[0].replace(".", "")}"' in PYPROJECT
    assert f'python_version = "{classifiers[0]}"' in PYPROJECT


def test_the_matrix_has_the_ray_that_is_tested_and_the_one_after_it() -> None:
    tested = re.search(r"^ray==(\d+)\.(\d+)\.", (ROOT / "constraints/tested.txt").read_text(), re.MULTILINE)
    assert tested
    major, minor = map(int, tested.groups())
    assert (f"{major}.{minor}", f"{major}.{minor + 1}") == (noxfile.RAY, noxfile.NEXT_RAY)
    assert f"ray[serve]>={noxfile.RAY},<{major + 1}" in PYPROJECT


def test_the_extras_are_there() -> None:
    extras = set(re.findall(r"^(\w+) = \[", PYPROJECT.partition("[project.optional-dependencies]")[2], re.MULTILINE))
    assert {"client", "serve", "train", "bench", "dev"} <= extras


def test_types_are_shipped_and_the_protos_of_this_version_are_frozen() -> None:
    assert (ROOT / "ray_moe/py.typed").exists()
    assert (ROOT / f"tests/compat/{ray_moe.__version__}.binpb").exists(), (
        f"freeze them: python tools/protos.py --freeze tests/compat/{ray_moe.__version__}.binpb"
    )
