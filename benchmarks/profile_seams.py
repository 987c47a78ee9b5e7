"""Which functions `profile_step.py` times, and what their time is counted as.

A component's time is that of its functions less that of other marked functions within them, so nothing is counted
twice. Names here follow those of the package: a function that is renamed must be renamed here too, which
`tests/unit/benchmarks/test_profile.py` notices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.profile_marks import RECORDER, Seam

STEP, WAIT, SENT, TAKEN, RUN = "step", "wait", "send", "call taken", "experts, rest"
FRAMED, WRITTEN, RECEIVED, TRAIN_STEP = "frame", "socket written", "reply read", "training step"

ORDERS, ANSWERS = "orders to hosts given", "orders to hosts: wait"
BY_CALLER = frozenset({ORDERS, ANSWERS})
"""Counted apart for each component that calls them."""

PRODUCTS = frozenset(
    {
        "attention: projections",
        "attention: scores and values",
        "gate: product",
        "logits",
        "dense network",
        "experts: products",
        "backward of the backbone",
        "experts: backward",
    }
)
"""Components that are matrix products for the most part (backward: with whatever else autograd does)."""


def _mark_lines(args: tuple[Any, ...]) -> None:
    connection = args[0]
    RECORDER.lines[connection.target] = connection.address.pid


def _work(args: tuple[Any, ...]) -> list[int]:
    """Sequences and tokens of a step."""
    return [len(args[1]), sum(number for _, number in args[1])]


def _calls(args: tuple[Any, ...]) -> list[int]:
    """Rows and experts of calls that are computed together."""
    return [sum(call.num_rows for call in args[1]), sum(len(call.experts) for call in args[1])]


# --- modules of the backbone ------------------------------------------------------------------------------------
def mark_model(model: Any) -> None:
    """Time the modules of a backbone, whatever its family."""
    attentions = {name for name, module in model.named_modules() if _is_attention(module)}
    for name, module in model.named_modules():
        component = component_of(name, module, name.rpartition(".")[0] in attentions)
        if component:
            module.forward = RECORDER.timed(module.forward, component)


def _is_attention(module: Any) -> bool:
    return all(hasattr(module, name) for name in ("layer_idx", "scaling", "is_causal"))


def component_of(name: str, module: Any, in_attention: bool) -> str:
    """What a module of the name `name` is counted as; empty for one that is part of what is around it."""
    kind = type(module).__name__
    if kind == "Linear":
        leaf = name.rpartition(".")[2]
        if in_attention:
            return "attention: projections"
        return "logits" if leaf == "lm_head" else "gate: product" if leaf == "gate" else "dense network"
    endings: Mapping[str, str] = {
        "Norm": "norms",
        "RotaryEmbedding": "rotary embedding",
        "Embedding": "embedding",
        "Router": "gate",
        "Gate": "gate",
        "SparseMoeBlock": "MoE block, rest",
        "DecoderLayer": "layer: residuals, rest",
    }
    if _is_attention(module):
        return "attention: rest"
    return next((component for ending, component in endings.items() if kind.endswith(ending)), "")


_R, _T = "ray_moe.runtime.", "ray_moe.transport."
SEAMS = (
    # A router: the thread that generates.
    Seam(_R + "generation", "GenerationLoop._take_in", "requests in and out"),
    Seam(_R + "generation", "GenerationLoop._give_up_the_late", "requests in and out"),
    Seam(_R + "generation", "GenerationLoop._step", "next tokens: choice and telling"),
    Seam(_R + "generation", "GenerationLoop._generated", "statistics"),
    Seam(_R + "scheduler", "Scheduler.next_step", "scheduler"),
    Seam(_R + "decoder_only", "DecoderStepper.compute", STEP, _work),
    Seam(_R + "decoder_only", "DecoderStepper.__init__", after=lambda args: mark_model(args[1])),
    Seam(_R + "packing", "PackedCache.update", "attention: keys and values kept"),
    Seam(_R + "packing", "PackedCache.attend", "attention: scores and values"),
    Seam(_R + "stream", "Stream.choose", "sampling"),
    Seam(_R + "stream", "Stream.take", "next tokens: pieces"),
    Seam(_R + "detokenizer", "Detokenizer.add", "detokenising"),
    Seam(_R + "vitals", "Vitals.stepped", "statistics"),
    Seam("ray_moe.service.openai.answers", "CompletionAnswer._completion", "HTTP: pieces made"),
    # The dispatcher.
    Seam(_R + "moe_layer", "ExpertDispatcher.forward", "dispatch, rest"),
    Seam(_R + "moe_layer", "ExpertDispatcher._rows", "rows into their slots"),
    Seam(_R + "moe_layer", "ExpertDispatcher._partial_sums", "rows into their slots"),
    Seam(_R + "moe_layer", "_call", "calls made"),
    Seam(_R + "moe_layer", "combine", "combine"),
    Seam(_R + "moe_layer", "_is_finite", "check for NaN"),
    Seam(_R + "statistics", "Statistics.add_tokens", "statistics"),
    Seam(_R + "statistics", "Statistics.add_batch", "statistics"),
    Seam(_R + "exchange", "Exchange._group", "exchange, rest"),
    Seam(_R + "exchange", "Exchange._send", "exchange, rest"),
    Seam(_R + "exchange", "split_by_host", "group by host"),
    Seam(_R + "exchange", "Exchange._wait", WAIT),
    Seam(_R + "lines", "Peer.submit", "line to a host"),
    Seam(_R + "lines", "Peer._done", "reply told"),
    Seam(_T + "connection", "StreamConnection.start", after=_mark_lines),
    Seam(_T + "connection", "StreamConnection.submit", "line to a host"),
    Seam(_T + "connection", "StreamConnection._take_slot", "shared memory taken"),
    Seam(_T + "connection", "StreamConnection._encode", "encode"),
    Seam(_T + "connection", "StreamConnection._received", RECEIVED, lambda args: [args[0].target, args[1]]),
    Seam(_T + "socket_client", "SocketCarrier.send", SENT, lambda args: [args[0].target, args[1]]),
    # A host.
    Seam(_T + "socket_server", "_Line.buffer_updated", "socket read"),
    Seam(_T + "socket_server", "_Line.write_now", WRITTEN),
    Seam(_T + "host_stream", "HostStream.take", TAKEN, lambda args: args[1]),
    Seam(_T + "host_stream", "HostStream._read", "decode"),
    Seam(_T + "host_stream", "HostStream._reply", "reply into its place"),
    Seam(_T + "host_stream", "HostStream._answered", "answers"),
    Seam(_T + "frames", "frame", FRAMED, lambda args: args[0]),
    Seam(_T + "codec", "read_call", "decode"),
    Seam("ray_moe.wire.tensors", "decode", "decode"),
    Seam("ray_moe.wire.tensors", "tensors_in", "decode"),
    Seam("ray_moe.wire.tensors", "tensor_at", "shared memory as tensors"),
    Seam("ray_moe.wire.tensors", "encode_header", "encode"),
    Seam(_R + "host_loop", "HostLoop._drain", "queue"),
    Seam(_R + "meter", "Meter.add", "queue"),
    Seam(_R + "expert_host", "ExpertHost.run", RUN, _calls),
    Seam(_R + "expert_host", "ExpertHost._check", "experts: checks"),
    Seam(_R + "expert_host", "ExpertHost._rows", "experts: rows gathered"),
    Seam(_R + "expert_host", "_weigh", "experts: weighted sums"),
    Seam("ray_moe.ops.experts", "JoinedExperts.run", "experts: products"),
    Seam("ray_moe.ops.experts", "StackedExperts.run", "experts: products"),
    Seam("ray_moe.ops.experts", "SeparateExperts.run", "experts: products"),
    # Training: a worker.
    Seam("ray_moe.training.trainer", "Trainer.make_step", TRAIN_STEP),
    Seam("ray_moe.training.trainer", "Trainer.__init__", after=lambda args: mark_model(args[1])),
    Seam("ray_moe.training.trainer", "Trainer.begin", "begin, rest"),
    Seam("ray_moe.training.trainer", "Trainer.accumulate", "micro-batches, rest"),
    Seam("ray_moe.training.trainer", "Trainer.commit", "commit, rest"),
    Seam("ray_moe.training.trainer", "Trainer._snapshot", "snapshot"),
    Seam("ray_moe.training.trainer", "causal_lm_loss", "model and loss, rest"),
    Seam("ray_moe.training.auxiliary", "LossWithAuxiliary.__call__", "auxiliary losses"),
    Seam("ray_moe.training.data", "CheckedData.batch", "data"),
    Seam("ray_moe.training.dispatcher", "TrainingDispatcher.forward", "dispatch, rest"),
    Seam("ray_moe.training.dispatcher", "TrainingDispatcher._parts", "group by host"),
    Seam("ray_moe.training.dispatcher", "TrainingDispatcher.rows", "rows into their slots"),
    Seam("ray_moe.training.dispatcher", "TrainingDispatcher.backward_rows", "gradients of rows gathered and added"),
    Seam("ray_moe.training.dispatcher", "TrainingDispatcher._await", WAIT),
    Seam("ray_moe.training.dispatcher", "combine", "combine"),
    Seam("ray_moe.training.coordinator", "Coordinator.begin", "begin, rest"),
    Seam("ray_moe.training.coordinator", "Coordinator.commit", "commit, rest"),
    Seam("ray_moe.training.trainer", "Trainer.state", "copies of what was learned"),
    Seam("ray_moe.actors.training", "RayControl.order", ORDERS),
    Seam("ray_moe.actors.training", "RayControl.lend", ORDERS),
    Seam("ray_moe.actors.training", "RayControl.answers", ANSWERS),
    Seam("ray_moe.actors.training", "RayControl.hosts", ANSWERS),
    Seam("ray_moe.actors.training", "Teller.tell", "progress told"),
    Seam("ray_moe.ops.norms", "squares", "norms of gradients"),
    Seam("ray_moe.ops.optimizers", "Optimizer.prepare", "optimizer"),
    Seam("ray_moe.ops.optimizers", "Optimizer.step", "optimizer"),
    Seam("torch._tensor", "Tensor.backward", "backward of the backbone"),
    # Training: a host.
    Seam("ray_moe.training.attempt", "Attempt._tokens", "experts: rows kept"),
    Seam("ray_moe.training.attempt", "Attempt._backward", "experts: backward"),
    Seam("ray_moe.training.trainees", "Trainees.begin", "orders obeyed"),
    Seam("ray_moe.training.trainees", "Trainees.snapshot", "snapshot"),
    Seam("ray_moe.training.trainees", "Trainees.report", "orders obeyed"),
    Seam("ray_moe.training.trainees", "Trainees.sums", "orders obeyed"),
    Seam("ray_moe.training.trainees", "Trainees.apply", "orders obeyed"),
)
