import pytest

from ray_moe.actors.spec import ServiceSpec
from ray_moe.config import Config
from ray_moe.errors import InsufficientResources
from ray_moe.policy.placement import place_by_index
from ray_moe.service import preflight
from ray_moe.types import LayerSpec

GIB = 2**30


def make_spec(num_hosts=4, expert_bytes=GIB // 8, **sections):
    """8 experts of `expert_bytes` in each of 2 layers."""
    hosts = tuple(f"expert-{number}" for number in range(num_hosts))
    standbys = tuple(f"standby-{n}" for n in range(sections.get("experts", {}).get("standby_actors", 0)))
    layers = tuple(LayerSpec(path, 8, 64, 64, "bfloat16", expert_bytes) for path in ("a", "b"))
    return ServiceSpec(
        config=Config.model_validate({"model": "m", **sections}),
        version="0",
        model_type="mixtral",
        layers=layers,
        placement=place_by_index({layer.path: 8 for layer in layers}, hosts),
        hosts=hosts,
        standbys=standbys,
        token="",
        open_door=lambda backend, server: None,  # type: ignore[arg-type,return-value]
    )


def test_what_fits_passes():
    preflight.check(make_spec(), GIB, {"CPU": 5}, [8 * GIB])


@pytest.mark.parametrize(
    ("spec", "resources", "message"),
    [
        (make_spec(), {"CPU": 4}, "4 expert actors and the router need 5 CPU, and the cluster has 4"),
        (make_spec(experts={"num_gpus": 1}), {"CPU": 5}, "need 4 GPU, and the cluster has 0; set experts.num_gpus"),
        (make_spec(experts={"resources": {"slot": 1}}), {"CPU": 9, "slot": 2}, "need 4 slot, and the cluster has 2"),
        (make_spec(experts={"standby_actors": 2}), {"CPU": 5}, "6 expert actors and the router need 7 CPU"),
    ],
)
def test_missing_resources_are_named_with_both_numbers(spec, resources, message):
    with pytest.raises(InsufficientResources, match=message):
        preflight.check(spec, 0, resources, [64 * GIB])


def test_too_little_memory_is_refused_before_loading_with_the_numbers():
    message = r"about 4.71 GiB of memory \(2.00 GiB of experts, 1.00 GiB of other weights, .* 3.00 GiB is available"
    with pytest.raises(InsufficientResources, match=message):
        preflight.check(make_spec(), GIB, {"CPU": 5}, [3 * GIB])


def test_preloaded_standbys_count_with_all_experts():
    spec = make_spec(experts={"standby_actors": 1, "standby_preload": True})
    with pytest.raises(InsufficientResources, match=r"4\.00 GiB of experts"):
        preflight.check(spec, 0, {"CPU": 6}, [5 * GIB])


def test_a_share_larger_than_any_node_is_refused():
    with pytest.raises(
        InsufficientResources, match=r"one actor must hold 8\.00 GiB and no node has more than 7\.00 GiB"
    ):
        preflight.check(make_spec(num_hosts=1, expert_bytes=GIB // 2), 0, {"CPU": 5}, [7 * GIB, 7 * GIB])


def test_experts_on_gpus_need_no_host_memory():
    preflight.check(
        make_spec(experts={"num_gpus": 1}, router={"num_gpus": 1}), 99 * GIB, {"CPU": 5, "GPU": 5}, [4 * GIB]
    )


def test_slots_leave_room_for_the_router_and_the_standbys():
    config = Config.model_validate({"experts": {"num_cpus": 0.5, "standby_actors": 1}})
    assert preflight.actor_slots(config, {"CPU": 4}) == 5
    gpus = Config.model_validate({"experts": {"num_gpus": 0.5, "num_cpus": 0}, "router": {"num_gpus": 1}})
    assert preflight.actor_slots(gpus, {"CPU": 1, "GPU": 3}) == 4
    free = Config.model_validate({"experts": {"num_cpus": 0}})
    assert preflight.actor_slots(free, {}) == float("inf")
