"""What actors tell each other: where a router listens."""

from __future__ import annotations

from typing import Any

import pytest

from ray_moe.actors.spec import Ports, ServiceSpec, cluster_settings
from ray_moe.config import Config, ServerConfig
from ray_moe.types import Placement


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1:8476"),
        ("0.0.0.0", "10.0.0.7:8476"),
        ("::", "10.0.0.7:8476"),
        ("::1", "[::1]:8476"),
        ("node.example", "node.example:8476"),
    ],
)
def test_the_address_of_a_router_can_be_dialled(host: str, address: str) -> None:
    server = ServerConfig.model_construct(host=host)
    assert Ports(8476).address("router-0", server, "10.0.0.7").grpc_address == address
    assert Ports(8476).address("router-0", server, "10.0.0.7").http_address == ""
    both = Ports(8476, 8477).address("router-0", server, "10.0.0.7")
    assert both.http_address == f"http://{address.replace('8476', '8477')}"
    encrypted = ServerConfig(tls_cert_file="cert.pem", tls_key_file="key.pem")
    assert Ports(1, 2).address("router-0", encrypted, "").http_address == "https://127.0.0.1:2"


def no_door(*_: Any) -> Any:
    raise AssertionError("nothing is served here")


def spec(**server: object) -> ServiceSpec:
    return ServiceSpec(
        config=Config.model_validate({"model": "m", "server": server}),
        name="s",
        version="0",
        model_type="mixtral",
        layers=(),
        placement=Placement({}),
        hosts=(),
        standbys=(),
        routers=("router-0", "router-1"),
        token="",
        open_door=no_door,
    )


def test_routers_listen_side_by_side() -> None:
    assert spec().ports_of("router-0") == {"port": 8476, "http_port": 8477}
    assert spec().ports_of("router-1") == {"port": 8478, "http_port": 8479}
    assert spec(port=0, http_port=None).ports_of("router-1") == {"port": 0, "http_port": None}


def test_experts_in_files_are_not_copied_from_actor_to_actor() -> None:
    for experts, donors in (({}, "node"), ({"copy_from": "any"}, "any"), ({"offload": "disk"}, "none")):
        assert cluster_settings(Config.model_validate({"experts": experts}), ()).donors == donors
