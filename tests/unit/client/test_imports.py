"""The client works where Ray, torch and transformers are not installed."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"ray", "torch", "transformers", "pydantic", "grpc_health", "typer"}:
            raise ModuleNotFoundError(f"{name} is not installed")

sys.meta_path.insert(0, Absent())
from ray_moe import AsyncClient, Client
from ray_moe.errors import Unavailable

with Client("127.0.0.1:1", timeout_s=5) as client:
    try:
        client.status()
    except Unavailable as error:
        assert "127.0.0.1:1" in error.message
    else:
        raise SystemExit("nothing answered")
import os
assert os.environ["GRPC_ENABLE_FORK_SUPPORT"] == "0"
"""


def test_the_client_needs_neither_ray_nor_torch() -> None:
    result = subprocess.run([sys.executable, "-W", "error", "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
