"""One service for all hostile calls of a test process, and what must hold during them and after the last."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.service.hostile.grpc_corpus import forward
from tests.unit.service.hostile.service import FORWARD, IN_FLIGHT_BYTES, Service, Witness, calling

FOLDER = Path(__file__).parent
SETTLE_S = 60.0
NEVER_IN_THE_LOG = ("Traceback", "fault ", "never retrieved", "never awaited", "a generation failed")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder in one process, if there are several: one service does for them."""
    for item in items:
        if FOLDER in item.path.parents and "service" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("hostile"))


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Witness]]:
    service = Service(tmp_path_factory.mktemp("hostile"))
    try:
        before = service.facts()
        with contextlib.ExitStack() as silent:
            connections = [silent.enter_context(connection) for connection in service.say_nothing()]
            witness = Witness(service)
            witness.start()
            yield service, witness
            witness.stop()
            for connection in connections:
                while connection.recv(1000):  # until the service has hung up, which it must
                    pass
        assert_nothing_is_left(service, before)
    finally:
        service.kill()


def assert_nothing_is_left(service: Service, before: dict[str, Any]) -> None:
    takes_all = forward(request_id="r" * IN_FLIGHT_BYTES).SerializeToString()  # refused if a byte were held
    assert list(calling(service.channel, FORWARD, [takes_all]))
    assert list(calling(service.keyed_channel, FORWARD, [takes_all], metadata=service.keys.metadata("ana")))
    service.hang_up()
    after = settled(service, before)
    assert service.stop() < SETTLE_S / 2  # it would wait as long for a request that it counts and that is none
    log = service.log.read_text()
    assert not [word for word in NEVER_IN_THE_LOG if word in log], log[-4000:]
    assert (after["failed"], after["accused"]) == (0, 0)


def settled(service: Service, before: dict[str, Any]) -> dict[str, Any]:
    """What the process says of itself once everything is over, which must be as little as before."""
    end_s = time.monotonic() + SETTLE_S
    while True:
        now = service.facts()
        too_many = {name: now[name] for name in ("fds", "tasks", "active") if now[name] > before[name]}
        if not too_many:
            break
        assert time.monotonic() < end_s, f"left behind: {too_many}, before {before}"
        time.sleep(0.1)
    assert now["threads"] <= before["threads"] + 24, "more than the pools of threads have"
    assert now["rss_bytes"] <= before["rss_bytes"] + 2**30
    return now


@pytest.fixture
def service(running: tuple[Service, Witness]) -> Iterator[Service]:
    """After each test other clients get what they should, over the doors that the test says (`service.check`)."""
    service, witness = running
    with witness.watching():
        yield service
