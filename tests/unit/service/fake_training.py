"""Training without a trainer: it keeps what it is asked, and answers what it is told to."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from ray_moe.types import (
    GenerateChunk,
    GenerateRequest,
    MicroBatch,
    MicroBatchReport,
    SavedState,
    StepOptions,
    StepResult,
    TrainingState,
    VersionStatus,
)

RESULT = StepResult(7, 2.5, 0.75, 1e-3, 2, 2**33)
LOADS: dict[str, tuple[int, ...]] = {"model.layers.0.mlp.experts": (3, 0, 1), "model.layers.1.mlp.experts": (0, 0, 0)}
STATE = TrainingState("run", 7, ("a", "b"), (RESULT,), (5, 7))


class FakeTraining:
    """See the module."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.failure: BaseException | None = None

    def _ask(self, *what: Any) -> None:
        self.asked.append(what)
        if self.failure is not None:
            raise self.failure

    async def forward_backward(self, micro: MicroBatch) -> MicroBatchReport:
        self._ask("forward_backward", micro)
        return MicroBatchReport(micro.micro_id, 8, 2.25, micro.input_ids.size, LOADS)

    async def optim_step(self, options: StepOptions) -> StepResult:
        self._ask("optim_step", options)
        return RESULT

    async def train_step(self, micros: Sequence[MicroBatch], options: StepOptions) -> StepResult:
        self._ask("train_step", micros, options)
        return RESULT

    async def discard(self, micro_ids: Collection[str]) -> tuple[str, ...]:
        self._ask("discard", tuple(micro_ids))
        return tuple(micro_ids)[:1]

    async def sample(self, request: GenerateRequest) -> GenerateChunk:
        self._ask("sample", request)
        return GenerateChunk((4, 2), "", "length", len(request.token_ids or ()))

    async def save_state(self) -> SavedState:
        self._ask("save_state")
        return SavedState(7, "/saved/step-00000007")

    async def load_state(self, step: int | None) -> SavedState:
        self._ask("load_state", step)
        return SavedState(5, "/saved/step-00000005")

    async def state(self) -> TrainingState:
        self._ask("state")
        return STATE

    async def publish(self) -> tuple[VersionStatus, int]:
        self._ask("publish")
        return VersionStatus(3, "/saved/published", "current"), 7
