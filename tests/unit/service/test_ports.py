"""Free ports that nobody is given while a router is away."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from ray_moe.service import ports
from ray_moe.service.grpc.server import FrontDoor
from ray_moe.service.openai.server import HttpFrontDoor
from tests.unit.service.fake_backend import FakeBackend


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_lasting_port_is_free_and_none_the_system_would_choose(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ip_local_port_range"
    file.write_text("20100\t60999\n")
    monkeypatch.setattr(ports, "_EPHEMERAL", file)
    for _ in range(20):
        port = ports.lasting(host)
        assert ports.why_taken(host, port) is None
        assert 19_999 < port < 20_100


def test_ports_that_are_taken_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", ports.lasting("127.0.0.1"))) as server:
        taken = server.getsockname()[1]
        assert "in use" in (ports.why_taken("127.0.0.1", taken) or "")
        monkeypatch.setattr(ports, "_FIRST", taken)
        monkeypatch.setattr(ports, "_END", taken + 1)
        assert ports.lasting("127.0.0.1") == 0


@pytest.mark.parametrize(("says", "lasts"), [("32768\t60999", True), ("1024\t65535", False), ("", True), (None, True)])
def test_where_the_system_chooses_from_all_it_chooses(
    says: str | None, lasts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ip_local_port_range"
    if says is not None:
        file.write_text(says)
    monkeypatch.setattr(ports, "_EPHEMERAL", file)
    assert (ports.lasting("127.0.0.1") > 0) is lasts


@pytest.mark.parametrize("door", [FrontDoor, HttpFrontDoor])
async def test_a_door_whose_free_port_was_taken_meanwhile_takes_another(
    door: type[FrontDoor] | type[HttpFrontDoor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as quicker:
        taken = quicker.getsockname()[1]
        monkeypatch.setattr(ports, "lasting", lambda host: taken)
        opened = door(FakeBackend(), "127.0.0.1", 0)
        port = await opened.start()
        assert port not in (0, taken)
        await opened.stop(0)
