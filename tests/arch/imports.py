"""Which third-party packages, and which statements, may stand where in the package. Read from the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ALLOWED: dict[str, tuple[str, ...]] = {
    "ray": ("actors/", "transport/object_store.py", "service/", "cli/"),
    "grpc": (
        "transport/grpc",
        "wire/status.py",
        "wire/v1/",
        "wire/kserve/",
        "service/grpc/",
        "service/kserve/",
        "client/",
    ),
    "pydantic": (
        "config.py",
        "config_methods.py",
        "config_sources.py",
        "config_train.py",
        "config_types.py",
        "service/openai/",
    ),
    "fastapi": ("service/openai/",),
    "starlette": ("service/openai/", "service/dashboard/"),
    "uvicorn": ("service/openai/",),
    "prometheus_client": ("service/metrics",),
    "transformers": ("models/", "runtime/packing", "runtime/sampling.py"),
    "opentelemetry": ("actors/otel.py",),
    "typer": ("cli/",),
    "rich": ("cli/",),
    "yaml": ("config_sources.py",),
    "cryptography": ("service/membership.py",),
    "bitsandbytes": ("ops/optimizers.py",),
}
"""Package -> beginnings of the paths (below ray_moe/) that may import it. Whoever is not named may not."""

FORBIDDEN_EVERYWHERE = ("pickle", "cloudpickle", "dill")
"""Bytes that run code when they are read; safetensors, msgpack and protobuf are used instead."""


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, top-level package) of every import of a module, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            yield node.lineno, node.module.split(".")[0]


def violations(package: Path) -> list[str]:
    """`path:line: what is wrong` for every breach below `package`."""
    found = []
    for file in sorted(package.rglob("*.py")):
        path = file.relative_to(package).as_posix()
        tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
        for line, name in imported(tree):
            if name in FORBIDDEN_EVERYWHERE:
                found.append(f"{path}:{line}: {name} is used nowhere")
            elif name in ALLOWED and not path.startswith(ALLOWED[name]):
                found.append(f"{path}:{line}: {name} may be imported only in {', '.join(ALLOWED[name])}")
        found += [
            f"{path}:{node.lineno}: assert vanishes under -O; raise an error of ray_moe.errors"
            for node in ast.walk(tree)
            if isinstance(node, ast.Assert)
        ]
        if file.name == "__init__.py" and file.parent != package and file.read_text(encoding="utf-8").strip():
            found.append(f"{path}:1: an __init__.py below the root stays empty")
    return found
