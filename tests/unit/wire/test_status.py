"""The one table of errors, and the way there and back."""

from __future__ import annotations

import inspect
import pickle

import grpc
import pytest

from ray_moe import errors
from ray_moe.wire.status import (
    CODES,
    ERROR_KEY,
    MAX_DETAILS_BYTES,
    RETRY_AFTER_KEY,
    from_status,
    to_http,
    to_http_headers,
    to_status,
)

ALL = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, errors.RayMoEError)]


def test_every_error_is_in_the_table() -> None:
    assert set(CODES) == set(ALL)
    assert all(400 <= http < 600 and code is not grpc.StatusCode.OK for code, http in CODES.values())


@pytest.mark.parametrize("cls", ALL)
def test_a_client_raises_what_the_service_raised(cls: type[errors.RayMoEError]) -> None:
    status = to_status(cls("what, expected, do: ü"))
    assert status.trailing_metadata == ((ERROR_KEY, cls.__name__),)
    error = from_status(status.code, status.details, cls.__name__)
    assert type(error) is cls
    assert error.message == "what, expected, do: ü"
    assert to_http(error) == CODES[cls][1]


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("retry_after_s", [None, 0.0, 1.25])
def test_errors_survive_pickling(cls: type[errors.RayMoEError], retry_after_s: float | None) -> None:
    error = pickle.loads(pickle.dumps(cls("what: ü", retry_after_s=retry_after_s)))
    assert (type(error), error.message, error.retry_after_s) == (cls, "what: ü", retry_after_s)


def test_the_time_to_retry_travels() -> None:
    error = errors.Overloaded("full", retry_after_s=1.25)
    metadata = dict(to_status(error).trailing_metadata)
    assert (
        from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", None, metadata[RETRY_AFTER_KEY]).retry_after_s == 1.25
    )
    assert to_http_headers(error) == {"Retry-After": "2"}
    assert to_http_headers(errors.Overloaded("full")) == {}


@pytest.mark.parametrize("text", [None, "", "soon", "nan", "inf", "-1"])
def test_what_is_no_time_to_retry_is_passed_over(text: str | None) -> None:
    error = from_status(grpc.StatusCode.UNAVAILABLE, "away", "Unavailable", text)
    assert (type(error), error.retry_after_s) == (errors.Unavailable, None)


def test_http_says_how_to_authenticate() -> None:
    assert to_http_headers(errors.Unauthenticated("no key")) == {"WWW-Authenticate": "Bearer"}
    assert to_http_headers(errors.PermissionDenied("no role")) == {}


def test_a_private_subclass_travels_as_its_base() -> None:
    class Private(errors.NotFound):
        pass

    status = to_status(Private("gone"))
    assert (status.code, status.trailing_metadata) == (grpc.StatusCode.NOT_FOUND, ((ERROR_KEY, "NotFound"),))


def test_long_messages_are_cut_at_a_character_and_lone_surrogates_replaced() -> None:
    details = to_status(errors.InvalidRequest("\udc80" + "ü" * MAX_DETAILS_BYTES)).details
    assert details.startswith("?ü")
    assert len(details.encode()) <= MAX_DETAILS_BYTES


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_any_foreign_status_is_an_error_of_ours(code: grpc.StatusCode) -> None:
    for name in (None, "", "NoSuchError", "str"):
        error = from_status(code, "details", name)
        assert isinstance(error, errors.RayMoEError)
        assert error.message == "details"


def test_the_foreign_statuses_that_matter() -> None:
    assert type(from_status(grpc.StatusCode.UNAVAILABLE, "", None)) is errors.Unavailable
    assert type(from_status(grpc.StatusCode.DEADLINE_EXCEEDED, "", None)) is errors.DeadlineExceeded
    assert type(from_status(grpc.StatusCode.PERMISSION_DENIED, "", None)) is errors.PermissionDenied
    assert type(from_status(grpc.StatusCode.UNKNOWN, "", None)) is errors.RayMoEError
