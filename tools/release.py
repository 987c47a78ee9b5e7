"""What `noxfile.py` asks of a built distribution: that it is whole, and that its client works where nothing else is.

``contents FILES`` looks into a wheel and a source archive. ``client TARGET`` runs in the environment into which a wheel
was installed, and needs nothing but that: it calls a service (`tests/compat/service.py`) with both clients.
"""

from __future__ import annotations

import asyncio
import sys
import tarfile
import zipfile
from email.parser import BytesParser
from pathlib import Path

HEAVY = ("ray", "torch", "transformers", "pydantic", "typer")
"""What the client must not bring, nor import where it is there."""
FIELDS = ("Summary", "License-Expression", "Requires-Python", "Description-Content-Type", "Classifier")
EXTRAS = {"client", "serve", "train", "bench"}
WHEEL = ("ray_moe/py.typed", "ray_moe/wire/v1/inference_pb2.pyi", "ray_moe/client/sync.py")
SOURCES = ("LICENSE", "CHANGELOG.md", "SECURITY.md", "protos/ray_moe/v1/inference.proto", "tests/compat/0.1.0.binpb")


def contents(file: Path) -> None:
    """Raises: SystemExit where something is missing, or there that should not be."""
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as wheel:
            names = wheel.namelist()
            described(wheel.read(next(name for name in names if name.endswith(".dist-info/METADATA"))))
        strangers = {name.split("/")[0] for name in names if not name.startswith("ray_moe")}
        there, missing = set(names), set(WHEEL) - set(names)
    else:
        with tarfile.open(file) as archive:
            there = {name.partition("/")[2] for name in archive.getnames()}
        strangers = {name for name in there if name.startswith((".venv", "build/", "dist/"))}
        missing = set(SOURCES) - there
    if missing or strangers:
        raise SystemExit(f"{file.name}: missing {sorted(missing)}; not to be there {sorted(strangers)}")
    print(f"{file.name}: {len(there)} files")


def described(metadata: bytes) -> None:
    """Raises: SystemExit where an index, or who reads it, would miss something."""
    fields = BytesParser().parsebytes(metadata)
    missing = [name for name in FIELDS if not fields.get(name)]
    extras = set(fields.get_all("Provides-Extra", []))
    base = {line.partition(";")[0].rstrip() for line in fields.get_all("Requires-Dist", []) if "extra ==" not in line}
    heavy = [line for line in base if line.startswith(HEAVY)]
    if missing or heavy or not extras >= EXTRAS:
        raise SystemExit(f"metadata: missing {missing}; extras {sorted(extras)}; the base needs {sorted(base)}")


def client(target: str) -> None:
    """Raises: whatever fails; SystemExit where a heavy package was imported."""
    import numpy as np

    import ray_moe

    with ray_moe.Client(target, timeout_s=10) as one:
        state = one.status().state
        text = one.generate("hello", max_new_tokens=3).text
        layer = next(iter(one.placement().placement.hosts_of))
        rows = one.forward(layer, np.ones((2, 4), np.float32))
    pieces = asyncio.run(_stream(target))
    if (state, text, pieces, rows.tolist()) != ("degraded", "0 1 2 ", 3, [[-1.0] * 4] * 2):
        raise SystemExit(f"the service answered otherwise: {state!r}, {text!r}, {pieces}, {rows}")
    imported = [name for name in HEAVY if name in sys.modules]
    if imported:
        raise SystemExit(f"the client imported {', '.join(imported)}")
    if not (Path(ray_moe.__file__).parent / "py.typed").exists():
        raise SystemExit("type checkers are not told of the types: py.typed is missing")
    version = sys.version.split()[0]
    print(f"ray_moe {ray_moe.__version__} on Python {version}: both clients work alone")


async def _stream(target: str) -> int:
    from ray_moe import AsyncClient

    async with AsyncClient(target, timeout_s=10) as one:
        return len([piece async for piece in one.stream("hello", max_new_tokens=3)])


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "contents":
        for each in arguments:
            contents(Path(each))
    else:
        client(*arguments)
