"""A host that is cut off is out of reach, and comes back as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ray_moe.errors import HostLost
from ray_moe.runtime.moe_layer import ExpertDispatcher
from ray_moe.runtime.settings import DispatchSettings
from ray_moe.transport.partition import PartitionedTransport
from tests.toy import LAYER, ToyExperts, local_cluster, random_routing


def test_a_cut_breaks_the_line_and_refuses_others_until_it_is_over(monkeypatch):
    now_s = [100.0]
    monkeypatch.setattr("ray_moe.transport.partition.time.monotonic", lambda: now_s[0])
    inner, table, hosts, _ = local_cluster(ToyExperts(), 2)
    transport = PartitionedTransport(inner)
    line: Any = transport.connect(table.addresses["expert-0"])
    other: Any = transport.connect(table.addresses["expert-1"])
    transport.cut_off("expert-0", 5.0)
    with pytest.raises(HostLost, match="cut off on purpose for another 5"):
        transport.connect(table.addresses["expert-0"])
    assert line._closed.is_set()
    assert not other._closed.is_set()
    now_s[0] += 5.1
    assert transport.connect(table.addresses["expert-0"]).address == table.addresses["expert-0"]
    assert len(hosts) == 2
    transport.close()


def test_batches_wait_for_a_host_that_was_cut_off():
    module = ToyExperts()
    inner, table, _, _ = local_cluster(module, 2)
    transport = PartitionedTransport(inner)
    dispatcher = ExpertDispatcher(transport, DispatchSettings(recovery_timeout_s=10))
    dispatcher.update(table)
    hidden = torch.randn(20, 8)
    index, weight = random_routing(20, 6, 2)
    with torch.no_grad():
        dispatcher.forward(LAYER, hidden, index, weight)
        transport.cut_off("expert-1", 0.3)
        out = dispatcher.forward(LAYER, hidden, index, weight)
    torch.testing.assert_close(out, module.oracle(hidden, index, weight))
    assert dispatcher.num_retried_calls > 0
    dispatcher.close()
    transport.close()
