"""The messages of the public API to the values of `types.py` and back. Pure; used by the servicers and the client.

Field names of the messages and the values are the same, so most of a conversion is naming the class. What a value may
be is not judged here (`service/validation.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from ray_moe.errors import InvalidRequest, WireError
from ray_moe.types import (
    CanaryRequest,
    ChaosReport,
    ChaosRequest,
    ClusterEvent,
    GenerateChunk,
    GenerateRequest,
    HostAddress,
    HostStatus,
    LayerPath,
    MicroBatchReport,
    Placement,
    PlannedMove,
    PlanSummary,
    RouterAddress,
    RouterStatus,
    RoutingTable,
    SavedState,
    ServiceStatus,
    StepResult,
    TokenLogprob,
    TrainingState,
    VersionStatus,
)
from ray_moe.wire.v1 import admin_pb2, inference_pb2, training_pb2

M = TypeVar("M", bound=Message)
V = TypeVar("V")


def parse(kind: type[M], data: bytes) -> M:
    """A message from its bytes.

    Raises:
        WireError: they are not such a message.
    """
    try:
        return kind.FromString(data)
    except DecodeError as exc:
        raise WireError(
            f"these {len(data):,} bytes are not a {kind.__name__} ({exc}): "
            f"send an encoded {kind.DESCRIPTOR.full_name}, its text in UTF-8"
        ) from exc


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}


def _value(cls: type[V], message: Message, **others: Any) -> V:
    """A value of `cls` with the fields of `message`, but for `others`."""
    names = (field.name for field in fields(cls) if field.name not in others)  # type: ignore[arg-type]
    return cls(**{name: getattr(message, name) for name in names}, **others)


# --- Generation ----------------------------------------------------------------------------------------------
def generate_request_to_proto(request: GenerateRequest) -> inference_pb2.GenerateRequest:
    """Raises `InvalidRequest` for what the message cannot even hold (both or neither prompt, huge numbers)."""
    if (request.prompt is None) == (request.token_ids is None):
        raise InvalidRequest("expected exactly one of prompt (text) and token_ids")
    given = _fields(request)
    for name in ("timeout_s", "caller"):  # the call has a deadline, and the service knows who asks
        del given[name]
    try:
        if request.token_ids is not None:
            given["token_ids"] = inference_pb2.TokenIds(ids=request.token_ids)
        return inference_pb2.GenerateRequest(**given)
    except (TypeError, ValueError) as exc:
        raise InvalidRequest(f"the request cannot be sent: {exc}") from exc


def generate_request_from_proto(message: inference_pb2.GenerateRequest) -> GenerateRequest:
    """Absent fields get the defaults of `GenerateRequest`."""
    plain = ("temperature", "ignore_eos", "top_k", "min_p", "presence_penalty", "frequency_penalty")
    given: dict[str, Any] = {name: getattr(message, name) for name in plain}
    given |= {"stop": tuple(message.stop), "stop_token_ids": tuple(message.stop_token_ids)}
    if message.HasField("token_ids"):
        given["token_ids"] = tuple(message.token_ids.ids)
    for name in ("prompt", "max_new_tokens", "top_p", "seed", "repetition_penalty", "logprobs", "version"):
        if message.HasField(name):
            given[name] = getattr(message, name)
    return GenerateRequest(**given)


def chunk_to_proto(chunk: GenerateChunk) -> inference_pb2.GenerateResponse:
    return inference_pb2.GenerateResponse(**_fields(chunk) | {"logprobs": map(_logprob_to_proto, chunk.logprobs)})


def chunk_from_proto(message: inference_pb2.GenerateResponse) -> GenerateChunk:
    logprobs = tuple(map(_logprob_from_proto, message.logprobs))
    return _value(GenerateChunk, message, token_ids=tuple(message.token_ids), logprobs=logprobs)


def _logprob_to_proto(one: TokenLogprob) -> inference_pb2.TokenLogprob:
    return inference_pb2.TokenLogprob(**_fields(one) | {"top": map(_logprob_to_proto, one.top)})


def _logprob_from_proto(message: inference_pb2.TokenLogprob) -> TokenLogprob:
    return _value(TokenLogprob, message, top=tuple(map(_logprob_from_proto, message.top)))


# --- Routers -------------------------------------------------------------------------------------------------
def routers_to_proto(routers: Iterable[RouterAddress]) -> inference_pb2.ListRoutersResponse:
    return inference_pb2.ListRoutersResponse(
        routers=[inference_pb2.RouterAddress(**_fields(router)) for router in routers]
    )


def routers_from_proto(message: inference_pb2.ListRoutersResponse) -> tuple[RouterAddress, ...]:
    return tuple(_value(RouterAddress, router) for router in message.routers)


# --- Status and placement ------------------------------------------------------------------------------------
def status_to_proto(status: ServiceStatus) -> admin_pb2.StatusResponse:
    tokens = status.tokens_per_expert.items()
    return admin_pb2.StatusResponse(
        **_fields(status)
        | {
            "router": admin_pb2.RouterStatus(**_fields(status.router)),
            "hosts": [admin_pb2.HostStatus(**_fields(host)) for host in status.hosts],
            "tokens_per_expert": [admin_pb2.LayerTokens(layer=layer, tokens=counts) for layer, counts in tokens],
            "events": [admin_pb2.ClusterEvent(**_fields(event)) for event in status.events],
            "routers": [inference_pb2.RouterAddress(**_fields(router)) for router in status.routers],
            "versions": map(version_to_proto, status.versions),
        }
    )


def status_from_proto(message: admin_pb2.StatusResponse) -> ServiceStatus:
    return _value(
        ServiceStatus,
        message,
        router=_value(RouterStatus, message.router),
        hosts=tuple(_value(HostStatus, host) for host in message.hosts),
        tokens_per_expert={entry.layer: tuple(entry.tokens) for entry in message.tokens_per_expert},
        events=tuple(_value(ClusterEvent, event) for event in message.events),
        routers=tuple(_value(RouterAddress, router) for router in message.routers),
        versions=tuple(map(version_from_proto, message.versions)),
    )


def version_to_proto(version: VersionStatus) -> admin_pb2.VersionStatus:
    return admin_pb2.VersionStatus(**_fields(version))


def version_from_proto(message: admin_pb2.VersionStatus) -> VersionStatus:
    return _value(VersionStatus, message)


def canary_request_from_proto(message: admin_pb2.BeginCanaryRequest, layer: LayerPath) -> CanaryRequest:
    """Absent fields get the defaults of `CanaryRequest`."""
    given = {name: getattr(message, name) for name in ("share", "max_drift") if message.HasField(name)}
    if message.mode:
        given["mode"] = message.mode
    return CanaryRequest(layer, message.expert, message.model, **given)


def table_to_proto(table: RoutingTable) -> admin_pb2.PlacementResponse:
    layers = [
        admin_pb2.LayerPlacement(layer=layer, experts=[admin_pb2.ExpertHosts(host_ids=hosts) for hosts in experts])
        for layer, experts in table.placement.hosts_of.items()
    ]
    addresses = [admin_pb2.HostAddress(**_fields(address)) for address in table.addresses.values()]
    return admin_pb2.PlacementResponse(epoch=table.epoch, layers=layers, addresses=addresses)


def table_from_proto(message: admin_pb2.PlacementResponse) -> RoutingTable:
    hosts_of = {entry.layer: tuple(tuple(hosts.host_ids) for hosts in entry.experts) for entry in message.layers}
    addresses = {address.host_id: _value(HostAddress, address) for address in message.addresses}
    return RoutingTable(message.epoch, Placement(hosts_of), addresses)


# --- Training ------------------------------------------------------------------------------------------------
def micro_batch_report_to_proto(report: MicroBatchReport) -> training_pb2.ForwardBackwardResponse:
    balancedness = report.balancedness
    return training_pb2.ForwardBackwardResponse(
        id=report.micro_id,
        step=report.step,
        loss=report.loss,
        num_tokens=report.num_tokens,
        layers=[
            training_pb2.LayerLoad(layer=layer, tokens=tokens, balancedness=balancedness[layer])
            for layer, tokens in report.tokens_per_expert.items()
        ],
    )


def micro_batch_report_from_proto(message: training_pb2.ForwardBackwardResponse) -> MicroBatchReport:
    tokens = {load.layer: tuple(load.tokens) for load in message.layers}
    return MicroBatchReport(message.id, message.step, message.loss, message.num_tokens, tokens)


def step_result_to_proto(result: StepResult) -> training_pb2.OptimStepResponse:
    return training_pb2.OptimStepResponse(**_fields(result))


def step_result_from_proto(message: training_pb2.OptimStepResponse) -> StepResult:
    return _value(StepResult, message)


def saved_state_from_proto(message: training_pb2.SaveStateResponse | training_pb2.LoadStateResponse) -> SavedState:
    return _value(SavedState, message)


def training_state_to_proto(state: TrainingState) -> training_pb2.GetStateResponse:
    return training_pb2.GetStateResponse(**_fields(state) | {"history": map(step_result_to_proto, state.history)})


def training_state_from_proto(message: training_pb2.GetStateResponse) -> TrainingState:
    return _value(
        TrainingState,
        message,
        micro_batches=tuple(message.micro_batches),
        history=tuple(map(step_result_from_proto, message.history)),
        saved_steps=tuple(message.saved_steps),
    )


# --- Changing the cluster ------------------------------------------------------------------------------------
def plan_to_proto(plan: PlanSummary) -> admin_pb2.PlanResponse:
    moves = [admin_pb2.PlannedMove(**_fields(move)) for move in plan.moves]
    return admin_pb2.PlanResponse(**_fields(plan) | {"moves": moves})


def plan_from_proto(message: admin_pb2.PlanResponse) -> PlanSummary:
    moves = (_value(PlannedMove, move, added=tuple(move.added), removed=tuple(move.removed)) for move in message.moves)
    return _value(PlanSummary, message, moves=tuple(moves))


def chaos_request_to_proto(request: ChaosRequest) -> admin_pb2.ChaosRequest:
    """Raises `InvalidRequest` for what the message cannot hold."""
    try:
        return admin_pb2.ChaosRequest(**_fields(request))
    except (TypeError, ValueError) as exc:
        raise InvalidRequest(f"the request cannot be sent: {exc}") from exc


def chaos_request_from_proto(message: admin_pb2.ChaosRequest) -> ChaosRequest:
    return _value(ChaosRequest, message)


def chaos_report_to_proto(report: ChaosReport) -> admin_pb2.ChaosResponse:
    return admin_pb2.ChaosResponse(**_fields(report))


def chaos_report_from_proto(message: admin_pb2.ChaosResponse) -> ChaosReport:
    return _value(ChaosReport, message, targets=tuple(message.targets))
