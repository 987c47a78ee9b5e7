"""The model as a router runs it: text and tokens out of a backbone whose experts are elsewhere.

Generation is `transformers`' own `generate`, one worker thread per request, so that every family, cache and stopping
rule behaves as it does there; the experts of all requests meet at the hosts, which compute them together. It also
runs one MoE layer by itself. Knows nothing of Ray or gRPC. Called by the router actor; tested without Ray.
"""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ray_moe.errors import ExpertFailed, InvalidRequest, NotFound, Overloaded, RayMoEError, Unavailable
from ray_moe.models.experts import install, moe_block
from ray_moe.models.rope import ThreadLocalRope
from ray_moe.runtime.detokenizer import Detokenizer
from ray_moe.runtime.moe_layer import ExpertDispatcher
from ray_moe.runtime.vitals import Vitals
from ray_moe.types import GenerateChunk, GenerateRequest, LayerPath, LayerSpec

FORWARD_THREADS = 2
"""Layer calls have threads of their own, so that long generations do not starve them."""

Array = npt.NDArray[Any]


class Engine:
    """A backbone, its tokenizer and the dispatcher its experts are reached through."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any | None,
        layers: Mapping[LayerPath, LayerSpec],
        dispatcher: ExpertDispatcher,
        max_positions: int | None = None,
        max_concurrent_requests: int = 8,
        max_queued_requests: int = 256,
    ) -> None:
        """Takes over `model`: its experts modules (without weights) answer through `dispatcher` from now on."""
        self.layers = dict(layers)
        self.num_generated_tokens = 0
        self.active_requests = 0
        """Requests being computed."""
        self.queued_requests = 0
        """Requests accepted and waiting for a thread."""
        self.vitals = Vitals()
        self._model: Any = model
        self._tokenizer = tokenizer
        self._dispatcher = dispatcher
        self._max_positions = max_positions
        self._max_accepted = max_concurrent_requests + max_queued_requests
        self._generators = ThreadPoolExecutor(max_concurrent_requests, thread_name_prefix="generate")
        self._forwards = ThreadPoolExecutor(FORWARD_THREADS, thread_name_prefix="forward")
        self._lock = threading.Lock()
        self._running: dict[threading.Event, Any] = {}
        self._idle = asyncio.Event()
        self._closed = False
        self._device = next(model.parameters()).device
        install(model, dispatcher.forward)
        self._dynamic_rope = ThreadLocalRope(model)
        self.layers_with_gate = frozenset(path for path in self.layers if moe_block(model, path) is not None)

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

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
        computing = asyncio.get_running_loop().run_in_executor(
            self._forwards, self._forward_layer, layer, hidden, routing
        )
        self.vitals.opened(computing, waits=False)
        try:
            return await computing
        except asyncio.CancelledError:
            if self._dropped(computing):
                raise Unavailable("the service is stopping; retry elsewhere or later") from None
            raise
        except RayMoEError as error:
            if isinstance(error, (Unavailable, ExpertFailed)):
                self.vitals.failed()
            raise
        finally:
            self.vitals.closed(computing)

    def _dropped(self, computing: asyncio.Future[Array]) -> bool:
        """Whether a queued job was cancelled by closing (and not left by its caller)."""
        return self._closed and computing.cancelled()

    def _forward_layer(self, layer: LayerPath, hidden: Array, routing: tuple[Array, Array] | None) -> Array:
        spec = self.layers.get(layer)
        if spec is None:
            raise NotFound(f"no layer {layer!r}; the model has {list(self.layers)}")
        with torch.inference_mode():
            tokens = torch.tensor(hidden).to(self._device, getattr(torch, spec.dtype))
            if not len(tokens):
                out = tokens
            elif routing is not None:
                index, weight = (torch.tensor(part) for part in routing)
                out = self._dispatcher.forward(layer, tokens, index.long(), weight.to(self._device))
            else:
                block = moe_block(self._model, layer)
                if block is None:
                    raise NotFound(f"the gate of {layer} cannot be called alone; give index and weight")
                result = block(tokens.unsqueeze(0))
                out = (result[0] if isinstance(result, tuple) else result).reshape(len(tokens), -1)
            out = out.cpu()
            return np.asarray((out if out.dtype is torch.float64 else out.float()).numpy())

    # --- generation ------------------------------------------------------------------------------------------
    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        """Continue one prompt, token by token. Closing the iterator stops the work at the next token.

        Raises: `Overloaded` when the queue is full, `Unavailable` when the engine is closing or experts did not
        come back in time, `ExpertFailed`.
        """
        with self._lock:
            if self._closed:
                raise Unavailable("the service is stopping; retry elsewhere or later")
            if self.active_requests + self.queued_requests >= self._max_accepted:
                raise Overloaded(
                    f"{self.active_requests} requests are running and {self.queued_requests} waiting; retry later"
                )
            self.queued_requests += 1
        loop = asyncio.get_running_loop()
        chunks: asyncio.Queue[GenerateChunk | BaseException] = asyncio.Queue()
        stop = threading.Event()

        def put(item: GenerateChunk | BaseException) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(chunks.put_nowait, item)

        self._running[stop] = put
        self._idle.clear()
        self.vitals.opened(stop)
        job = self._generators.submit(self._generate, request, put, stop)
        try:
            while True:
                item = await chunks.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.finish_reason:
                    return
        finally:
            stop.set()
            if job.cancel():  # it never began: its place in the queue is free at once
                with self._lock:
                    self.queued_requests -= 1
            del self._running[stop]
            self.vitals.closed(stop)
            if not self._running:
                self._idle.set()

    def _generate(self, request: GenerateRequest, put: Any, stop: threading.Event) -> None:
        """Runs in a worker thread; everything it has to say goes through `put`."""
        with self._lock:
            self.queued_requests -= 1
            self.active_requests += 1
        self.vitals.begun(stop)
        self._dynamic_rope.forget()
        try:
            if not stop.is_set():
                self._run_generate(request, put, stop)
        except RayMoEError as error:
            if isinstance(error, (Unavailable, ExpertFailed)):
                self.vitals.failed()
            put(error)
        except Exception as error:
            self.vitals.failed()
            failure = ExpertFailed(f"generation failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            put(failure)
        finally:
            with self._lock:
                self.active_requests -= 1

    def _run_generate(self, request: GenerateRequest, put: Any, stop: threading.Event) -> None:
        prompt = self._tokenize(request)
        base: GenerationConfig = self._model.generation_config
        config = copy.deepcopy(base)
        config.update(do_sample=False, temperature=None, top_p=None, top_k=None, num_beams=1, max_length=None)
        config.update(max_new_tokens=request.max_new_tokens, return_dict_in_generate=False)
        end_tokens = set() if request.ignore_eos else _as_set(base.eos_token_id)
        config.eos_token_id = sorted(end_tokens)  # empty, not None: generate would fill None in from the model
        if config.pad_token_id is None:  # one sequence: never used, but its absence is warned about
            config.pad_token_id = min(end_tokens, default=0)
        inputs = torch.tensor([prompt], device=self._device)
        streamer = _Streamer(self, request, len(prompt), end_tokens, put)
        with torch.inference_mode():
            self._model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=config,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([_Stopped(stop)]),
                logits_processor=_sampler(request),
            )

    def _tokenize(self, request: GenerateRequest) -> list[int]:
        if request.token_ids is not None:
            tokens = list(request.token_ids)
        elif self._tokenizer is None:
            raise InvalidRequest("this checkpoint has no tokenizer; send token_ids instead of a prompt")
        else:
            tokens = list(self._tokenizer(request.prompt)["input_ids"])
        if not tokens:
            raise InvalidRequest("the prompt has no tokens; give at least one")
        if self._max_positions is not None and len(tokens) + request.max_new_tokens > self._max_positions:
            raise InvalidRequest(
                f"the prompt has {len(tokens)} tokens and max_new_tokens is {request.max_new_tokens}, but the model "
                f"has positions for {self._max_positions} in all; shorten one of them"
            )
        return tokens

    async def close(self, grace_s: float = 0.0) -> None:
        """Accept nothing more, give running generations `grace_s` to end, then stop them at their next token."""
        self._closed = True
        if self._running and grace_s > 0:
            await asyncio.wait([asyncio.ensure_future(self._idle.wait())], timeout=grace_s)
        for stop, put in list(self._running.items()):
            stop.set()
            put(Unavailable("the generation was stopped because the service is stopping; retry"))
        self._generators.shutdown(wait=False, cancel_futures=True)
        self._forwards.shutdown(wait=False, cancel_futures=True)


class _Streamer(BaseStreamer):
    """Turns what `generate` reports, the prompt first and then token after token, into chunks."""

    def __init__(
        self, engine: Engine, request: GenerateRequest, num_prompt_tokens: int, end_tokens: set[int], put: Any
    ) -> None:
        self._engine = engine
        self._request = request
        self._num_prompt_tokens = num_prompt_tokens
        self._end_tokens = end_tokens
        self._put = put
        self._seen_prompt = False
        self._finished = False
        self._num_tokens = 0
        self._last_s: float | None = None
        self._text = Detokenizer(engine._tokenizer)

    def put(self, value: torch.Tensor) -> None:
        if not self._seen_prompt:
            self._seen_prompt = True
            return
        tokens = tuple(int(token) for token in value.reshape(-1).tolist())
        now_s = time.monotonic()
        if self._last_s is not None:
            self._engine.vitals.paused(now_s - self._last_s)
        self._last_s = now_s
        self._num_tokens += len(tokens)
        reason = ""
        if self._end_tokens.intersection(tokens):
            reason = "stop"
        elif self._num_tokens >= self._request.max_new_tokens:
            reason = "length"
        with self._engine._lock:
            self._engine.num_generated_tokens += len(tokens)
        self._finished = bool(reason)
        text = self._text.add(tokens, last=self._finished)
        self._put(GenerateChunk(tokens, text, reason, self._num_prompt_tokens))

    def end(self) -> None:
        if not self._finished:  # a stopping rule of the checkpoint's own, or nobody listens any more
            self._put(GenerateChunk((), self._text.add((), last=True), "stop", self._num_prompt_tokens))


class _Stopped(StoppingCriteria):
    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self._stop.is_set(), dtype=torch.bool, device=input_ids.device)


class _Sample(LogitsProcessor):
    """Draws the next token with a generator of the request's own, and leaves `generate` no other choice.

    `generate` would draw from the process-wide generator, which concurrent requests share, so that a seed would
    not repeat a text.
    """

    def __init__(self, request: GenerateRequest) -> None:
        self._generator = torch.Generator()
        if request.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(request.seed)
        self._warpers = [TemperatureLogitsWarper(request.temperature)]
        if request.top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(request.top_p))

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores = scores.float().cpu()
        for warp in self._warpers:
            scores = warp(input_ids, scores)
        drawn = torch.multinomial(scores.softmax(-1), 1, generator=self._generator)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0).to(input_ids.device)


def _sampler(request: GenerateRequest) -> LogitsProcessorList:
    return LogitsProcessorList([_Sample(request)] if request.temperature > 0 else [])


def _as_set(tokens: int | list[int] | None) -> set[int]:
    if tokens is None:
        return set()
    return {tokens} if isinstance(tokens, int) else set(tokens)
