"""Writes the Python stubs of ``protos/`` into ``ray_moe/wire/v1``; ``make protos`` runs it.

The stubs are committed, so that installing needs no compiler; ``tests/arch/test_protos.py`` runs this into a temporary
directory and compares. Versions matter: stubs of grpcio-tools 1.78 run on protobuf 6.31 up to 7, those of a later one
do not (see pyproject.toml).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import sysconfig
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
PACKAGE = Path("ray_moe/v1")
STUBS = ROOT / "ray_moe/wire/v1"


def generate(out: Path) -> None:
    """Replace everything in `out` by the stubs."""
    shutil.rmtree(out, ignore_errors=True)
    scratch = out / "scratch"
    scratch.mkdir(parents=True)
    scripts = Path(sysconfig.get_path("scripts"))
    failed = protoc.main(
        [
            "protoc",
            f"--proto_path={PROTOS}",
            f"--plugin=protoc-gen-mypy={scripts / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={scripts / 'protoc-gen-mypy_grpc'}",
            *(f"--{kind}_out={scratch}" for kind in ("python", "grpc_python")),
            *(f"--{kind}_out=quiet:{scratch}" for kind in ("mypy", "mypy_grpc")),
            *(str(path) for path in sorted((PROTOS / PACKAGE).glob("*.proto"))),
        ]
    )
    if failed:
        sys.exit(f"tools/protos.py: protoc failed on {PROTOS}: see its message above")
    for stub in sorted((scratch / PACKAGE).iterdir()):
        # protoc names modules after the proto package (ray_moe.v1); they live in ray_moe.wire.v1.
        text = stub.read_text().replace("ray_moe.v1 import", "ray_moe.wire.v1 import")
        (out / stub.name).write_text(text.rstrip("\n") + "\n")
    shutil.rmtree(scratch)
    (out / "__init__.py").touch()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=STUBS, help="directory to replace (default: ray_moe/wire/v1)")
    generate(parser.parse_args().out)
