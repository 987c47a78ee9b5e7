"""The page of all settings, made of the tree that validates them (`ray_moe/config.py`). Called by `hooks.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ray_moe.config import Config
from ray_moe.config_types import Section
from tools.docs.tables import cell, table

HEAD = """# Settings

Every key of the configuration, with its type, range, default and meaning, made of the tree that validates it. A file
(`--config`) has them nested, a flag (`--set server.port=9000`) and a variable (`RAY_MOE__SERVER__PORT=9000`) by their
path; `ray-moe config --show` prints what is in force and where it came from. Sizes are numbers of bytes or texts such
as `256MiB`; names that end in `_s` are seconds.
"""


def page() -> str:
    """Markdown."""
    schema = Config.model_json_schema()
    parts = [HEAD]
    for path, section in _sections(Config):
        parts.append(f"## {path}" if path else "## The top level")
        parts.append(" ".join((section.__doc__ or "").split()))
        described = _schema_of(section, schema)["properties"]
        rows = [
            _row(path, name, field, described[name])
            for name, field in section.model_fields.items()
            if not _inner(field)
        ]
        parts.append(table(("setting", "type", "default", "meaning"), rows))
    return "\n\n".join(parts) + "\n"


def _sections(section: type[Section], path: str = "") -> Iterator[tuple[str, type[Section]]]:
    yield path, section
    for name, field in section.model_fields.items():
        inner = _inner(field)
        if inner is not None:
            yield from _sections(inner, f"{path}.{name}".lstrip("."))


def _inner(field: Any) -> type[Section] | None:
    """The section that a field is; also of one that may be none."""
    options = (field.annotation, *getattr(field.annotation, "__args__", ()))
    return next((each for each in options if isinstance(each, type) and issubclass(each, Section)), None)


def _schema_of(section: type[Section], schema: dict[str, Any]) -> dict[str, Any]:
    described: dict[str, Any] = schema if section is Config else schema["$defs"][section.__name__]
    return described


def _row(path: str, name: str, field: Any, described: dict[str, Any]) -> tuple[str, ...]:
    default = field.get_default(call_default_factory=True)
    key = f"{path}.{name}".lstrip(".")
    return f"`{key}`", cell(_type(name, described)), f"`{_shown(name, default)}`", cell(field.description or "")


def _type(name: str, described: dict[str, Any]) -> str:
    if "anyOf" in described:
        return " or ".join(_type(name, each) for each in described["anyOf"])
    if "enum" in described:
        return ", ".join(f"`{value}`" for value in described["enum"])
    kind: str = described.get("type", "")
    if kind == "array":
        items = described.get("items") or (described.get("prefixItems") or [{}])[0]
        return f"list of {_type('', items)}"
    if kind == "object":
        return f"map of names to {_type('', described.get('additionalProperties', {}))}"
    if kind == "integer" and name.endswith("_bytes"):
        kind = "size"
    return {"null": "`null`", "boolean": "true or false", "string": "text"}.get(kind, kind) + _range(described)


def _range(described: dict[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return "".join(f" {sign} {described[word]:,}" for word, sign in signs.items() if word in described)


def _shown(name: str, value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if name.endswith("_bytes") and isinstance(value, int) and value:
        for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
            if value % size == 0:
                return f"{value // size}{unit}"
    if isinstance(value, tuple):
        return str(list(value))
    return str(value) if value != "" else '""'
