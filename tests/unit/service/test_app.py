"""The composition root, as far as it goes without a cluster."""

from __future__ import annotations

import pytest

from ray_moe.config import Config
from ray_moe.service.app import Service


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1:8476"),
        ("0.0.0.0", "127.0.0.1:8476"),
        ("::", "127.0.0.1:8476"),
        ("::1", "[::1]:8476"),
        ("node.example", "node.example:8476"),
    ],
)
def test_the_address_can_be_dialled(host: str, address: str) -> None:
    service = Service(Config.model_validate({"server": {"host": host}}))
    service._port = 8476
    assert service.address == address
