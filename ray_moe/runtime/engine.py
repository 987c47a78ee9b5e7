"""The model as a router runs it: text and tokens out of a backbone whose experts are elsewhere.

There may be several versions of its weights: a request is computed by one from its beginning to its end.

Generations are computed together, step by step (`generation.py`); single MoE layers beside them, in threads of their
own. Here requests become streams of that loop, and what it says becomes the answers that callers wait for. Knows
nothing of Ray or gRPC. Called by the router actor; tested without Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ray_moe.errors import ExpertFailed, InvalidRequest, NotFound, Overloaded, RayMoEError, Unavailable
from ray_moe.models.experts import install, moe_block
from ray_moe.models.shared_ahead import SharedAhead, compute_ahead
from ray_moe.runtime import turns
from ray_moe.runtime.generation import GenerationLoop
from ray_moe.runtime.kv_cache import KVPool
from ray_moe.runtime.scheduler import Scheduler
from ray_moe.runtime.stepper import beginning, has_encoder, stepper_of
from ray_moe.runtime.stream import Item, Stream
from ray_moe.runtime.texts import Texts
from ray_moe.runtime.versions import Users, computing, current
from ray_moe.runtime.vitals import Vitals
from ray_moe.types import GenerateChunk, GenerateRequest, LayerPath, LayerSpec

FORWARD_THREADS = 2
"""Layer calls have threads of their own, so that long generations do not starve them."""

Array = npt.NDArray[Any]

Trial = tuple[int, float]
"""A version, and the share of the requests that it computes."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """How much a router takes on at once."""

    max_concurrent_requests: int = 64
    """Generations computed together."""
    max_queued_requests: int = 256
    """Generations that may wait."""
    max_queued_tokens: int = 2**20
    """Tokens of their prompts, all together."""
    max_step_tokens: int = 512
    """Tokens of a step: longer prompts are computed in parts, so that others go on in between. An encoder reads a
    prompt at once: it takes none that is longer."""
    kv_cache_bytes: int = 2**30
    """Keys and values of all sequences, ended ones that are kept for their beginnings included."""
    reuse_prefixes: bool = True
    """Whether what sequences begin with is kept for others that begin the same."""
    overlap_min_tokens: int | None = None
    """Steps of at least so many tokens are computed as two halves, one of which is with the experts while the backbone
    computes the other; None: none are."""


class Dispatcher(Protocol):
    """What the experts are reached through: `runtime/moe_layer.ExpertDispatcher`, or who stands in its place."""

    def forward(
        self,
        layer: LayerPath,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weight: torch.Tensor,
        version: int = 0,
        meanwhile: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """The weighted sum of each token's experts, as `ExpertDispatcher.forward` says it."""


class Engine:
    """A backbone, its tokenizer and the dispatcher its experts are reached through."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any | None,
        layers: Mapping[LayerPath, LayerSpec],
        dispatcher: Dispatcher,
        max_positions: int | None = None,
        limits: EngineLimits = EngineLimits(),
        version: int = 0,
    ) -> None:
        """Takes over `model`, the backbone of the current `version`: its experts modules (without weights) answer
        through `dispatcher` from now on."""
        self.layers = dict(layers)
        self.vitals = Vitals()
        self.version = version
        """The current one."""
        self._models: dict[int, Any] = {version: model}
        """Backbones by version."""
        self._open: frozenset[int] = frozenset((version,))
        self._trial: Trial | None = None
        self._users = Users()
        self.texts = Texts(tokenizer)
        self._dispatcher = dispatcher
        self._max_positions = max_positions
        self._limits = limits
        self._forwards = ThreadPoolExecutor(FORWARD_THREADS, thread_name_prefix="forward")
        self._streams: set[Stream] = set()
        self._idle = asyncio.Event()
        self._closed = False
        self._device = next(model.parameters()).device
        install(model, partial(self._ask_experts, compute_ahead(model)))
        self.layers_with_gate = frozenset(path for path in self.layers if moe_block(model, path) is not None)
        self._has_encoder = has_encoder(model)
        stepper = stepper_of(model, limits.overlap_min_tokens)
        self._pool = KVPool(limits.kv_cache_bytes, keeps_prefixes=stepper.keeps_prefixes and limits.reuse_prefixes)
        self._scheduler = Scheduler(
            self._pool, limits.max_concurrent_requests, limits.max_step_tokens, in_chunks=stepper.in_chunks
        )
        self._loop = GenerationLoop(stepper, self._scheduler, self.vitals, version)

    @property
    def has_tokenizer(self) -> bool:
        return self.texts.tokenizer is not None

    @property
    def num_generated_tokens(self) -> int:
        return self._loop.num_generated_tokens

    @property
    def active_requests(self) -> int:
        """Generations being computed."""
        return self._loop.num_running

    @property
    def queued_requests(self) -> int:
        """Generations that wait for their turn."""
        return max(0, len(self._streams) - self._loop.num_running)

    @property
    def kv_cache_bytes(self) -> tuple[int, int]:
        """Keys and values: room that sequences have, ended ones included that are kept, and room there is in all."""
        return self._pool.used_tokens * self._pool.bytes_per_token, self._pool.max_bytes

    # --- versions of the weights -----------------------------------------------------------------------------
    @property
    def versions(self) -> frozenset[int]:
        """Those whose backbones are here."""
        return frozenset(self._models)

    @property
    def versions_in_use(self) -> frozenset[int]:
        """Those that requests are computed with at this moment."""
        return self._users.versions

    def add_version(self, version: int, model: nn.Module) -> None:
        """Take over `model`, of the same architecture, as the backbone of another version. Nothing uses it yet."""
        install(model, partial(self._ask_experts, compute_ahead(model)))
        self._loop.add_version(version, stepper_of(model, self._limits.overlap_min_tokens))
        self._models[version] = model

    def share_version(self, version: int, of: int) -> None:
        """Add a version that has the backbone of another one."""
        self._loop.share_version(version, of)
        self._models[version] = self._models[of]

    def use_version(self, version: int, others: Collection[int] = (), trial: Trial | None = None) -> None:
        """New requests are computed with `version` from now on; those that name one of `others` with that, and some
        with the one of `trial`."""
        self._open = frozenset((version, *others, *(() if trial is None else (trial[0],)))) & self.versions
        self.version, self._trial = version, trial

    def drop_version(self, version: int) -> None:
        """Free a version's backbone, which no request uses and none may begin to use."""
        model = self._models.pop(version, None)
        if model is not None:
            is_shared = any(other is model for other in self._models.values())
            self._loop.drop_version(version, (lambda: None) if is_shared else (lambda: _free(model)))

    def _begin(self, version: int | None) -> int:
        """The version that a request is computed with; `_users.leave` it in the end.

        Raises: `NotFound` for one that is not open to requests.
        """
        if version is None:
            trial = self._trial
            version = self.version if trial is None or random.random() >= trial[1] else trial[0]
        if version not in self._open:
            raise NotFound(f"there is no version {version} of the weights; there are {sorted(self._open)}")
        self._users.enter(version)
        return version

    def _ask_experts(
        self,
        ahead: Mapping[LayerPath, SharedAhead],
        layer: LayerPath,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weight: torch.Tensor,
    ) -> torch.Tensor:
        shared, turn = ahead.get(layer), turns.current.get()
        if turn is None:
            meanwhile = None if shared is None else shared.run
            return self._dispatcher.forward(layer, hidden, index, weight, current.get(), meanwhile)

        def wait() -> None:
            if shared is not None:
                shared.run()
            turn.give()

        try:
            return self._dispatcher.forward(layer, hidden, index, weight, current.get(), wait)
        finally:
            turn.take()

    # --- one layer -------------------------------------------------------------------------------------------
    async def forward(self, layer: LayerPath, hidden: Array, routing: tuple[Array, Array] | None) -> Array:
        """One MoE layer: [T, D] -> [T, D].

        Args:
            layer: path of the experts.
            hidden: [T, D] float16, float32 or float64; computed in the layer's dtype.
            routing: index [T, K] (E is "no expert") and weight [T, K]: the routed experts alone. None: the model's
                own block, with its gate, routed and shared experts.

        Returns: float64 for a float64 layer, else float32 (exact for the half precisions).
        """
        if self._closed:
            raise Unavailable("the service is stopping; retry elsewhere or later")
        version = self._begin(None)
        job = self._forwards.submit(copy_context().run, self._forward_layer, layer, hidden, routing, version)
        job.add_done_callback(lambda _: self._users.leave(version))  # also when nobody waits for it any more
        answer = asyncio.wrap_future(job)
        self.vitals.opened(answer, waits=False)
        try:
            with self.vitals.timed("forward"):
                return await answer
        except asyncio.CancelledError:
            if self._dropped(answer):
                raise Unavailable("the service is stopping; retry elsewhere or later") from None
            raise
        except RayMoEError as error:
            if isinstance(error, (Unavailable, ExpertFailed)):
                self.vitals.failed()
            raise
        finally:
            self.vitals.closed(answer)

    def _dropped(self, answer: asyncio.Future[Array]) -> bool:
        """Whether a queued job was cancelled by closing (and not left by its caller)."""
        return self._closed and answer.cancelled()

    def _forward_layer(
        self, layer: LayerPath, hidden: Array, routing: tuple[Array, Array] | None, version: int
    ) -> Array:
        spec = self.layers.get(layer)
        if spec is None:
            raise NotFound(f"no layer {layer!r}; the model has {list(self.layers)}")
        with torch.inference_mode(), computing(version):
            tokens = torch.tensor(hidden).to(self._device, getattr(torch, spec.dtype))
            if not len(tokens):
                out = tokens
            elif routing is not None:
                index, weight = (torch.tensor(part) for part in routing)
                out = self._dispatcher.forward(layer, tokens, index.long(), weight.to(self._device), version)
            else:
                block = moe_block(self._models[version], layer)
                if block is None:
                    raise NotFound(f"the gate of {layer} cannot be called alone; give index and weight")
                result = block(tokens.unsqueeze(0))
                out = (result[0] if isinstance(result, tuple) else result).reshape(len(tokens), -1)
            out = out.cpu()
            return np.asarray((out if out.dtype is torch.float64 else out.float()).numpy())

    # --- generation ------------------------------------------------------------------------------------------
    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        """Continue one prompt, token by token. Closing the iterator frees what is kept for it before the next step.

        Raises: `InvalidRequest` for what does not fit the model, `Overloaded` when the queue is full, `Unavailable`
        when the engine is closing or experts did not come back in time, `DeadlineExceeded`, `ExpertFailed`.
        """
        if self._closed:
            raise Unavailable("the service is stopping; retry elsewhere or later")
        arrived_s = time.monotonic()
        self._refuse_if_full(0)
        tokens = await self._tokenize(request)
        self._refuse_if_full(len(tokens))
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Item]()

        def tell(item: Item) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(pieces.put_nowait, item)

        version = self._begin(request.version)
        try:
            stream = self._make_stream(request, tokens, tell, arrived_s, version)
        except BaseException:
            self._users.leave(version)
            raise
        self._streams.add(stream)
        self._idle.clear()
        self._loop.add(stream)
        try:
            while True:
                item = await pieces.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.finish_reason:
                    return
        finally:
            self._loop.leave(stream)
            self._users.leave(version)
            self._streams.discard(stream)
            if not self._streams:
                self._idle.set()

    def _refuse_if_full(self, num_tokens: int) -> None:
        limits, waiting = self._limits, self._loop.num_waiting_tokens
        if self._closed:
            raise Unavailable("the service is stopping; retry elsewhere or later")
        if len(self._streams) >= limits.max_concurrent_requests + limits.max_queued_requests:
            raise self._overloaded(f"{self.active_requests} requests are running and {self.queued_requests} waiting")
        if waiting and waiting + num_tokens > limits.max_queued_tokens:
            raise self._overloaded(f"prompts of {waiting:,} tokens are waiting, and {limits.max_queued_tokens:,} may")

    def _overloaded(self, why: str) -> Overloaded:
        self.vitals.ended("generate", "overloaded")
        return Overloaded(f"{why}; retry later")

    def _make_stream(
        self, request: GenerateRequest, tokens: tuple[int, ...], tell: Any, arrived_s: float, version: int
    ) -> Stream:
        model = self._models[version]
        base = model.generation_config
        first, num_source = beginning(model, tokens)
        return Stream(
            request,
            first,
            self.texts.tokenizer,
            frozenset(_as_set(base.eos_token_id)),
            base.repetition_penalty or 1.0,
            tell,
            None if request.timeout_s is None else arrived_s + request.timeout_s,
            arrived_s,
            version,
            num_source,
        )

    async def _tokenize(self, request: GenerateRequest) -> tuple[int, ...]:
        """The tokens of the prompt, if the model can take them."""
        tokens = request.token_ids
        if tokens is None:
            tokens = await self.texts.tokenize(request.prompt or "")
        if not tokens:
            raise InvalidRequest("the prompt has no tokens; give at least one")
        if request.stop and not self.has_tokenizer:
            raise InvalidRequest("this checkpoint has no tokenizer; send stop_token_ids instead of stop texts")
        if self._max_positions is not None and len(tokens) + request.max_new_tokens > self._max_positions:
            raise InvalidRequest(
                f"the prompt has {len(tokens)} tokens and max_new_tokens is {request.max_new_tokens}, but the model "
                f"has positions for {self._max_positions} in all; shorten one of them"
            )
        if self._has_encoder and len(tokens) > self._limits.max_step_tokens:
            raise InvalidRequest(
                f"the prompt has {len(tokens)} tokens; the encoder reads a prompt at once, and computes at most "
                f"{self._limits.max_step_tokens} at a time (router.max_step_tokens): shorten it"
            )
        # A decoder beside an encoder begins with a token of its own.
        if not self._pool.fits(len(tokens) + int(self._has_encoder) + request.max_new_tokens):
            raise InvalidRequest(
                f"the prompt has {len(tokens)} tokens and max_new_tokens is {request.max_new_tokens}, but there is "
                f"room for the keys and values of {self._pool.max_tokens:,.0f} (router.kv_cache_bytes); shorten one"
            )
        return tokens

    async def close(self, grace_s: float = 0.0) -> None:
        """Accept nothing more, give running generations `grace_s` to end, then stop them at their next token."""
        self._closed = True
        if self._streams and grace_s > 0:
            await asyncio.wait([asyncio.ensure_future(self._idle.wait())], timeout=grace_s)
        self._loop.stop()
        self._forwards.shutdown(wait=False, cancel_futures=True)
        self.texts.close()


def _free(model: nn.Module) -> None:
    """Give the memory of the weights back, whatever else still refers to the model."""
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)


def _as_set(tokens: int | list[int] | None) -> set[int]:
    """`generation_config` gives none, one or several end tokens."""
    if tokens is None:
        return set()
    return set(tokens) if isinstance(tokens, list) else {tokens}
