"""The seam between the front doors and what does the work.

A front door turns bytes into these calls and has checked everything that can be checked without the model (see
`service/validation.py`); the router implements them. Letters in shapes: T tokens, D width of the layer, E experts of
the layer, K experts per token.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ray_moe.runtime.measures import Measures
from ray_moe.types import (
    CanaryRequest,
    ChaosReport,
    ChaosRequest,
    GenerateChunk,
    GenerateRequest,
    HostId,
    LayerPath,
    LayerSpec,
    MicroBatch,
    MicroBatchReport,
    PlanSummary,
    RouterAddress,
    RoutingTable,
    SavedState,
    ServiceStatus,
    StepOptions,
    StepResult,
    TrainingState,
    VersionStatus,
)

FloatArray = NDArray[np.float16] | NDArray[np.float32] | NDArray[np.float64]


class Training(Protocol):
    """Training of the model that is served; see `training/session.py` for what its methods do and raise."""

    async def forward_backward(self, micro: MicroBatch) -> MicroBatchReport: ...

    async def optim_step(self, options: StepOptions) -> StepResult: ...

    async def train_step(self, micros: Sequence[MicroBatch], options: StepOptions) -> StepResult: ...

    async def discard(self, micro_ids: Collection[str]) -> tuple[str, ...]: ...

    async def sample(self, request: GenerateRequest) -> GenerateChunk:
        """Continue a prompt of tokens with the weights that are being trained."""
        ...

    async def save_state(self) -> SavedState: ...

    async def load_state(self, step: int | None) -> SavedState: ...

    async def state(self) -> TrainingState: ...

    async def publish(self) -> tuple[VersionStatus, int]:
        """Make what was learned the current version of the weights; with the step that it is of."""
        ...


class Backend(Protocol):
    """What a front door serves. Every method may raise any of `ray_moe.errors`, which the caller then gets."""

    @property
    def ready(self) -> bool:
        """False while starting or stopping: only `status`, `routers` and `placement` are called then; it may refuse."""
        ...

    @property
    def layers(self) -> Mapping[LayerPath, LayerSpec]:
        """The model's MoE layers, in the order of the model. Known once `ready`, as are the properties below."""
        ...

    @property
    def layers_with_gate(self) -> frozenset[LayerPath]:
        """Layers whose whole block (gate, routed and shared experts) can be called on its own."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_positions(self) -> int | None:
        """Most tokens of a prompt and its continuation together; None when the model has no such bound."""
        ...

    @property
    def model_name(self) -> str:
        """The name that clients ask for."""
        ...

    @property
    def has_tokenizer(self) -> bool: ...

    async def tokenize(self, text: str) -> tuple[int, ...]:
        """The tokens of a text as a prompt. Raises: `InvalidRequest` for a model without a tokenizer."""
        ...

    async def tokenize_chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """The prompt that the checkpoint's chat template makes of a conversation, up to where the answer begins.

        Args:
            messages: each with ``role`` and ``content``, and whatever else the template knows.

        Raises: `InvalidRequest` for a checkpoint without a chat template, and for what its template refuses.
        """
        ...

    def token_text(self, token_id: int) -> str:
        """The text of one token by itself; empty for a model without a tokenizer."""
        ...

    async def forward(
        self, layer: LayerPath, hidden: FloatArray, routing: tuple[NDArray[np.int64], FloatArray] | None
    ) -> FloatArray:
        """One batch through one layer: [T, D] in, [T, D] out, T >= 1.

        With `routing`, (index [T, K] in 0..E where E is "no expert", weight [T, K]): the routed experts only. Without:
        the model's own block. The arrays are C-contiguous and the backend's to keep. They have the dtype of the wire,
        bfloat16 as the same numbers in float32. The layer computes in its own dtype; the result may have any float
        dtype, and travels in the dtype in which `hidden` came.
        """
        ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        """Continue a prompt, piece by piece. Closing the generator, or cancelling its consumer, cancels the work.

        The front door has checked all but the length of a prompt given as text, which only the tokenizer tells:
        raise `InvalidRequest` with the numbers when it does not fit in `max_positions` or has no tokens at all.
        """
        ...

    async def routers(self) -> tuple[RouterAddress, ...]:
        """Where clients reach the routers of the service, this one among them."""
        ...

    async def status(self) -> ServiceStatus: ...

    def measures(self) -> Measures:
        """What this router has counted, without asking anybody. Also before it is `ready`."""
        ...

    async def placement(self) -> RoutingTable: ...

    async def plan(self, dry_run: bool) -> PlanSummary:
        """A better placement; unless `dry_run` it is also carried out, beside the requests."""
        ...

    async def resize(self, num_actors: int) -> None:
        """Begin to change the number of expert actors."""
        ...

    async def drain(self, target: str, replace: bool) -> tuple[HostId, ...]:
        """Begin to empty and end an actor, or those of a node; returns them."""
        ...

    async def publish(self, model: str) -> VersionStatus:
        """Make a checkpoint the current version of the weights; returns when it is."""
        ...

    async def roll_back(self, to: int | None) -> VersionStatus:
        """Make an older version current, `to` or the newest before the present one; returns when it is."""
        ...

    async def begin_canary(self, request: CanaryRequest) -> VersionStatus:
        """Try out another version of one expert; returns when that has begun."""
        ...

    async def end_canary(self, promote: bool) -> VersionStatus:
        """Make what is tried out the current version, or let it go; the version that is current then."""
        ...

    async def versions(self) -> tuple[VersionStatus, ...]:
        """Of the weights, the oldest first."""
        ...

    @property
    def training(self) -> Training: ...

    async def chaos(self, request: ChaosRequest) -> ChaosReport:
        """Do what `request` says, and tell when it is over what came of it."""
        ...
