import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from ray_moe.policy.split import NOWHERE, Replicas, choose_replicas, split_tokens


@st.composite
def layers(draw, most_experts=12, most_hosts=6):
    """(homes of each expert, number of hosts)."""
    num_hosts = draw(st.integers(1, most_hosts))
    homes = st.lists(st.integers(0, num_hosts - 1), max_size=num_hosts, unique=True)
    return draw(st.lists(homes, min_size=1, max_size=most_experts)), num_hosts


def speeds(num_hosts):
    return st.none() | st.lists(st.floats(0.1, 10), min_size=num_hosts, max_size=num_hosts).map(np.array)


def least_time(count, homes, speed):
    """Least possible largest host time of a fractional split: a linear program."""
    pairs = [(expert, host) for expert, hosts in enumerate(homes) for host in hosts]
    on_host = np.zeros((len(speed), len(pairs) + 1))
    of_expert = np.zeros((len(homes), len(pairs) + 1))
    for place, (expert, host) in enumerate(pairs):
        on_host[host, place] = 1 / speed[host]
        of_expert[expert, place] = 1
    on_host[:, -1] = -1
    objective = np.append(np.zeros(len(pairs)), 1.0)
    solved = linprog(objective, on_host, np.zeros(len(speed)), of_expert, count, method="highs")
    assert solved.success
    return solved.fun


def zipf_on_random_hosts(seed, num_experts, num_hosts, num_spare):
    """32k rows by a shuffled Zipf law; one home each, and spare ones to the hottest, at random."""
    random = np.random.default_rng(seed)
    weight = random.permutation(1 / np.arange(1, num_experts + 1))
    homes = [[expert % num_hosts] for expert in range(num_experts)]
    for expert in random.choice(num_experts, num_spare, p=weight / weight.sum()):
        away = [host for host in range(num_hosts) if host not in homes[expert]]
        homes[expert] += [int(random.choice(away))] if away else []
    return random.multinomial(32768, weight / weight.sum()), homes


@given(layers(), st.data())
def test_each_experts_rows_add_up_and_no_replica_gets_fewer_than_none(layer, data):
    homes, num_hosts = layer
    count = np.array(data.draw(st.lists(st.integers(0, 5000), min_size=len(homes), max_size=len(homes))))
    speed = data.draw(speeds(num_hosts))
    background = data.draw(
        st.none() | st.lists(st.floats(0, 9999), min_size=num_hosts, max_size=num_hosts).map(np.array)
    )
    replicas = Replicas.of(homes, num_hosts)
    rows = split_tokens(count, replicas, speed, background)
    assert rows.dtype == np.int64
    assert (rows >= 0).all()
    split = np.split(rows, replicas.start[1:-1])
    assert [int(part.sum()) for part in split] == [n if hosts else 0 for n, hosts in zip(count, homes, strict=True)]
    assert (split_tokens(count, replicas, speed, background) == rows).all()


@given(layers(most_experts=8), st.data())
def test_no_single_row_can_lower_the_larger_of_two_hosts(layer, data):
    """Unless the largest load is as low as it can be, none of its rows is better off at another home."""
    homes, num_hosts = layer
    count = np.array(data.draw(st.lists(st.integers(0, 40), min_size=len(homes), max_size=len(homes))))
    replicas = Replicas.of(homes, num_hosts)
    rows = split_tokens(count, replicas)
    load = np.bincount(replicas.host, rows, num_hosts)
    top = load.max()
    stuck = np.bincount(
        [hosts[0] for hosts in homes if len(hosts) == 1],
        minlength=num_hosts,
        weights=[n for n, hosts in zip(count, homes, strict=True) if len(hosts) == 1],
    )
    bound = max(-(-int(load.sum()) // num_hosts), stuck.max())
    for expert in range(len(homes)):
        mine = range(replicas.start[expert], replicas.start[expert + 1])
        for one, other in itertools.permutations(mine, 2):
            if rows[one] and load[replicas.host[one]] == top > bound:
                assert load[replicas.host[other]] >= top - 1


@pytest.mark.parametrize(
    ("num_experts", "num_hosts", "num_spare"), [(8, 4, 4), (64, 8, 8), (64, 8, 16), (128, 16, 32), (256, 64, 64)]
)
@pytest.mark.parametrize("equal", [True, False])
def test_close_to_the_linear_program(num_experts, num_hosts, num_spare, equal):
    for seed in range(4):
        count, homes = zipf_on_random_hosts(seed, num_experts, num_hosts, num_spare)
        speed = np.ones(num_hosts) if equal else np.random.default_rng(seed).uniform(0.5, 2, num_hosts)
        replicas = Replicas.of(homes, num_hosts)
        rows = split_tokens(count, replicas, None if equal else speed)
        ideal = count.sum() / speed.sum()
        time = (np.bincount(replicas.host, rows, num_hosts) / speed).max()
        assert ideal / least_time(count, homes, speed) - ideal / time <= 0.02


def test_a_hot_expert_leaves_none_of_its_replicas_idle():
    replicas = Replicas.of([[0, 1, 2, 3], [0]], 4)
    rows = split_tokens(np.array([402, 100]), replicas).tolist()
    assert (rows[0], sorted(rows[1:4]), rows[4]) == (26, [125, 125, 126], 100)


def test_rows_follow_speed_and_what_hosts_have_already():
    pair = Replicas.of([[0, 1]], 2)
    assert split_tokens(np.array([90]), pair, np.array([2.0, 1.0])).tolist() == [60, 30]
    assert split_tokens(np.array([90]), pair, background=np.array([30.0, 0.0])).tolist() == [30, 60]
    trio = Replicas.of([[2, 0, 1]], 3)
    rows = split_tokens(np.array([90]), trio, np.array([1.0, 1.0, 4.0]), np.array([0.0, 5.0, 0.0]))
    assert rows.sum() == 90
    assert max(rows[0] / 4, rows[1], rows[2] + 5) == 16  # no split of whole rows is quicker


def test_load_travels_along_a_chain_of_hosts():
    chain = Replicas.of([[0], *([host, host + 1] for host in range(7))], 8)
    rows = split_tokens(np.array([0, *[1000] * 7]), chain)
    assert np.bincount(chain.host, rows, 8).max() <= 1.02 * 875


def choose_by_brute_force(homes, speed, background):
    return min(
        max((np.bincount(hosts, minlength=len(speed)) + background) / speed)
        for hosts in itertools.product(*(home for home in homes if home))
    )


@given(layers(most_experts=6, most_hosts=4), st.data())
def test_whole_experts_are_spread_as_well_as_can_be(layer, data):
    homes, num_hosts = layer
    touched = np.array(data.draw(st.permutations(range(len(homes)))))
    background = np.array(data.draw(st.lists(st.integers(0, 3), min_size=num_hosts, max_size=num_hosts)), dtype=float)
    replicas = Replicas.of(homes, num_hosts)
    chosen = choose_replicas(touched, replicas, background=background)
    for expert, replica in zip(touched, chosen, strict=True):
        if homes[expert]:
            assert replicas.start[expert] <= replica < replicas.start[expert + 1]
        else:
            assert replica == NOWHERE
    read = np.bincount(replicas.host[chosen[chosen != NOWHERE]], minlength=num_hosts) + background
    if any(homes):
        assert read.max() == max(choose_by_brute_force(homes, np.ones(num_hosts), background), background.max())


def test_whole_experts_go_to_fast_hosts():
    replicas = Replicas.of([[0, 1]] * 6, 2)
    chosen = choose_replicas(np.arange(6), replicas, np.array([2.0, 1.0]))
    assert np.bincount(replicas.host[chosen]).tolist() == [4, 2]


def test_nothing_touched_nothing_chosen():
    replicas = Replicas.of([[0], [1, 0]], 2)
    assert choose_replicas(np.array([], dtype=np.int64), replicas).tolist() == []
    assert split_tokens(np.array([0, 0]), replicas).tolist() == [0, 0, 0]
