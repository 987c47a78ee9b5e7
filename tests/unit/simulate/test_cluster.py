"""The simulated cluster: it repeats itself, it does all that the policies ask for, and it counts what goes wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ray_moe.errors import InsufficientResources, InvalidConfig
from ray_moe.policy.planner import Goals
from ray_moe.policy.scaling import ScalingGoals
from ray_moe.policy.survival import p_lossless as slow_p_lossless
from ray_moe.simulate.gauge import p_lossless
from ray_moe.simulate.recording import RecordedTrace
from ray_moe.simulate.trace import Jump
from ray_moe.types import Placement
from tests.unit.simulate.small import EXPERT_BYTES, SCENARIO, TRACE, scenario, settings, simulation, trace

LOSSES = 3600 / 20
"""An hour: each node is lost once in 20 s."""


def test_the_same_seed_gives_the_same_report_and_another_seed_another():
    stormy = scenario(losses_per_hour=LOSSES)
    reports = [simulation(trace(drift=0.1), replace(stormy, seed=seed)).run() for seed in (1, 1, 2)]
    assert reports[0] == reports[1]
    assert reports[0].faults != reports[2].faults


def test_balancing_beats_the_first_placement_on_every_measure():
    balanced = simulation().run()
    static = simulation(balance=False).run()
    for name in ("per_batch", "per_window"):
        ours, theirs = getattr(balanced, name), getattr(static, name)
        assert ours.second_half > 0.9
        assert ours.second_half > theirs.second_half + 0.1
    assert static.changes.loaded_replicas == 0
    assert balanced.changes.loaded_replicas > 0
    assert balanced.changes.store_bytes == balanced.changes.loaded_replicas * EXPERT_BYTES


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("notice_s", [0.0, 3.0])
def test_every_instruction_is_carried_out(seed, notice_s):
    """After each step no rule of the policies is broken, and hosts hold what the policies believe that they do."""
    stormy = scenario(losses_per_hour=LOSSES, notice_s=notice_s, hosts_per_node=1 + seed % 2, num_standbys=seed % 3)
    run = simulation(trace(drift=0.2, seconds=40), replace(stormy, seed=seed), goals=Goals(min_replicas=2))
    found = []

    def look(_: object) -> None:
        found.extend(run.state.validate())
        for layer, experts in run.table.placement.hosts_of.items():
            for expert, hosts in enumerate(experts):
                found.extend(
                    f"{host} does not have {layer} {expert}"
                    for host in hosts
                    if run.hosts[host].is_up and expert not in run.hosts[host].held.get(layer, ())
                )

    report = run.run(look)
    assert found == []
    assert report.faults.lost_hosts + report.faults.evacuated_hosts > 0
    assert set(run.hosts) == set(run.state.hosts)


def test_when_the_losses_are_over_everything_is_in_order_again():
    calm = simulation(trace(seconds=120), scenario(start_s=1.0))
    lost = calm.hosts["expert-1"]
    calm.after(10.0, lambda: calm.lose_node(lost.node))
    report = calm.run()
    state = calm.state
    assert report.faults.lost_nodes == 1
    assert lost.num_lives == 2
    assert state.transaction is None
    assert state.table.placement == state.placement
    for host_id, host in calm.hosts.items():
        assert {layer: sorted(experts) for layer, experts in host.held.items()} == state.placement.experts_on(host_id)


# --- losses ----------------------------------------------------------------------------------------------------
def one_loss(**changes):
    """The report on a cluster that loses a node when it has come to rest."""
    run = simulation(trace(seconds=60), scenario(start_s=1.0), **changes)
    run.after(40.0, lambda: run.lose_node(run.hosts["expert-1"].node))
    return run.run()


def test_with_replicas_a_loss_is_survived_and_counted():
    faults = one_loss(goals=Goals(min_replicas=2)).faults
    assert (faults.lost_nodes, faults.lost_hosts, faults.survived) == (1, 1, 1)
    assert (faults.orphaned_experts, faults.lifeboat_rows, faults.orphan_s) == (0, 0.0, 0.0)


def test_without_replicas_the_rows_of_the_lost_experts_are_counted():
    faults = one_loss(balance=False).faults
    assert (faults.lost_nodes, faults.survived) == (1, 0)
    assert faults.orphaned_experts == 4  # 8 experts over 4 hosts, in 2 layers
    # Noticed after 0.05 s; then others stand in, who load 1 MiB at 128 MiB/s for each expert that they take.
    assert 0.05 < faults.orphan_s < 0.2
    rows = next(iter(TRACE)).rows[:, 2:4].sum()
    assert 0 < faults.lifeboat_rows <= rows * faults.orphan_s + 1


def test_a_node_takes_all_its_hosts_with_it():
    run = simulation(trace(seconds=5), scenario(hosts_per_node=2))
    run.after(1.0, lambda: run.lose_node(run.hosts["expert-0"].node))
    faults = run.run().faults
    assert (faults.lost_nodes, faults.lost_hosts, faults.orphaned_experts) == (1, 2, 8)


def test_with_notice_hosts_hand_over_and_nothing_is_lost():
    rates = {"losses_per_hour": 3600 / 200, "seed": 5}
    surprised = simulation(trace(seconds=200), scenario(**rates)).run().faults
    warned = simulation(trace(seconds=200), scenario(notice_s=10.0, **rates)).run().faults
    assert surprised.lost_nodes > 0
    assert surprised.lifeboat_rows > 0
    assert warned.evacuated_hosts > 0
    assert warned.lifeboat_rows == 0


# --- how many hosts --------------------------------------------------------------------------------------------
def test_hosts_follow_the_load_and_cost_follows_the_hosts():
    goals = ScalingGoals(2, 12, up_after_s=1.0, down_after_s=5.0, cool_down_s=2.0)
    busy = trace(kind="uniform", seconds=60, surge=Jump(5.0, 2.0))
    scaled = simulation(busy, scaling=goals, spare_slots=4).run()
    fixed = simulation(busy, spare_slots=4).run()
    assert (fixed.first_hosts, fixed.most_hosts, fixed.last_hosts) == (4, 4, 4)
    assert fixed.host_hours == pytest.approx(4 * 60 / 3600)
    assert scaled.last_hosts >= 6
    assert scaled.host_hours > fixed.host_hours
    assert scaled.steps[-1].queue_age_s < fixed.steps[-1].queue_age_s
    quiet = simulation(trace(kind="uniform", seconds=60, surge=Jump(5.0, 0.3)), scaling=goals, spare_slots=4).run()
    assert quiet.last_hosts < 4
    assert quiet.host_hours < fixed.host_hours


def test_standbys_cost_and_take_over():
    run = simulation(trace(seconds=30), scenario(num_standbys=1, start_s=5.0), balance=False)
    run.after(10.0, lambda: run.lose_node(run.hosts["expert-2"].node))
    report = run.run()
    assert report.host_hours == pytest.approx(5 * 30 / 3600)
    assert report.told["repaired"] == 1
    assert run.state.hosts["expert-4"].role == "serving"


# --- traces of other shapes ------------------------------------------------------------------------------------
def test_layers_of_different_widths_and_quiet_steps():
    rows = np.zeros((4, 2, 8), dtype=np.int64)
    rows[1:3, 0], rows[1:3, 1, :5] = 100, 160
    of = RecordedTrace(("wide", "narrow"), (8, 5), np.array([1.0, 2.0, 0.5, 1.0]), rows)
    report = simulation(of).run()
    assert report.virtual_s == 4.5
    assert report.rows == rows.sum()
    assert report.per_batch.count == 2 * SCENARIO.batches_per_step
    assert [step.rows_per_s for step in report.steps] == [0.0, 800.0, 3200.0, 0.0]


def test_batches_of_a_few_rows_are_measured_in_experts():
    report = simulation(world=scenario(tokens_per_batch=2)).run()
    assert report.measured == "experts"
    assert 0 < report.per_batch.mean < 1


# --- refusals --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hosts": 0}, "--hosts is 0; expected a number that is 1 or more"),
        ({"hosts_per_node": 0}, "--hosts-per-node is 0"),
        ({"bandwidth": 0.0}, "--bandwidth is 0; expected a number that is more than 0"),
        ({"losses_per_hour": -1.0}, "--spot-losses is -1"),
        ({"notice_s": -1.0}, "--notice is -1"),
        ({"start_s": float("nan")}, "--start-seconds is nan"),
        ({"host_rows_per_s": 0.0}, "--host-speed is 0"),
        ({"tokens_per_batch": 0}, "--tokens-per-batch is 0"),
        ({"batch_noise": 6.0}, "--batch-noise is 6; expected a number that is 0 or more, and at most 5"),
        ({"batches_per_step": 0}, "--batches-per-step is 0"),
    ],
)
def test_impossible_worlds_are_refused_by_their_option(changes, said):
    with pytest.raises(InvalidConfig) as caught:
        scenario(**changes)
    assert caught.value.message.startswith(said)


def test_experts_that_do_not_fit_are_refused_with_the_numbers():
    with pytest.raises(InsufficientResources) as caught:
        simulation(max_bytes=2 * EXPERT_BYTES)
    assert caught.value.message == (
        "4 hosts of 2,097,152 bytes (experts.max_bytes) have 4 slots for the 8 experts of a layer, each 2,097,152 "
        "bytes over all layers; take --hosts 8 or more"
    )
    with pytest.raises(InsufficientResources, match="with at least 2,097,152 bytes each"):
        simulation(max_bytes=1)


def test_more_choices_than_a_recorded_layer_has_experts():
    of = RecordedTrace(("wide", "narrow"), (8, 1), np.array([1.0]), np.zeros((1, 2, 8), dtype=np.int64))
    with pytest.raises(InvalidConfig, match="--top-k is 2, but a layer of the trace has 1 experts"):
        simulation(of)


# --- sums ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("num_lost", [1, 2, 3])
def test_the_chance_to_lose_nothing_is_that_of_the_policy(num_lost):
    random = np.random.default_rng(num_lost)
    node_of = {f"expert-{host}": f"node-{host // 2}" for host in range(12)}
    rows = tuple(
        tuple(f"expert-{host}" for host in random.choice(14, size=random.integers(2, 6), replace=False))
        for _ in range(40)
    )
    placement = Placement({"a": rows, "b": rows[:7]})
    assert p_lossless(placement, node_of, num_lost) == slow_p_lossless(placement, node_of, num_lost)


def test_the_settings_of_a_small_cluster_are_the_services_own():
    assert settings().expert_bytes == dict.fromkeys(TRACE.layers, EXPERT_BYTES)
