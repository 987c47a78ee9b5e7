"""The page of the wire: services and messages of `protos/` with their comments. Called by `hooks.py`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2
from grpc_tools import protoc

from tools.docs.tables import cell, table

PROTOS = Path(__file__).resolve().parents[2] / "protos"
FILES = ("ray_moe/v1/inference.proto", "ray_moe/v1/training.proto", "ray_moe/v1/admin.proto")
HEAD = """# Wire

The services of the gRPC port, made of `protos/ray_moe/v1`. The port also answers the standard health and reflection
services, so that `grpcurl` works without these files, and the [Open Inference
Protocol](https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol)
(`inference.GRPCInferenceService`), whose description is `protos/inference/grpc_service.proto`.
"""
# Numbers of the fields in descriptor.proto, of which paths in the source information are made.
MESSAGE, ENUM, SERVICE, FIELD, VALUE, METHOD, SYNTAX = 4, 5, 6, 2, 2, 2, 12
_TYPES = {
    number: name.removeprefix("TYPE_").lower() for name, number in descriptor_pb2.FieldDescriptorProto.Type.items()
}


def page() -> str:
    """Markdown."""
    parts = [HEAD]
    for file in _described():
        comments = {tuple(each.path): each.leading_comments for each in file.source_code_info.location}
        parts += [f"## {Path(file.name).name}", _prose(comments.get((SYNTAX,), ""))]
        parts += _services(file, comments)
        parts += _messages(file, comments)
        parts += _enums(file, comments)
    return "\n\n".join(part for part in parts if part) + "\n"


def _described() -> Iterator[Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set"
        arguments = ["protoc", f"--proto_path={PROTOS}", "--include_source_info", f"--descriptor_set_out={out}", *FILES]
        if protoc.main(arguments):
            raise RuntimeError(f"protoc cannot read {', '.join(FILES)} below {PROTOS}; see its message above")
        described = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    yield from sorted(described.file, key=lambda file: FILES.index(file.name))


def _services(file: Any, comments: Any) -> Iterator[str]:
    for number, service in enumerate(file.service):
        yield f"### service {service.name}"
        yield _prose(comments.get((SERVICE, number), ""))
        rows = []
        for position, method in enumerate(service.method):
            asked = _stream(method.client_streaming, method.input_type)
            answered = _stream(method.server_streaming, method.output_type)
            text = comments.get((SERVICE, number, METHOD, position), "")
            rows.append((f"`{method.name}`", asked, answered, cell(text)))
        yield table(("call", "request", "response", "meaning"), rows)


def _messages(file: Any, comments: Any) -> Iterator[str]:
    for number, message in enumerate(file.message_type):
        yield f"### {message.name}"
        yield _prose(comments.get((MESSAGE, number), ""))
        rows = []
        for position, field in enumerate(message.field):
            text = comments.get((MESSAGE, number, FIELD, position), "")
            in_choice = field.HasField("oneof_index") and not field.proto3_optional
            choice = f"One of `{message.oneof_decl[field.oneof_index].name}`. " if in_choice else ""
            rows.append((f"`{field.name}`", _type(field), str(field.number), cell(choice + text)))
        yield table(("field", "type", "number", "meaning"), rows) if rows else "Has no fields."


def _enums(file: Any, comments: Any) -> Iterator[str]:
    for number, enum in enumerate(file.enum_type):
        yield f"### {enum.name}"
        yield _prose(comments.get((ENUM, number), ""))
        yield table(("name", "number"), [(f"`{value.name}`", str(value.number)) for value in enum.value])


def _type(field: Any) -> str:
    name = _link(field.type_name) if field.type_name else _TYPES[field.type]
    if field.label == descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED:
        return f"list of {name}"
    return f"{name}, optional" if field.proto3_optional else name


def _stream(is_stream: bool, name: str) -> str:
    return f"stream of {_link(name)}" if is_stream else _link(name)


def _link(name: str) -> str:
    short = name.rpartition(".")[2]
    return f"[{short}](#{short.lower()})"


def _prose(comment: str) -> str:
    """A comment as paragraphs; what it sets in columns stays as it is."""
    if not any(line.startswith("   ") for line in comment.splitlines()):
        return "\n".join(line.removeprefix(" ") for line in comment.splitlines())
    return "```text\n" + "\n".join(line.removeprefix(" ") for line in comment.strip("\n").splitlines()) + "\n```"
