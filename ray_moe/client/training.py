"""Training through the client: micro-batches in, steps out, by gRPC.

    with Client("127.0.0.1:8476") as client:
        for _ in range(10):
            print(client.training.train_step({"input_ids": [[5, 6, 7, 8]]}).loss)

Called as `Client.training`; `ray_moe.client.aio_training` is the same for asyncio.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ray_moe.client.requests import GenerateOptions, Generation, generate_request
from ray_moe.client.sync_routers import SyncRouters
from ray_moe.client.training_requests import (
    Batch,
    discard_request,
    forward_backward_request,
    load_state_request,
    step_options,
    train_step_request,
)
from ray_moe.types import MicroBatchReport, SavedState, StepResult, TrainingState, VersionStatus
from ray_moe.wire import messages
from ray_moe.wire.v1 import training_pb2 as pb

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Training:
    """The training of a service. One step is open at a time, for all clients together. Thread-safe.

    Calls are made again as those of `Client` are: what comes twice counts once, also when actors die meanwhile. Only
    `publish` is made once.
    """

    def __init__(self, routers: SyncRouters, timeout: Callable[[float | None], float | None]) -> None:
        self._routers = routers
        self._timeout = timeout

    def forward_backward(
        self,
        batch: Batch,
        *,
        weight: float = 1.0,
        micro_id: str | None = None,
        timeout_s: float | None = None,
    ) -> MicroBatchReport:
        """Put a micro-batch into the open step: its loss, and the rows of each expert.

        Args:
            batch: ``input_ids`` and ``labels``, [B, S] of integers.
            weight: of its loss in the mean over the step.
            micro_id: yours, 1 to 64 letters, digits, ``.``, ``_`` or ``-``; another call with the same id and the same
                batch counts once. None makes one.

        Raises: `StepRefused` for a loss that is not finite: it is not in the step.
        """
        message = forward_backward_request(batch, weight, micro_id)
        response = self._routers.call(lambda line: line.training.ForwardBackward, message, self._timeout(timeout_s))
        return messages.micro_batch_report_from_proto(response)

    def optim_step(
        self,
        *,
        step: int | None = None,
        lr: float | None = None,
        clip_norm: float | None = None,
        op_id: str | None = None,
        timeout_s: float | None = None,
    ) -> StepResult:
        """Make the open step, of the micro-batches of all clients: the gradient of the weighted mean of their losses.

        Args:
            step: refuse to make another one; None makes whichever is next.
            lr: learning rate; None is that of the configuration.
            clip_norm: largest global norm of the gradient, `math.inf` for none; None is that of the configuration.
            op_id: yours, as `micro_id`: the step that was made under it is not made again. None makes one.

        Raises: `StepRefused`: it is not the next one, there is nothing in it, or a gradient is not finite (then its
            micro-batches are dropped); no weight has changed.
        """
        message = pb.OptimStepRequest(options=step_options(step, lr, clip_norm, op_id))
        response = self._routers.call(lambda line: line.training.OptimStep, message, self._timeout(timeout_s))
        return messages.step_result_from_proto(response)

    def train_step(
        self,
        batches: Batch | Sequence[Batch],
        *,
        step: int | None = None,
        lr: float | None = None,
        clip_norm: float | None = None,
        op_id: str | None = None,
        timeout_s: float | None = None,
    ) -> StepResult:
        """`forward_backward` of one or several micro-batches and `optim_step`, in one call.

        Raises: as both; these micro-batches are not in the step then.
        """
        message = train_step_request(batches, step_options(step, lr, clip_norm, op_id))
        response = self._routers.call(lambda line: line.training.TrainStep, message, self._timeout(timeout_s))
        return messages.step_result_from_proto(response)

    def discard(self, ids: Sequence[str] = (), *, timeout_s: float | None = None) -> tuple[str, ...]:
        """Leave these micro-batches, or all, out of the open step; returns those that were in it."""
        message = discard_request(ids)
        response = self._routers.call(lambda line: line.training.Discard, message, self._timeout(timeout_s))
        return tuple(response.ids)

    def sample(
        self, prompt: str | None = None, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Continue a prompt with the weights as they are being trained, which nobody else is served with.

        For looks: each token takes a whole forward pass, training waits meanwhile, and there is no text, only tokens.
        ``stop``, ``logprobs`` and ``version`` are refused.
        """
        message = generate_request(prompt, options)
        response = self._routers.call(lambda line: line.training.Sample, message, self._timeout(timeout_s))
        return Generation.of([messages.chunk_from_proto(response)])

    def save_state(self, *, timeout_s: float | None = None) -> SavedState:
        """Save weights and optimizer after the last step, without what is in the open one; returns when it is done.

        Raises: `InvalidConfig` without ``train.checkpoints.folder``; `InsufficientResources` when the disk is full.
        """
        message = pb.SaveStateRequest()
        response = self._routers.call(lambda line: line.training.SaveState, message, self._timeout(timeout_s))
        return messages.saved_state_from_proto(response)

    def load_state(self, step: int | None = None, *, timeout_s: float | None = None) -> SavedState:
        """Go back to a checkpoint, the latest for None; those of later steps are removed, and the open step is emptied.

        Raises, and all is as before: `NotFound`; `InvalidCheckpoint` for one that is damaged or of another run.
        """
        message = load_state_request(step)
        response = self._routers.call(lambda line: line.training.LoadState, message, self._timeout(timeout_s))
        return messages.saved_state_from_proto(response)

    def state(self, *, timeout_s: float | None = None) -> TrainingState:
        """How far training is."""
        message = pb.GetStateRequest()
        response = self._routers.call(lambda line: line.training.GetState, message, self._timeout(timeout_s))
        return messages.training_state_from_proto(response)

    def publish(self, *, timeout_s: float | None = None) -> VersionStatus:
        """Serve what was learned up to the last step, as `Client.publish` does; needs the role ``admin``.

        Raises: `InvalidConfig` without ``train.checkpoints.folder``, below which they are written.
        """
        message = pb.PublishTrainedRequest()
        response = self._routers.call(
            lambda line: line.training.PublishTrained, message, self._timeout(timeout_s), repeatable=False
        )
        return messages.version_from_proto(response.version)
