"""How the configuration is put together: flags > environment > file > defaults.

An unknown key or a wrong value is refused before anything starts, in words that name the key, where it came from and
what was expected. The command line calls `load_config`; nothing below this floor reads a file or a variable.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from ray_moe.config import Config
from ray_moe.config_types import BYTE_UNITS, Section
from ray_moe.errors import InvalidConfig

ENV_PREFIX = "RAY_MOE__"

Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Setting:
    """A value somebody gave, and where: `config.yaml`, `environment variable RAY_MOE__...`, `flag --port`."""

    value: object
    source: str


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """The tree in force, and the source of each setting that is not left at its default."""

    config: Config
    sources: Mapping[Key, str]


def load_config(
    file: Path | None = None, environ: Mapping[str, str] | None = None, flags: Sequence[tuple[str, object, str]] = ()
) -> LoadedConfig:
    """The tree from a YAML file, the environment and flags, each overriding the one before.

    Args:
        file: YAML with the tree's own shape; keys that are left out keep their defaults.
        environ: variables such as ``RAY_MOE__SERVER__PORT=9000``; others are passed over.
        flags: (dotted key, value, name of the flag), e.g. ``("server.port", 9000, "--port")``, the last one wins.

    Raises: `InvalidConfig` for a file that cannot be read, an unknown key or a wrong value.
    """
    given: dict[Key, Setting] = {}
    if file is not None:
        for key, value in _flatten(_read_yaml(file), Config, str(file)):
            given[key] = Setting(value, str(file))
    for name, text in sorted((environ or {}).items()):
        if name.startswith(ENV_PREFIX):
            dotted = ".".join(name.removeprefix(ENV_PREFIX).lower().split("__"))
            _set(given, dotted, text, f"environment variable {name}")
    for dotted, value, flag in flags:
        _set(given, dotted, value, f"flag {flag}")
    return LoadedConfig(_build(given), {key: setting.source for key, setting in given.items()})


def config_from(arguments: Mapping[str, object]) -> Config:
    """The tree from arguments as Ray Serve passes them on: sections as in a file, or dotted keys with text as in flags.

    Raises: `InvalidConfig` for an unknown key or a wrong value.
    """
    given: dict[Key, Setting] = {}
    for name, value in arguments.items():
        source = f"argument {name}"
        if isinstance(value, dict):
            for key, inner in _flatten({name: value}, Config, source):
                given[key] = Setting(inner, source)
        else:
            _set(given, name, value, source)
    return _build(given)


def _build(given: Mapping[Key, Setting]) -> Config:
    tree: dict[str, Any] = {}
    for key, setting in given.items():
        section = tree
        for name in key[:-1]:
            section = section.setdefault(name, {})
        section[key[-1]] = setting.value
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise InvalidConfig(_explain(error, given)) from None


def show_config(loaded: LoadedConfig) -> str:
    """The tree in force as YAML that can be loaded again, with the source of each given value as a comment."""
    lines: list[str] = []
    within: Key = ()
    for key in _keys(Config):
        value: Any = loaded.config
        for name in key:
            value = getattr(value, name)
        for depth, name in enumerate(key[:-1]):
            if key[: depth + 1] != within[: depth + 1]:
                lines.append(f"{'  ' * depth}{name}:")
        within = key[:-1]
        if key[-1].endswith("_bytes") and value is not None:
            value = _format_bytes(value)
        text = yaml.safe_dump([value], default_flow_style=True, width=float("inf"), allow_unicode=True).strip()[1:-1]
        source = f"  # {loaded.sources[key]}" if key in loaded.sources else ""
        lines.append(f"{'  ' * (len(key) - 1)}{key[-1]}: {text}{source}")
    return "\n".join(lines) + "\n"


def _read_yaml(file: Path) -> Mapping[str, object]:
    try:
        tree = _parse_yaml(file.read_text(encoding="utf-8"), str(file))
    except OSError as error:
        raise InvalidConfig(f"cannot read the configuration {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidConfig(f"{file} is not YAML: it is not UTF-8 text") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InvalidConfig(f"{file} should hold settings such as 'server: {{port: 8476}}', not a {_kind(tree)}")
    return tree


def _parse_yaml(text: str, source: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidConfig(f"{source} is not YAML: {' '.join(str(error).split())}") from error


def _flatten(
    tree: Mapping[str, object], section: type[Section], source: str, above: Key = ()
) -> Iterator[tuple[Key, object]]:
    """(key, value) of each setting in a nested mapping; refuses keys that do not exist."""
    for name, value in tree.items():
        key = (*above, str(name))
        inner = _section(key)
        if inner is None:
            yield _known(key, source), value
        elif isinstance(value, dict):
            yield from _flatten(value, inner, source, key)
        elif value is not None:
            raise InvalidConfig(f"{source}: {_section_hint(key, inner)}, not a {_kind(value)}")


def _set(given: dict[Key, Setting], dotted: str, value: object, source: str) -> None:
    """Put one setting given by a dotted key; text becomes what the setting's type asks for."""
    names = tuple(dotted.split("."))
    inner = _section(names)
    if inner is not None:
        raise InvalidConfig(f"{source}: {_section_hint(names, inner)}; set one of them")
    mapping_key = next((names[:depth] for depth in (1, 2) if _field_is_mapping(names[:depth])), None)
    if mapping_key is not None and len(names) > len(mapping_key):  # experts.resources.NAME=1; NAME may have dots
        before = given.get(mapping_key)
        entries = dict(before.value) if before is not None and isinstance(before.value, Mapping) else {}
        given[mapping_key] = Setting({**entries, ".".join(names[len(mapping_key) :]): value}, source)
        return
    key = _known(names, source)
    if isinstance(value, str):
        if mapping_key is not None:
            value = _parse_yaml(value, source)
        elif value.lower() in ("null", "none", "") and type(None) in get_args(_field(key).annotation):
            value = None
    given.pop(key, None)
    given[key] = Setting(value, source)


# --- The shape of the tree -----------------------------------------------------------------------------------
def _keys(section: type[Section], above: Key = ()) -> Iterator[Key]:
    """Every setting of the tree, in the order in which it is written."""
    for name in section.model_fields:
        key = (*above, name)
        inner = _section(key)
        if inner is None:
            yield key
        else:
            yield from _keys(inner, key)


def _section(key: Key) -> type[Section] | None:
    """The class of the section that `key` names; None for anything else."""
    section: type[Section] = Config
    for name in key:
        field = section.model_fields.get(name)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
            return None
        section = field.annotation
    return section


def _field(key: Key) -> Any:
    section = _section(key[:-1])
    return None if section is None or not key else section.model_fields.get(key[-1])


def _field_is_mapping(key: Key) -> bool:
    field = _field(key)
    return field is not None and getattr(field.annotation, "__origin__", None) is dict


def _known(key: Key, source: str) -> Key:
    """`key` itself if the tree has it, or `InvalidConfig` with its nearest neighbour."""
    if _field(key) is not None:
        return key
    dotted = ".".join(key)
    section = _section(key[:-1])
    every = [".".join(known) for known in _keys(Config)]
    near = [known for known in every if known.split(".")[-1] == key[-1]]
    beside = difflib.get_close_matches(key[-1], section.model_fields, n=1) if section else []
    near = near or [".".join((*key[:-1], name)) for name in beside]
    near = near or ([] if section else difflib.get_close_matches(dotted, every, n=1))
    hint = f"did you mean '{near[0]}'?" if near else "`ray-moe config --show` lists all there are"
    raise InvalidConfig(f"{source}: there is no setting '{dotted}'; {hint}")


def _section_hint(key: Key, section: type[Section]) -> str:
    return f"'{'.'.join(key)}' is a section with the settings {', '.join(section.model_fields)}"


def _explain(error: ValidationError, given: Mapping[Key, Setting]) -> str:
    """One line for each wrong value: key, value, source, what was expected, and what the setting means."""
    lines = []
    for problem in error.errors():
        location = tuple(str(part) for part in problem["loc"])
        key = next((location[:depth] for depth in (2, 1) if _field(location[:depth]) is not None), location)
        said = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
        setting = given.get(key)
        if setting is None or _section(key) is not None:  # a contradiction between settings of one section, or of all
            sources = sorted({given[k].source for k in given if k[: len(key)] == key})
            lines.append(f"{'.'.join(key) or 'settings'}: {said} ({', '.join(sources)})")
            continue
        meaning = " ".join((_field(key).description or "").split())
        lines.append(f"{'.'.join(location)} = {problem['input']!r} ({setting.source}): {said}. It is: {meaning}")
    return "\n".join(lines)


def _kind(value: object) -> str:
    return {"str": "text", "int": "number", "float": "number", "bool": "truth value"}.get(
        type(value).__name__, type(value).__name__
    )


def _format_bytes(num_bytes: int) -> str | int:
    for unit in ("GiB", "MiB", "KiB"):
        size = BYTE_UNITS[unit.lower()]
        if num_bytes >= size and num_bytes % size == 0:
            return f"{num_bytes // size}{unit}"
    return num_bytes
