"""Third parties stay where they belong, nothing asserts, and light doors stay light; each check can fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ray_moe
from tests.arch.imports import violations

PACKAGE = Path(ray_moe.__file__).parent


def test_the_package_keeps_the_rules() -> None:
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("path", "source", "said"),
    [
        ("policy/plan.py", "import ray\n", "policy/plan.py:1: ray may be imported only in actors/"),
        ("runtime/host.py", "def f():\n    from ray.util import x\n", "runtime/host.py:2: ray may be"),
        ("transport/local.py", "import grpc.aio\n", "transport/local.py:1: grpc may be"),
        ("ops/gate.py", "from transformers import AutoModel\n", "ops/gate.py:1: transformers may be"),
        ("actors/expert.py", "import pydantic\n", "actors/expert.py:1: pydantic may be"),
        ("wire/x.py", "import pickle\n", "wire/x.py:1: pickle is used nowhere"),
        ("ops/x.py", "assert True\n", "ops/x.py:1: assert vanishes"),
        ("ops/__init__.py", "x = 1\n", "ops/__init__.py:1: an __init__.py below the root stays empty"),
    ],
)
def test_the_check_finds_a_planted_violation(tmp_path: Path, path: str, source: str, said: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    (found,) = violations(tmp_path)
    assert found.startswith(said)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("actors/x.py", "import ray"),
        ("transport/grpc_client.py", "import grpc"),
        ("models/x.py", "import transformers"),
    ],
)
def test_the_check_lets_pass_what_is_allowed(tmp_path: Path, path: str, source: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import ray_moe", ("ray", "torch", "transformers", "grpc", "numpy", "pydantic")),
        ("from ray_moe import Client, AsyncClient", ("ray", "torch", "transformers", "pydantic", "typer")),
        ("from ray_moe import MoELayer", ("ray", "transformers", "grpc", "pydantic")),
        ("import ray_moe.cli.main", ("ray", "torch", "transformers", "grpc", "numpy")),
    ],
)
def test_light_doors_stay_light(statement: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys\n{statement}\nprint(*[name for name in {heavy!r} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.split() == []


def test_the_root_names_what_it_has() -> None:
    assert set(ray_moe.__all__) == set(dir(ray_moe))
    with pytest.raises(AttributeError, match="no attribute 'Server'"):
        _ = ray_moe.Server
