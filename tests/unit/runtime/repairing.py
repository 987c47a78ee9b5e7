"""A cluster in this process that repairs itself, as the controller would."""

from __future__ import annotations

import threading

from ray_moe.policy.placement import replace_host
from ray_moe.runtime.expert_host import ExpertHost
from ray_moe.runtime.moe_layer import ExpertDispatcher
from ray_moe.runtime.settings import DispatchSettings
from ray_moe.types import HostAddress, HostId, RoutingTable
from tests.toy import ToyExperts, hold_all, local_cluster, own_experts


class Repairing:
    """Plays the controller: a killed host's experts go to a spare, with the next epoch."""

    def __init__(self, module: ToyExperts, num_hosts: int, num_replicas: int = 1, lifeboat: int = 0) -> None:
        self.module = module
        self.transport, self.table, _, _ = local_cluster(module, num_hosts, num_replicas)
        self.lock = threading.Lock()
        self.transport.on_kill = self.repair
        self.losses: list[HostAddress] = []
        self.dispatcher = ExpertDispatcher(
            self.transport,
            DispatchSettings(call_timeout_s=0.3, recovery_timeout_s=10, hedge_min_s=0.02),
            on_lost=self.lost,
            own=own_experts(module, lifeboat=lifeboat) if lifeboat else None,
        )
        self.dispatcher.update(self.table)

    def lost(self, address: HostAddress) -> None:
        self.losses.append(address)
        if address.incarnation == self.transport.address(address.host_id).incarnation:
            self.transport.kill(address.host_id)  # a host that does not answer is put down

    def repair(self, host_id: HostId) -> None:
        with self.lock:
            spare = f"spare-{self.table.epoch}"
            placement = replace_host(self.table.placement, host_id, spare)
            host = ExpertHost(spare)
            table = RoutingTable(self.table.epoch + 1, placement)
            hold_all(host, self.module, table)
            addresses = {name: address for name, address in self.table.addresses.items() if name != host_id} | {
                spare: self.transport.revive(spare, host)
            }
            self.table = RoutingTable(table.epoch, placement, addresses)
            self.dispatcher.update(self.table)

    def close(self) -> None:
        self.dispatcher.close()
        self.transport.close()
