"""Writes the Python stubs of ``protos/`` below ``ray_moe/wire``; ``make protos`` runs it.

The stubs are committed, so that installing needs no compiler; ``tests/arch/test_protos.py`` runs this into a temporary
directory and compares. Versions matter: stubs of grpcio-tools 1.78 run on protobuf 6.31 up to 7, those of a later one
do not (see pyproject.toml).

With ``--freeze`` it writes instead what a release promises: the descriptors of `ray_moe.v1`, without comments, into
``tests/compat/VERSION.binpb``, which no later version may break (`tests/compat/rules.py`).
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
STUBS = ROOT / "ray_moe/wire"
PACKAGES = {"ray_moe.v1": "v1", "inference": "kserve"}
"""Package of the protos, whose path below ``protos/`` is its name's -> folder of its stubs."""

RELEASED = "ray_moe.v1"
"""The package whose descriptors a release freezes; the other one is the Open Inference Protocol, which others keep."""

FOREIGN = frozenset({"inference"})
"""Packages that others define too (tritonclient and kserve do). Each of their stubs has a descriptor pool of its own,
since the default one takes a name only once, and whoever comes second could not be imported."""


def generate(out: Path) -> None:
    """Replace everything in the folders of the stubs below `out`."""
    for package, folder in PACKAGES.items():
        _generate(package, out / folder)


def _generate(package: str, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    scratch = out / "scratch"
    scratch.mkdir(parents=True)
    sources = Path(*package.split("."))
    scripts = Path(sysconfig.get_path("scripts"))
    _run(
        "protoc",
        f"--proto_path={PROTOS}",
        f"--plugin=protoc-gen-mypy={scripts / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={scripts / 'protoc-gen-mypy_grpc'}",
        *(f"--{kind}_out={scratch}" for kind in ("python", "grpc_python")),
        *(f"--{kind}_out=quiet:{scratch}" for kind in ("mypy", "mypy_grpc")),
        *(str(path) for path in sorted((PROTOS / sources).glob("*.proto"))),
    )
    for stub in sorted((scratch / sources).iterdir()):
        (out / stub.name).write_text(_adapted(stub.read_text(), package).rstrip("\n") + "\n")
    shutil.rmtree(scratch)
    (out / "__init__.py").touch()


def freeze(file: Path) -> None:
    """Write the descriptors of the protos as they are."""
    sources = sorted((PROTOS / Path(*RELEASED.split("."))).glob("*.proto"))
    _run("protoc", f"--proto_path={PROTOS}", "--include_imports", f"--descriptor_set_out={file}", *map(str, sources))


def _run(*arguments: str) -> None:
    if protoc.main(list(arguments)):
        sys.exit(f"tools/protos.py: protoc failed on {PROTOS}: see its message above")


def _adapted(text: str, package: str) -> str:
    """protoc names modules after the proto package (ray_moe.v1); they live elsewhere (ray_moe.wire.v1).

    Messages tell their module, too, and are pickled by its name: Ray Serve's proxy does.
    """
    module = f"ray_moe.wire.{PACKAGES[package]}"
    text = text.replace(f"from {package} import", f"from {module} import")
    text = text.replace(f"Messages(DESCRIPTOR, '{package}.", f"Messages(DESCRIPTOR, '{module}.")
    if package in FOREIGN:
        text = text.replace("_descriptor_pool.Default()", "_descriptor_pool.DescriptorPool()")
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=STUBS, help="where to replace v1/ and kserve/ (default: wire/)")
    parser.add_argument("--freeze", type=Path, metavar="FILE", help="write the descriptors of a release there instead")
    asked = parser.parse_args()
    if asked.freeze is None:
        generate(asked.out)
    else:
        freeze(asked.freeze)
