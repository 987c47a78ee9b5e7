"""What a router has of each version of the weights: the checkpoints they are read from, and its own experts.

Reading is done here; which versions there are, the controller says (`actors/publisher.py`), and which one computes, the
engine (`runtime/versions.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ray_moe.actors.spec import ServiceSpec
from ray_moe.errors import InsufficientResources, RayMoEError, Unavailable
from ray_moe.policy.versions import Source, Versions, Weights, by_source
from ray_moe.types import LayerPath

# torch and what loads it is imported late, so that the launcher can name a router's class without it.
if TYPE_CHECKING:
    from ray_moe.models.huggingface import Checkpoint
    from ray_moe.ops.experts import ExpertGroup
    from ray_moe.runtime.engine import Engine
    from ray_moe.runtime.moe_layer import ExpertDispatcher
    from ray_moe.runtime.own_experts import OwnExperts

logger = logging.getLogger(__name__)

RESERVE_BYTES = 256 * 2**20
"""What loading a version must leave free on the node."""


class RouterWeights:
    """`load`, `load_missing`, `load_version` and `forget` are called one at a time; everything else from any thread."""

    def __init__(self, router_id: str, spec: ServiceSpec) -> None:
        self._router_id = router_id
        self._spec = spec
        self._first: Checkpoint | None = None
        self._weights: dict[int, Weights] = {}
        """Of each version that is loaded."""
        self._checkpoints: dict[Source, Checkpoint] = {}

    @property
    def device(self) -> str:
        router = self._spec.config.router
        return ("cuda" if router.num_gpus else "cpu") if router.device == "auto" else router.device

    @property
    def backbone_bytes(self) -> int:
        """0 before `load`."""
        return 0 if self._first is None else self._first.backbone_bytes

    @property
    def checkpoint(self) -> Checkpoint:
        """That of the version it began with, experts cut as hosts have them: all are of one architecture.

        Raises: `Unavailable` before `load`.
        """
        if self._first is None:
            raise Unavailable("the service is starting; retry later")
        return self._first

    def load(self, dispatcher: ExpertDispatcher, versions: Versions) -> Engine:
        """An engine with the backbones of all live versions.

        Raises: what opening and loading a checkpoint raises, and `InsufficientResources` without the GPU it asks for.
        """
        import torch

        from ray_moe.models.huggingface import Checkpoint
        from ray_moe.runtime.engine import Engine, EngineLimits

        config = self._spec.config.router
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise InsufficientResources(
                f"router.device is {self.device}, but torch sees no GPU in the router's process; install a torch built "
                "for this GPU, or set router.device=cpu and router.num_gpus=0"
            )
        number, weights = versions.current, versions.live[versions.current]
        checkpoint = Checkpoint.open(weights.base.model, encoder_decoder=True)
        self._first = self._checkpoints[weights.base] = checkpoint.cut(self._spec.config.experts.tensor)
        engine = Engine(
            checkpoint.load_backbone(device=self.device),
            self._load_tokenizer(checkpoint),
            checkpoint.layers,
            dispatcher,
            max_positions=checkpoint.max_positions,
            limits=EngineLimits(
                max_concurrent_requests=config.max_concurrent_requests,
                max_queued_requests=config.max_queued_requests,
                max_queued_tokens=config.max_queued_tokens,
                max_step_tokens=config.max_step_tokens,
                kv_cache_bytes=config.kv_cache_bytes,
                reuse_prefixes=config.reuse_prefixes,
                overlap_min_tokens=config.overlap_min_tokens,
            ),
            version=number,
        )
        self._open(weights)
        self._weights = {number: weights}
        self.load_missing(engine, versions)
        return engine

    def load_missing(self, engine: Engine, versions: Versions) -> None:
        """The live versions that the engine has not; raises what `load_version` does."""
        for number, weights in versions.live.items():
            if number not in engine.versions:
                self.load_version(engine, number, weights)

    def load_version(self, engine: Engine, number: int, weights: Weights) -> None:
        """Raises what opening and loading a checkpoint raises, and `InsufficientResources` where it finds no room."""
        self._open(weights)
        alike = [other for other in engine.versions if self._weights[other].base == weights.base]
        if alike:
            engine.share_version(number, alike[0])
        else:
            checkpoint = self._checkpoints[weights.base]
            self._check_room(checkpoint)
            engine.add_version(number, checkpoint.load_backbone(device=self.device))
        self._weights[number] = weights

    def forget(self, number: int) -> None:
        """That version, and the checkpoints that no other one is read from."""
        self._weights.pop(number, None)
        needed = {source for weights in self._weights.values() for source in weights.sources}
        self._checkpoints = {source: each for source, each in self._checkpoints.items() if source in needed}

    def check(self, model: str, is_whole: bool) -> None:
        """Whether a checkpoint can take the place of the one that is served, or with `is_whole` false a part of it.

        Raises: `NotFound`, `InvalidCheckpoint`, `UnsupportedModel`, `InvalidRequest`, `InsufficientResources`.
        """
        checkpoint = self._open_replacement(model)
        if is_whole:
            self._check_room(checkpoint)

    def make_own_experts(self) -> OwnExperts | None:
        """The router's cache and lifeboat; None when it is to have neither."""
        from ray_moe.ops.quantization import make_group
        from ray_moe.runtime.own_experts import OwnExperts

        router = self._spec.config.router
        if not router.expert_cache_bytes and not router.lifeboat_bytes:
            return None

        def load(layer: LayerPath, experts: Sequence[int], version: int) -> ExpertGroup:
            weights = self._weights.get(version)
            if weights is None:
                raise Unavailable(f"version {version} of the weights is not there")
            checkpoint = self._checkpoints[weights.source(layer, experts[0])]
            module = checkpoint.load_experts({layer: experts}, device=self.device)[layer]
            return make_group(module, self._spec.config.experts.quantization)

        def split(layer: LayerPath, experts: Sequence[int], version: int) -> Iterable[Sequence[int]]:
            weights = self._weights.get(version)
            return [experts] if weights is None else by_source(weights, layer, experts).values()

        return OwnExperts(
            load,
            {layer.path: layer.expert_bytes for layer in self._spec.layers},
            cache_bytes=router.expert_cache_bytes,
            lifeboat_bytes=router.lifeboat_bytes,
            split=split,
        )

    def _open(self, weights: Weights) -> None:
        for source in weights.sources - self._checkpoints.keys():
            self._checkpoints[source] = self._open_replacement(source.model)

    def _open_replacement(self, model: str) -> Checkpoint:
        from ray_moe.models.huggingface import Checkpoint

        checkpoint = Checkpoint.open(model, encoder_decoder=True).cut(self._spec.config.experts.tensor)
        self.checkpoint.check_same_architecture(checkpoint)
        return checkpoint

    def _check_room(self, checkpoint: Checkpoint) -> None:
        from ray_moe.runtime.memory import available_bytes

        needed, there = checkpoint.backbone_bytes + RESERVE_BYTES, available_bytes()
        if self.device == "cpu" and needed > there:
            raise InsufficientResources(
                f"{self._router_id} would need {needed:,} bytes of memory for another version and a reserve, and "
                f"{there:,} are available on its node; lower versions.keep, or add memory"
            )

    def _load_tokenizer(self, current: Checkpoint) -> Any | None:
        """That of the model the service was started with, whatever has been published since."""
        from ray_moe.models.huggingface import Checkpoint

        if current.name == self._spec.config.model:
            return current.load_tokenizer()
        try:
            return Checkpoint.open(self._spec.config.model, encoder_decoder=True).load_tokenizer()
        except RayMoEError as error:
            logger.warning("the tokenizer of version 0 is not there any more: %s", error)
            return current.load_tokenizer()
