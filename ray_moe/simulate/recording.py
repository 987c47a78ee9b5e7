"""Traffic of a real service: read from its status, kept in a file, and replayed.

The file is an ``.npz`` of plain arrays (never pickled objects): `VERSION`, the layers' names and numbers of experts,
and for each step its duration and the rows that were routed in it. What is read is checked before it is believed.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ray_moe.errors import InvalidConfig, Unavailable
from ray_moe.simulate.trace import Floats, Ints, Step
from ray_moe.types import LayerPath, ServiceStatus

VERSION = 1
FIELDS = ("version", "layers", "num_experts", "duration_s", "rows")


@dataclass(frozen=True, slots=True, eq=False)
class RecordedTrace:
    """Steps that were recorded; see `Trace`."""

    layers: tuple[LayerPath, ...]
    num_experts: tuple[int, ...]
    step_s: Floats
    """[S] duration of each step."""
    rows: Ints
    """[S, L, E]"""

    @property
    def duration_s(self) -> float:
        return float(self.step_s.sum())

    def __iter__(self) -> Iterator[Step]:
        return (Step(float(duration_s), rows) for duration_s, rows in zip(self.step_s, self.rows, strict=True))

    def first(self, seconds: float) -> RecordedTrace:
        """The steps that begin within the first so many seconds; one at least."""
        begins = np.cumsum(self.step_s) - self.step_s
        number = max(1, int((begins < seconds).sum()))
        return RecordedTrace(self.layers, self.num_experts, self.step_s[:number], self.rows[:number])

    @classmethod
    def of(cls, num_experts: Mapping[LayerPath, int], steps: list[Step]) -> RecordedTrace:
        """From steps, at least one."""
        return cls(
            tuple(num_experts),
            tuple(num_experts.values()),
            np.array([step.duration_s for step in steps]),
            np.array([step.rows for step in steps], dtype=np.int64),
        )

    # --- files -----------------------------------------------------------------------------------------------
    def save(self, file: Path) -> None:
        """Write the file, whole or not at all. Raises: `InvalidConfig` where that cannot be."""
        part = file.with_name(f"{file.name}.part")
        try:
            with part.open("wb") as out:
                np.savez_compressed(
                    out,
                    version=np.array(VERSION),
                    layers=np.array(self.layers),
                    num_experts=np.array(self.num_experts),
                    duration_s=self.step_s,
                    rows=self.rows,
                )
            os.replace(part, file)
        except OSError as error:
            raise InvalidConfig(f"cannot write {file}: {error.strerror}") from error

    @classmethod
    def load(cls, file: Path) -> RecordedTrace:
        """Read a file. Raises: `InvalidConfig` for one that cannot be read, or is no trace of this version."""
        try:
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in FIELDS if name in archive}
        except OSError as error:
            if error.strerror is None:
                raise _not_a_trace(file, str(error)) from error
            raise InvalidConfig(f"cannot read the trace {file}: {error.strerror}") from error
        except (ValueError, EOFError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
            raise _not_a_trace(file, "it is something else, or a part of it is missing") from error
        missing = [name for name in FIELDS if name not in arrays]
        if missing:
            raise _not_a_trace(file, f"it has no {', '.join(missing)}")
        if arrays["version"].ndim or arrays["version"] != VERSION:
            raise InvalidConfig(
                f"{file} is a trace of version {arrays['version']}, and this ray-moe reads version {VERSION}; record "
                "it again with this one, or read it with the one that wrote it"
            )
        trace = cls(
            tuple(str(name) for name in np.atleast_1d(arrays["layers"])),
            tuple(int(number) for number in _numbers(file, arrays, "num_experts", 1)),
            _numbers(file, arrays, "duration_s", 1).astype(np.float64),
            _numbers(file, arrays, "rows", 3).astype(np.int64),
        )
        trace._check(file)
        return trace

    def _check(self, file: Path) -> None:
        """Raises: `InvalidConfig` for values that contradict each other."""
        num_layers, num_steps = len(self.layers), len(self.step_s)
        widest = max(self.num_experts, default=0)
        if self.rows.shape != (num_steps, num_layers, widest) or len(self.num_experts) != num_layers:
            raise _not_a_trace(
                file,
                f"its rows are {list(self.rows.shape)} where {num_steps} steps, {num_layers} layers and {widest} "
                "experts are expected",
            )
        if not self.rows.size or min(self.num_experts) < 1 or len(set(self.layers)) < num_layers:
            raise _not_a_trace(file, "it has no steps, a layer without experts, or two layers of one name")
        if not (np.isfinite(self.step_s).all() and (self.step_s > 0).all()):
            raise _not_a_trace(file, "a step has no duration above 0")
        beyond = np.arange(widest) >= np.array(self.num_experts)[:, None]
        if (self.rows < 0).any() or self.rows[:, beyond].any():
            raise _not_a_trace(file, "it has negative rows, or rows of experts that there are not")


def _numbers(file: Path, arrays: Mapping[str, Any], name: str, num_axes: int) -> Any:
    array = arrays[name]
    kinds = "iuf" if name == "duration_s" else "iu"
    if array.ndim != num_axes or array.dtype.kind not in kinds:
        raise _not_a_trace(file, f"its {name} has {array.ndim} axes of {array.dtype}, not {num_axes} of numbers")
    return array


def _not_a_trace(file: Path, why: str) -> InvalidConfig:
    return InvalidConfig(f"{file} is not a trace: {why}; record one with `ray-moe simulate --save FILE`")


# --- from a service ------------------------------------------------------------------------------------------
def watch(
    look: Callable[[], ServiceStatus],
    seconds: float,
    every_s: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> Iterator[tuple[dict[LayerPath, int], Step]]:
    """Look at a service again and again: the experts of each layer, and what was routed since the last look.

    A router that has started anew counts from 0, and so do we; a lost look only makes a longer step.

    Args:
        look: asks for the status; its errors end the watch.

    Raises: `Unavailable` for a service that counts nothing yet, or has become another model.
    """
    before, before_s = _counts(look()), clock()
    if not before:
        raise Unavailable("the service has no layers to count yet; wait until `ray-moe status` says that it is ready")
    num_experts = {layer: len(counts) for layer, counts in before.items()}
    end_s = before_s + seconds
    now_s = before_s
    while now_s < end_s:
        sleep(min(every_s, end_s - now_s))
        now, now_s = _counts(look()), clock()
        if not now or now_s <= before_s:
            continue  # its router is starting
        if {layer: len(counts) for layer, counts in now.items()} != num_experts:
            raise Unavailable("the service serves another model than when the recording began; record again")
        rows = np.zeros((len(now), max(num_experts.values())), dtype=np.int64)
        for number, layer in enumerate(num_experts):
            counts, past = now[layer], before[layer]
            rows[number, : len(counts)] = counts - past if (counts >= past).all() else counts
        yield num_experts, Step(now_s - before_s, rows)
        before, before_s = now, now_s


def _counts(status: ServiceStatus) -> dict[LayerPath, Ints]:
    counted = {path: np.array(counts, dtype=np.int64) for path, counts in status.tokens_per_expert.items()}
    return {path: counts for path, counts in counted.items() if len(counts)}
