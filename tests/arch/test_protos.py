"""The committed stubs are what tools/protos.py writes from protos/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("v1", "kserve")


def stubs(wire: Path) -> dict[str, str]:
    files = [path for folder in FOLDERS for path in (wire / folder).iterdir() if path.suffix in (".py", ".pyi")]
    return {path.relative_to(wire).as_posix(): path.read_text() for path in files}


def test_stubs_are_up_to_date(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "tools/protos.py", "--out", tmp_path], check=True, capture_output=True)
    made = stubs(tmp_path)
    assert made == stubs(ROOT / "ray_moe/wire"), "run `make protos` and commit what it writes"
    assert {"v1/inference_pb2.py", "v1/admin_pb2_grpc.pyi", "kserve/grpc_service_pb2.py"} <= set(made)
