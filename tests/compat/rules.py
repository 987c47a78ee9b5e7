"""What a version of the protos may not do to a released one, as rules over their descriptors.

`ray_moe.v1` may grow: new methods, messages, fields and values. All that a released client may send or read stays: each
field keeps its number, name and type, and whether it is repeated, optional or in a oneof; each value of an enum its
number; each method its messages and whether they stream. What must break goes into a `ray_moe.v2` beside it. Called by
`tests/unit/wire/test_compatibility.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet

Field = FieldDescriptorProto


def breaks(old: FileDescriptorSet, new: FileDescriptorSet) -> list[str]:
    """What clients of `old` would stumble over at a server of `new`; empty if nothing."""
    said: list[str] = []
    for name, message in _messages(old).items():
        other = _messages(new).get(name)
        said += [f"message {name} is gone"] if other is None else _message(name, message, other)
    for name, enum in _enums(old).items():
        values = _enums(new).get(name)
        said += [f"enum {name} is gone"] if values is None else _enum(name, enum, values)
    for name, method in _methods(old).items():
        there = _methods(new).get(name)
        if there is None:
            said.append(f"method {name} is gone")
        elif there != method:
            said.append(f"method {name} was {_signature(method)}, and is {_signature(there)}")
    return said


def _message(name: str, old: DescriptorProto, new: DescriptorProto) -> Iterator[str]:
    fields = {field.number: field for field in new.field}
    for field in old.field:
        other = fields.get(field.number)
        if other is None:
            yield f"field {name}.{field.name} ({field.number}) is gone"
        elif other.name != field.name:
            yield f"field {field.number} of {name} was {field.name}, and is {other.name}"
        elif _kind(field, old) != _kind(other, new):
            yield f"field {name}.{field.name} was {_kind(field, old)}, and is {_kind(other, new)}"


def _kind(field: Field, message: DescriptorProto) -> str:
    """Type and place of a field, in words of a proto."""
    kind = field.type_name.lstrip(".") or Field.Type.Name(field.type).removeprefix("TYPE_").lower()
    if field.label == Field.LABEL_REPEATED:
        return f"repeated {kind}"
    if field.proto3_optional:
        return f"optional {kind}"
    if field.HasField("oneof_index"):
        return f"{kind} in {message.oneof_decl[field.oneof_index].name}"
    return kind


def _enum(name: str, old: EnumDescriptorProto, new: EnumDescriptorProto) -> Iterator[str]:
    numbers = {value.name: value.number for value in new.value}
    for value in old.value:
        if value.name not in numbers:
            yield f"value {name}.{value.name} is gone"
        elif numbers[value.name] != value.number:
            yield f"value {name}.{value.name} was {value.number}, and is {numbers[value.name]}"


def _signature(method: tuple[str, bool, str, bool]) -> str:
    asked, streams_in, answered, streams_out = method
    return f"{'stream ' * streams_in}{asked.lstrip('.')} -> {'stream ' * streams_out}{answered.lstrip('.')}"


# --- what there is, by its full name -------------------------------------------------------------------------
def _messages(every: FileDescriptorSet) -> Mapping[str, DescriptorProto]:
    return dict(each for file in every.file for each in _inside(file.package, file.message_type))


def _inside(scope: str, messages: Any) -> Iterator[tuple[str, DescriptorProto]]:
    for message in messages:
        name = f"{scope}.{message.name}"
        yield name, message
        yield from _inside(name, message.nested_type)


def _enums(every: FileDescriptorSet) -> Mapping[str, EnumDescriptorProto]:
    found = {f"{file.package}.{enum.name}": enum for file in every.file for enum in file.enum_type}
    for name, message in _messages(every).items():
        found |= {f"{name}.{enum.name}": enum for enum in message.enum_type}
    return found


def _methods(every: FileDescriptorSet) -> Mapping[str, tuple[str, bool, str, bool]]:
    return {
        f"{file.package}.{service.name}/{each.name}": (
            each.input_type,
            each.client_streaming,
            each.output_type,
            each.server_streaming,
        )
        for file in every.file
        for service in file.service
        for each in service.method
    }
