"""The committed stubs are what tools/protos.py writes from protos/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_stubs_are_up_to_date(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, ROOT / "tools/protos.py", "--out", tmp_path / "v1"], check=True, capture_output=True
    )
    made, committed = (
        {path.name: path.read_text() for path in folder.iterdir() if path.suffix in (".py", ".pyi")}
        for folder in (tmp_path / "v1", ROOT / "ray_moe/wire/v1")
    )
    assert made == committed, "run `make protos` and commit what it writes"
    assert {"inference_pb2.py", "inference_pb2.pyi", "admin_pb2_grpc.py", "admin_pb2_grpc.pyi"} <= set(made)
