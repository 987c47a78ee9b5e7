"""A running standby actor takes over from a lost one, which becomes the next standby."""

from __future__ import annotations

import os
import signal
import time

import pytest

from ray_moe.client.sync import Client
from tests.ray.support import Streams, all_ready, await_status, greedy, prompts

NUM_TOKENS = 300


@pytest.mark.parametrize("preload", [True, False], ids=["preloaded", "empty"])
def test_a_standby_takes_over(mixtral, serve, preload):
    reference, folder = mixtral
    expected = greedy(reference, prompts(4), NUM_TOKENS)
    slowly = {"warm_start": False}  # or the lost actor would be back as soon
    service = serve(folder, ray=slowly, experts={"num_actors": 2, "standby_actors": 1, "standby_preload": preload})
    with Client(service.address) as client:
        before = await_status(client, lambda s: all_ready(s) and (s.hosts[2].loaded_bytes > 0) == preload, what="there")
        lost, kept, standby = before.hosts
        assert [host.state for host in before.hosts] == ["ready", "ready", "standby"]

        with Streams(service.address, prompts(4), NUM_TOKENS) as streams:
            streams.wait_for(20)
            os.kill(lost.pid, signal.SIGKILL)
            lost_at = time.monotonic()
            streams.wait_for(100)
            took_over_s = time.monotonic() - lost_at
            restarted = client.status().hosts[0].state in ("ready", "standby")
        assert streams.results == expected
        after = await_status(client, all_ready)
        restart_s = time.monotonic() - lost_at
        print(
            f"preload={preload}: longest stall {streams.longest_stall_s * 1000:.0f} ms, restarted in {restart_s:.1f} s"
        )
        assert not restarted, f"80 tokens took {took_over_s:.1f} s, as long as a restart: nobody took over"
        assert streams.longest_stall_s < restart_s

        assert [host.state for host in after.hosts] == ["standby", "ready", "ready"]
        assert after.hosts[0].pid != lost.pid
        assert (after.hosts[1].pid, after.hosts[2].pid) == (kept.pid, standby.pid)
        assert [host.restarts for host in after.hosts] == [1, 0, 0]
        assert after.hosts[2].num_rows > 0
        served = {host for layer in client.placement().placement.hosts_of.values() for hosts in layer for host in hosts}
        assert served == {kept.host_id, standby.host_id}
