from typing import Any

import pytest
import ray

from ray_moe.actors.spec import ServiceSpec
from ray_moe.config import Config
from ray_moe.errors import InsufficientResources
from ray_moe.policy.placement import place_by_index
from ray_moe.service import cluster, preflight
from ray_moe.service.preflight import Node, Room
from ray_moe.types import LayerSpec

GIB = 2**30


def no_door(*_: Any) -> Any:
    raise AssertionError("nothing is served here")


def make_spec(num_hosts=4, expert_bytes=GIB // 8, **sections):
    """8 experts of `expert_bytes` in each of 2 layers."""
    hosts = tuple(f"expert-{number}" for number in range(num_hosts))
    standbys = tuple(f"standby-{n}" for n in range(sections.get("experts", {}).get("standby_actors", 0)))
    layers = tuple(LayerSpec(path, 8, 64, 64, "bfloat16", expert_bytes) for path in ("a", "b"))
    return ServiceSpec(
        config=Config.model_validate({"model": "m", **sections}),
        name="ray-moe",
        version="0",
        model_type="mixtral",
        layers=layers,
        placement=place_by_index({layer.path: 8 for layer in layers}, hosts),
        hosts=hosts,
        standbys=standbys,
        routers=("router-0",),
        token="",
        open_door=no_door,
    )


def room(*memory_bytes, total=None, labels=(), **free):
    nodes = [Node(num_bytes, {"ray.io/node-id": f"n{i}"}) for i, num_bytes in enumerate(memory_bytes or (64 * GIB,))]
    nodes += [Node(64 * GIB, there) for there in labels]
    return Room(free | (total or {}), free, tuple(nodes))


def test_what_fits_passes():
    preflight.check(make_spec(), GIB, room(8 * GIB, CPU=5))


@pytest.mark.parametrize(
    ("spec", "there", "message"),
    [
        (make_spec(), room(CPU=4), "4 expert actors and the router need 5 CPU, and the cluster has 4; start"),
        (make_spec(), room(CPU=4, total={"CPU": 8}), "need 5 CPU, and the cluster has 8, of which 4 are free; start"),
        (make_spec(), room(total={"CPU": 8}), "need 5 CPU, and the cluster has 8, of which 0 are free; start"),
        (make_spec(experts={"num_gpus": 1}), room(CPU=5), "need 4 GPU, and the cluster has 0; set experts.num_gpus"),
        (make_spec(experts={"resources": {"slot": 1}}), room(CPU=9, slot=2), "need 4 slot, and the cluster has 2"),
        (make_spec(experts={"standby_actors": 2}), room(CPU=5), "6 expert actors and the router need 7 CPU"),
    ],
)
def test_missing_resources_are_named_with_both_numbers(spec, there, message):
    with pytest.raises(InsufficientResources, match=message):
        preflight.check(spec, 0, there)


def test_too_little_memory_is_refused_before_loading_with_the_numbers():
    message = r"about 4.71 GiB of memory \(2.00 GiB of experts, 1.00 GiB of other weights, .* 3.00 GiB is available"
    with pytest.raises(InsufficientResources, match=message):
        preflight.check(make_spec(), GIB, room(3 * GIB, CPU=5))


def test_preloaded_standbys_count_with_all_experts():
    spec = make_spec(experts={"standby_actors": 1, "standby_preload": True})
    with pytest.raises(InsufficientResources, match=r"4\.00 GiB of experts"):
        preflight.check(spec, 0, room(5 * GIB, CPU=6))


def test_a_share_larger_than_any_node_is_refused():
    with pytest.raises(
        InsufficientResources, match=r"one actor must hold 8\.00 GiB and no node has more than 7\.00 GiB"
    ):
        preflight.check(make_spec(num_hosts=1, expert_bytes=GIB // 2), 0, room(7 * GIB, 7 * GIB, CPU=5))


def test_experts_on_gpus_need_no_host_memory():
    preflight.check(make_spec(experts={"num_gpus": 1}, router={"num_gpus": 1}), 99 * GIB, room(4 * GIB, CPU=5, GPU=5))


def test_experts_that_are_offloaded_count_with_what_is_resident():
    """8 GiB of experts, 2 GiB on each of 4 actors, on a node that has 5 GiB."""

    def spec(**experts):
        return make_spec(expert_bytes=GIB // 2, experts=experts)

    disk = {"offload": "disk", "resident_bytes": GIB // 8}
    preflight.check(spec(**disk), 0, room(5 * GIB, CPU=5))
    with pytest.raises(InsufficientResources, match=r"8\.00 GiB of experts"):
        preflight.check(spec(), 0, room(5 * GIB, CPU=5))
    with pytest.raises(InsufficientResources, match=r"2\.50 GiB of experts"):  # and one expert that computes
        preflight.check(spec(**disk), 0, room(4 * GIB, CPU=5))
    gpus = {"num_gpus": 1, "offload": "cpu"}
    with pytest.raises(InsufficientResources, match=r"8\.00 GiB of experts"):  # pinned memory is memory
        preflight.check(spec(**gpus), 0, room(5 * GIB, CPU=5, GPU=5))
    preflight.check(spec(**gpus | disk), 0, room(3 * GIB, CPU=5, GPU=5))


def test_slots_leave_room_for_the_router_and_the_standbys():
    config = Config.model_validate({"experts": {"num_cpus": 0.5, "standby_actors": 1}})
    assert preflight.actor_slots(config, {"CPU": 4}) == 5
    gpus = Config.model_validate({"experts": {"num_gpus": 0.5, "num_cpus": 0}, "router": {"num_gpus": 1}})
    assert preflight.actor_slots(gpus, {"CPU": 1, "GPU": 3}) == 4
    free = Config.model_validate({"experts": {"num_cpus": 0}})
    assert preflight.actor_slots(free, {}) == float("inf")


@pytest.mark.parametrize("wanted", ["spot", "!cheap", "in(cheap, spot)", "!in(cheap,dear)"])
def test_labels_that_a_node_has(wanted):
    there = room(labels=[{"market-type": "spot", "zone": "a"}], CPU=5)
    preflight.check(make_spec(experts={"label_selector": {"market-type": wanted, "zone": "a"}}), 0, there)


def test_a_node_without_the_label_is_not_the_excluded_one():
    preflight.check(make_spec(experts={"label_selector": {"market-type": "!spot"}}), 0, room(CPU=5))


@pytest.mark.parametrize("wanted", ["dear", "!in(spot,cheap)", "in(dear)"])
def test_labels_that_no_node_has_are_refused_with_those_there_are(wanted):
    spec = make_spec(experts={"label_selector": {"market-type": wanted, "zone": "in(a, b)"}})
    there = room(labels=[{"market-type": "spot", "zone": "a"}, {"market-type": "dear", "zone": "c"}], CPU=5)
    with pytest.raises(InsufficientResources) as caught:
        preflight.check(spec, 0, there)
    assert (
        f"(market-type: {wanted}, zone: in(a, b)); the nodes have market-type=dear, market-type=spot, zone=a, zone=c;"
        in str(caught.value)
    )
    with pytest.raises(InsufficientResources, match="the nodes have none"):
        preflight.check(make_spec(experts={"label_selector": {"zone": "a"}}), 0, room(CPU=5))


def test_what_an_ended_service_gives_back_is_waited_for(monkeypatch):
    monkeypatch.setattr(cluster, "POLL_S", 0)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "object_store_memory": 9.0})
    seen = iter([{}, {}, {"CPU": 1.0, "object_store_memory": 8.0}, {"CPU": 4.0, "object_store_memory": 7.0}])
    monkeypatch.setattr(ray, "available_resources", lambda: next(seen))
    assert cluster._free_resources() == {"CPU": 4.0}


def test_what_others_keep_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(cluster, "CALM_S", 0.01)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})
    assert cluster._free_resources() == {"CPU": 1.0}
