"""One transport for those it reaches, the other for the rest."""

from __future__ import annotations

import pytest

from ray_moe.errors import HostLost, Unauthenticated
from ray_moe.transport.auto import AutoTransport
from ray_moe.transport.local import LocalConnection, LocalTransport
from ray_moe.types import HostAddress


class Nowhere:
    """A transport that reaches nobody."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.num_closed = 0

    def connect(self, address: HostAddress) -> LocalConnection:
        raise self.error

    def close(self) -> None:
        self.num_closed += 1


class Silent:
    """A host that is never asked."""

    def run(self, calls: object) -> list[object]:
        raise AssertionError


LOCAL = LocalTransport({"expert-0": Silent()})  # type: ignore[dict-item]
ADDRESS = LOCAL.address("expert-0")


def test_the_preferred_way_is_taken_where_it_exists() -> None:
    transport = AutoTransport(LOCAL, Nowhere(HostLost("never asked")))
    assert transport.connect(ADDRESS).address == ADDRESS
    transport.close()


def test_the_other_way_is_taken_where_it_does_not() -> None:
    nowhere = Nowhere(HostLost("port closed"))
    transport = AutoTransport(nowhere, LOCAL)
    assert transport.connect(ADDRESS).address == ADDRESS
    transport.close()
    assert nowhere.num_closed == 1


def test_a_host_that_neither_reaches_is_lost() -> None:
    with pytest.raises(HostLost, match="port closed; actor dead"):
        AutoTransport(Nowhere(HostLost("port closed")), Nowhere(HostLost("actor dead"))).connect(ADDRESS)


def test_a_host_that_refuses_is_not_asked_another_way() -> None:
    with pytest.raises(Unauthenticated):
        AutoTransport(Nowhere(Unauthenticated("wrong token")), LOCAL).connect(ADDRESS)


def test_a_life_that_was_reached_before_is_gone_and_not_out_of_reach() -> None:
    local = LocalTransport({"expert-0": Silent()})  # type: ignore[dict-item]
    address = local.address("expert-0")
    transport = AutoTransport(local, Nowhere(AssertionError("asked")))
    transport.connect(address)
    local.kill("expert-0")
    with pytest.raises(HostLost, match="is not there"):
        transport.connect(address)
