"""Which run a file is of: told by what is in it, not by its name. Called by `cli/report.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray_moe.errors import InvalidConfig
from ray_moe.report.benchmarks import benchmark
from ray_moe.report.parts import Run
from ray_moe.report.sections import chaos, simulation, training

KINDS = (
    "what `ray-moe train --json`, `ray-moe chaos --json` or `ray-moe simulate --json` has written, or a file of "
    "benchmarks/results"
)


def read(files: Sequence[Path]) -> list[Run]:
    """A run for each file, but one for all faults together.

    Raises: `InvalidConfig` for a file that cannot be read, or is of nothing that is known.
    """
    runs: list[Run] = []
    faults: list[tuple[Mapping[str, Any], str]] = []
    for file in files:
        documents = _documents(file)
        with _whole(str(file)):
            if all(_is(each, "kind", "targets", "stall_s") for each in documents):
                faults += [(each, str(file)) for each in documents]
            elif all(_is(each, "step", "steps") for each in documents):
                runs.append(training(documents, str(file)))
            elif len(documents) == 1 and _is(documents[0], "virtual_s", "per_batch", "steps"):
                runs.append(simulation(documents[0], str(file)))
            elif len(documents) == 1 and _is(documents[0], "machine"):
                runs.append(benchmark(documents[0], file.stem, str(file)))
            else:
                raise InvalidConfig(f"{file} is JSON, but of no run that is known; expected {KINDS}")
    if not faults:
        return runs
    with _whole(", ".join(dict.fromkeys(source for _, source in faults))):
        return [chaos(faults), *runs]


@contextmanager
def _whole(source: str) -> Iterator[None]:
    """Around the making of a run: what is missing in a file, or of another type, is the file's fault."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidConfig(f"{source} is not whole ({type(error).__name__}: {error}); expected {KINDS}") from error


def _documents(file: Path) -> list[Any]:
    """One JSON document, or one for each line."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from error
    try:
        return [json.loads(text)]
    except json.JSONDecodeError:
        pass
    lines = [line for line in text.splitlines() if line.strip()]
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines) > 1:  # who wrote it was ended in the middle
                break
            raise InvalidConfig(f"{file}, line {number}, is no JSON: {error.msg}; expected {KINDS}") from error
    if not found:
        raise InvalidConfig(f"{file} is empty; expected {KINDS}")
    return found


def _is(document: Any, *keys: str) -> bool:
    return isinstance(document, Mapping) and all(key in document for key in keys)
