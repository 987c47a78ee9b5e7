"""No version of the protos breaks a released one, whose descriptors are in `tests/compat`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorSet

from ray_moe.wire.v1 import admin_pb2, inference_pb2, training_pb2
from tests.compat.rules import breaks

ROOT = Path(__file__).parents[3]
RELEASES = sorted((ROOT / "tests/compat").glob("*.binpb"))
Change = Callable[[FileDescriptorSet], Any]


def present() -> FileDescriptorSet:
    """Of the stubs that are used."""
    found = FileDescriptorSet()
    for module in (inference_pb2, admin_pb2, training_pb2):
        module.DESCRIPTOR.CopyToProto(found.file.add())
    return found


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.stem)
def test_what_was_released_is_still_understood(release: Path) -> None:
    assert breaks(FileDescriptorSet.FromString(release.read_bytes()), present()) == []


def test_a_release_is_frozen_by_the_tool_that_makes_the_stubs(tmp_path: Path) -> None:
    assert RELEASES
    subprocess.run([sys.executable, ROOT / "tools/protos.py", "--freeze", tmp_path / "now.binpb"], check=True)
    frozen = FileDescriptorSet.FromString((tmp_path / "now.binpb").read_bytes())
    assert {file.name for file in frozen.file} >= {file.name for file in present().file}
    assert breaks(frozen, present()) == breaks(present(), frozen) == []


def message(protos: FileDescriptorSet, name: str) -> Any:
    return next(each for file in protos.file for each in file.message_type if each.name == name)


def field(protos: FileDescriptorSet, name: str) -> Any:
    kind, _, wanted = name.partition(".")
    return next(each for each in message(protos, kind).field if each.name == wanted)


def method(protos: FileDescriptorSet, name: str) -> Any:
    return next(
        each for file in protos.file for service in file.service for each in service.method if each.name == name
    )


def remove(items: Any, name: str) -> None:
    items.remove(next(each for each in items if each.name == name))


BREAKING: dict[str, Change] = {
    "message ray_moe.v1.Routing is gone": lambda now: remove(now.file[0].message_type, "Routing"),
    "field ray_moe.v1.Tensor.shape (2) is gone": lambda now: remove(message(now, "Tensor").field, "shape"),
    "field 3 of ray_moe.v1.Tensor was data, and is raw": lambda now: setattr(field(now, "Tensor.data"), "name", "raw"),
    "field ray_moe.v1.Tensor.data was bytes, and is string": lambda now: setattr(
        field(now, "Tensor.data"), "type", FieldDescriptorProto.TYPE_STRING
    ),
    "field ray_moe.v1.Tensor.shape was repeated int64, and is int64": lambda now: setattr(
        field(now, "Tensor.shape"), "label", FieldDescriptorProto.LABEL_OPTIONAL
    ),
    "field ray_moe.v1.Routing.index was ray_moe.v1.Tensor, and is ray_moe.v1.Routing": lambda now: setattr(
        field(now, "Routing.index"), "type_name", ".ray_moe.v1.Routing"
    ),
    "field ray_moe.v1.ForwardRequest.layer_path was string in layer, and is string": lambda now: field(
        now, "ForwardRequest.layer_path"
    ).ClearField("oneof_index"),
    "enum ray_moe.v1.DType is gone": lambda now: remove(now.file[0].enum_type, "DType"),
    "value ray_moe.v1.DType.DTYPE_I32 is gone": lambda now: remove(now.file[0].enum_type[0].value, "DTYPE_I32"),
    "value ray_moe.v1.DType.DTYPE_I32 was 6, and is 9": lambda now: setattr(
        now.file[0].enum_type[0].value[6], "number", 9
    ),
    "method ray_moe.v1.Admin/Chaos is gone": lambda now: remove(now.file[1].service[0].method, "Chaos"),
    "method ray_moe.v1.Inference/Generate was ray_moe.v1.GenerateRequest -> stream ray_moe.v1.GenerateResponse, and is "
    "ray_moe.v1.GenerateRequest -> ray_moe.v1.GenerateResponse": lambda now: setattr(
        method(now, "Generate"), "server_streaming", False
    ),
}


@pytest.mark.parametrize("said", BREAKING, ids=lambda said: said[:50])
def test_what_would_break_a_client_is_found(said: str) -> None:
    changed = present()
    BREAKING[said](changed)
    assert said in breaks(present(), changed)


def test_the_protos_may_grow() -> None:
    grown = present()
    message(grown, "Tensor").field.add(name="scale", number=99, type=FieldDescriptorProto.TYPE_FLOAT)
    grown.file[0].enum_type[0].value.add(name="DTYPE_F8", number=7)
    grown.file[0].message_type.add(name="New")
    grown.file[1].service[0].method.add(name="Tell", input_type=".ray_moe.v1.New", output_type=".ray_moe.v1.New")
    assert breaks(present(), grown) == []
