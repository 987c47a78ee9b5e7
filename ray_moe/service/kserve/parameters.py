"""The parameters of a request: those of the protocol, and those of a generation, which may also be tensors. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from ray_moe.errors import InvalidRequest
from ray_moe.service.kserve.tensors import Input
from ray_moe.wire.kserve import grpc_service_pb2 as pb

_MAX_NAME = 200  # of a name or value that comes from outside and goes into a message


class _Kind(NamedTuple):
    """What a parameter's value may be; the bounds are an integer's, and hold for 0 and 1 of a flag."""

    kind: type
    name: str
    lowest: int = 0
    highest: int = 1


_INT32 = _Kind(int, "an integer", -(2**31), 2**31 - 1)
_UINT64 = _Kind(int, "an integer", 0, 2**64 - 1)
_NUMBER = _Kind(float, "a number")
_FLAG = _Kind(bool, "true or false")
_TEXT = _Kind(str, "a text")

SETTINGS: Mapping[str, _Kind] = {
    "max_tokens": _INT32,
    "temperature": _NUMBER,
    "top_p": _NUMBER,
    "top_k": _INT32,
    "min_p": _NUMBER,
    "repetition_penalty": _NUMBER,
    "presence_penalty": _NUMBER,
    "frequency_penalty": _NUMBER,
    "seed": _UINT64,
    "ignore_eos": _FLAG,
    "stream": _FLAG,
}
"""What rules a generation and is one value."""

_PROTOCOL: Mapping[str, _Kind] = {
    "timeout": _UINT64,
    "priority": _UINT64,
    "binary_data_output": _FLAG,
    "triton_enable_empty_final_response": _FLAG,
}


@dataclass(frozen=True, slots=True)
class Options:
    """The parameters of the protocol. Requests have no priorities here, and no response is empty."""

    timeout_s: float | None = None
    raw: bool = True
    """Whether outputs are raw; else they are typed."""


def read_options(request: pb.ModelInferRequest) -> Options:
    """Raises: `InvalidRequest`."""
    given = {
        name: _checked(name, _value(request.parameters[name]), kind)
        for name, kind in _PROTOCOL.items()
        if name in request.parameters
    }
    timeout_us = given.get("timeout")
    return Options(timeout_us / 1e6 if timeout_us else None, given.get("binary_data_output", True))


def read_settings(request: pb.ModelInferRequest, inputs: Mapping[str, Input]) -> dict[str, Any]:
    """Values of `SETTINGS`, and of ``stop`` and ``stop_token_ids`` as tuples, as far as they are given.

    A number may also be a text, since older clients have no other way to send one that is not an integer.

    Raises: `InvalidRequest`, also for a parameter that there is not.
    """
    check_names(request, (*SETTINGS, "stop"))
    settings: dict[str, Any] = {}
    for name, kind in {**SETTINGS, "stop": _TEXT}.items():
        if name in request.parameters:
            if name in inputs:
                raise InvalidRequest(f"{name} is given as a parameter and as an input: give it once")
            value = _checked(name, _value(request.parameters[name]), kind)
            settings[name] = (value,) if name == "stop" else value
        elif name in inputs and name != "stop":
            settings[name] = _checked(name, inputs[name].array.item(), kind)
    if "stop" in inputs:
        settings["stop"] = tuple(text_of("stop", element) for element in inputs["stop"].array)
    if "stop_token_ids" in inputs:
        settings["stop_token_ids"] = tuple(inputs["stop_token_ids"].array.tolist())
    return settings


def check_names(request: pb.ModelInferRequest, known: tuple[str, ...] = ()) -> None:
    """Raise unless every parameter is one of the protocol's or `known`."""
    unknown = sorted(set(request.parameters) - set(_PROTOCOL) - set(known))
    if unknown:
        expected = ", ".join((*known, *_PROTOCOL))
        raise InvalidRequest(f"there is no parameter {unknown[0][:_MAX_NAME]!r}; expected some of {expected}")


def text_of(name: str, element: bytes) -> str:
    """Raises: `InvalidRequest` for what is not UTF-8."""
    try:
        return element.decode()
    except UnicodeDecodeError as exc:
        raise InvalidRequest(f"{name} is not UTF-8 ({exc}): encode it") from exc


def _value(parameter: pb.InferParameter) -> Any:
    which = parameter.WhichOneof("parameter_choice")
    return None if which is None else getattr(parameter, which)


def _checked(name: str, value: Any, expected: _Kind) -> Any:
    if expected.kind is float and type(value) in (int, float, str):
        with suppress(ValueError):
            return float(value)
    if type(value) is not expected.kind:
        raise InvalidRequest(f"{name} is {str(value)[:_MAX_NAME]!r}; expected {expected.name}")
    if isinstance(value, int) and not expected.lowest <= value <= expected.highest:
        raise InvalidRequest(f"{name} is {value}; expected {expected.lowest} to {expected.highest}")
    return value
