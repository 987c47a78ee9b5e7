"""One attempt at a step on one host: what forward calls leave for backward calls, and what was counted so far.

Calls only accumulate, each backward call once, however often it comes: an answer that was lost is given again, or
computed again and not counted. With the attempt all of it is forgotten; what it added up is in the parameters' `grad`.
Owned by `trainees.py`, whose lock is held.

Shape legend: t tokens of a call, n rows (token, expert), D model width.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch

from ray_moe.errors import InvalidRequest, StepInterrupted, StepRefused
from ray_moe.ops.compression import pack_rows, unpack_rows
from ray_moe.training.trained_experts import TrainedLayer
from ray_moe.transport.base import ExpertCall, ExpertReply
from ray_moe.types import HostId

REMEMBERED_BYTES = 256 * 2**20
"""Of answers to backward calls of this attempt, kept for calls that are sent again because a line broke."""


class _Kept(NamedTuple):
    """What a forward call left for its backward call."""

    tokens: torch.Tensor
    out: torch.Tensor
    experts: list[int]


class Attempt:
    """Its calls, and what they left. Not thread-safe."""

    def __init__(self, name: str, host_id: HostId, device: torch.device | str) -> None:
        """Args:
        name: what its calls begin with; empty: no call is of it.
        host_id: for messages.
        device: where it is computed.
        """
        self.name = name
        self.counted: set[str] = set()
        """Backward calls that were."""
        self.added: set[str] = set()
        """Hosts whose gradients have been added."""
        self._host_id = host_id
        self._device = device
        self._kept: dict[str, _Kept] = {}
        self._replies: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._reply_bytes = 0

    def has(self, call: ExpertCall) -> bool:
        """Whether `call` is of this attempt."""
        name = call.call_id.partition("/")[0]
        return bool(name) and name == self.name

    def run(self, layer: TrainedLayer, call: ExpertCall) -> ExpertReply:
        """Compute `call`, whose experts `layer` has: its rows [n, D], or going backward the gradient of each of its
        tokens [t, D].

        Raises: `StepInterrupted` when what a forward call was to keep is not here, `StepRefused` for numbers that
        cannot be sent, and what the computation raises.
        """
        if call.grad is None:
            return self._forward(layer, call)
        with torch.enable_grad():
            return self._backward(layer, call, call.grad)

    def _forward(self, layer: TrainedLayer, call: ExpertCall) -> ExpertReply:
        if not call.keep:
            with torch.no_grad():
                return _reply(call, self._compute(layer, call, self._tokens(layer, call)))
        with torch.enable_grad():
            tokens = self._tokens(layer, call).requires_grad_(True)
            out = self._compute(layer, call, tokens)
        self._kept[call.call_id] = _Kept(tokens, out, list(call.experts))
        return _reply(call, out.detach())

    def _tokens(self, layer: TrainedLayer, call: ExpertCall) -> torch.Tensor:
        """[t, D], in memory that nobody else writes to while it is kept."""
        tokens = call.tokens().detach().to(self._device)
        if tokens.dtype == torch.uint8:
            return unpack_rows(tokens, layer.dtype)
        return tokens.clone() if call.keep and tokens.data_ptr() == call.hidden.data_ptr() else tokens

    def _compute(self, layer: TrainedLayer, call: ExpertCall, tokens: torch.Tensor) -> torch.Tensor:
        if not call.experts:
            return tokens
        # Autograd keeps the index, and the memory that it came in is used again.
        rows = tokens if call.token is None else tokens.index_select(0, call.token.to(tokens.device, copy=call.keep))
        return layer.run(rows, call.experts, call.counts).to(call.hidden.device)

    def _backward(self, layer: TrainedLayer, call: ExpertCall, grad: torch.Tensor) -> ExpertReply:
        if call.call_id in self.counted and call.call_id in self._replies:
            return _reply(call, self._replies[call.call_id])
        kept = self._take(layer, call)
        parameters = [p for expert in call.experts for p in layer.experts[expert].values() if p.requires_grad]
        grad = grad.to(kept.out.device)
        grad = unpack_rows(grad, kept.out.dtype) if grad.dtype == torch.uint8 else grad.to(kept.out.dtype)
        grad_tokens, *grads = torch.autograd.grad(kept.out, [kept.tokens, *parameters], grad, allow_unused=True)
        if call.call_id not in self.counted:
            self.counted.add(call.call_id)
            for parameter, each in zip(parameters, grads, strict=True):
                if each is not None:
                    parameter.grad = each if parameter.grad is None else parameter.grad.add_(each)
        reply = (torch.zeros_like(kept.tokens) if grad_tokens is None else grad_tokens).to(call.hidden.device)
        self._remember(call.call_id, reply)
        return _reply(call, reply)

    def _take(self, layer: TrainedLayer, call: ExpertCall) -> _Kept:
        """What the forward call left, or the same computed again where it was to leave nothing."""
        if not call.kept:
            tokens = self._tokens(layer, call).requires_grad_(True)
            return _Kept(tokens, self._compute(layer, call, tokens), call.experts)
        kept = self._kept.pop(call.call_id, None)
        if kept is None or kept.experts != call.experts:
            raise StepInterrupted(f"host {self._host_id} has not kept the call {call.call_id[:80]!r}")
        return kept

    def _remember(self, call_id: str, reply: torch.Tensor) -> None:
        self._replies[call_id] = reply
        self._reply_bytes += reply.nbytes
        while self._reply_bytes > REMEMBERED_BYTES and len(self._replies) > 1:
            _, oldest = self._replies.popitem(last=False)
            self._reply_bytes -= oldest.nbytes


def _reply(call: ExpertCall, rows: torch.Tensor) -> ExpertReply:
    """Rows are answered as they came. Raises: `StepRefused` for numbers that cannot be."""
    if call.hidden.dtype != torch.uint8:
        return ExpertReply(rows)
    try:
        return ExpertReply(pack_rows(rows))
    except InvalidRequest as error:
        raise StepRefused(f"coming from {call.layer}: {error}; the step was not made and nothing changed") from None
