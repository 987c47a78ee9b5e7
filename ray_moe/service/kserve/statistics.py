"""How often each model was asked, and how long the parts of the answers took. Used in one event loop."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from ray_moe.service.kserve.catalog import VERSION, Model
from ray_moe.wire.kserve import grpc_service_pb2 as pb

Phase = Literal["queue", "compute_input", "compute_infer", "compute_output"]


class Stopwatch:
    """The phases of one request, in nanoseconds."""

    def __init__(self, arrived_ns: int) -> None:
        self.arrived_ns = arrived_ns
        self.phases: defaultdict[Phase, int] = defaultdict(int)
        self._last_ns = arrived_ns

    def lap(self, phase: Phase | None, at_ns: int | None = None) -> None:
        """What went by since the last lap, until now or `at_ns`, was `phase`; None is nobody's time."""
        now_ns = time.perf_counter_ns() if at_ns is None else at_ns
        if phase is not None:
            self.phases[phase] += now_ns - self._last_ns
        self._last_ns = now_ns


@dataclass(slots=True)
class _Sum:
    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        self.count += 1
        self.ns += ns

    def to_proto(self) -> pb.StatisticDuration:
        return pb.StatisticDuration(count=self.count, ns=self.ns)


@dataclass(slots=True)
class _Totals:
    last_ms: int = 0
    success: _Sum = field(default_factory=_Sum)
    fail: _Sum = field(default_factory=_Sum)
    phases: defaultdict[Phase, _Sum] = field(default_factory=lambda: defaultdict(_Sum))


class Statistics:
    """The totals since the server started."""

    def __init__(self) -> None:
        self._totals: defaultdict[str, _Totals] = defaultdict(_Totals)

    @contextmanager
    def request(self, model: Model, arrived_ns: int) -> Iterator[Stopwatch]:
        """Around a request to `model` that came at `arrived_ns` of `time.perf_counter_ns`: counts it when it ends."""
        stopwatch = Stopwatch(arrived_ns)
        totals = self._totals[model.name]
        try:
            yield stopwatch
        except BaseException:
            totals.fail.add(time.perf_counter_ns() - arrived_ns)
            raise
        totals.success.add(time.perf_counter_ns() - arrived_ns)
        totals.last_ms = time.time_ns() // 1_000_000
        for phase, ns in stopwatch.phases.items():
            totals.phases[phase].add(ns)

    def to_proto(self, models: list[Model]) -> pb.ModelStatisticsResponse:
        return pb.ModelStatisticsResponse(
            model_stats=[_to_proto(each.name, self._totals[each.name]) for each in models]
        )


def _to_proto(name: str, totals: _Totals) -> pb.ModelStatistics:
    phases = {phase: total.to_proto() for phase, total in totals.phases.items()}
    return pb.ModelStatistics(
        name=name,
        version=VERSION,
        last_inference=totals.last_ms,
        inference_count=totals.success.count,
        execution_count=totals.success.count,
        inference_stats=pb.InferStatistics(success=totals.success.to_proto(), fail=totals.fail.to_proto(), **phases),
    )
