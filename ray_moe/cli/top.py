"""`ray-moe top`: what a running service does now, looked at again and again.

Rates are differences of two looks. A service that cannot be reached is waited for; the last picture stays.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from ray_moe.cli import tables
from ray_moe.cli.target import Target
from ray_moe.client.sync import Client
from ray_moe.errors import DeadlineExceeded, Unavailable
from ray_moe.types import HostId, HostStatus, LayerPath, ServiceStatus

MIN_HOSTS = 4
OTHER_LINES = 31
"""Of a picture, at the most, that are not of the hosts' table."""


@dataclass(frozen=True, slots=True)
class Look:
    """What a service said, and when."""

    at_s: float
    """Monotonic."""
    status: ServiceStatus


def run(to: Target, interval_s: float, once: bool, timeout_s: float) -> None:
    """Show a service until Ctrl-C; a single time with `once`, or where there is no terminal."""
    console = Console()
    # Rates are of one router: a look at another one would say nothing about the last.
    with Client(to.server, timeout_s, discover=False, **to.access) as client:
        if once or not console.is_terminal:
            first = _look(client)
            time.sleep(interval_s)
            console.print(frame(first, _look(client)))
            return
        try:
            with Live(console=console, screen=True, auto_refresh=False) as live:
                _follow(client, live, interval_s)
        except KeyboardInterrupt:
            return


def _follow(client: Client, live: Live, interval_s: float) -> None:
    last: Look | None = None
    picture: RenderableType = Text(f"looking at {client.target} ...")
    while True:
        began_s = time.monotonic()
        away = Text()
        try:
            now = _look(client)
        except (Unavailable, DeadlineExceeded) as error:
            away = Text.assemble(("cannot be reached, trying again: ", "bold red"), error.message, overflow="ellipsis")
        else:
            if last is not None:
                picture = frame(last, now, max_hosts=max(MIN_HOSTS, live.console.height - OTHER_LINES))
            last = now
        live.update(Group(away, picture) if away else picture, refresh=True)
        time.sleep(max(0.0, began_s + interval_s - time.monotonic()))


def _look(client: Client) -> Look:
    status = client.status()
    return Look(time.monotonic(), status)


def frame(before: Look, now: Look, max_hosts: int | None = None) -> Group:
    """The picture of a service at `now`, with rates since `before`; of its hosts `max_hosts`, or all."""
    status = now.status
    shown = _notable(status.hosts, max_hosts)
    hosts = tables.hosts(shown, rows_per_s=_rows_per_s(before, now))
    if len(shown) < len(status.hosts):
        hosts.caption = f"and {len(status.hosts) - len(shown)} more that are ready and less busy"
    parts: list[RenderableType] = [tables.summary(status), _rates(before, now), "", hosts]
    tokens_per_s = _tokens_per_s(before, now)
    if any(map(any, tokens_per_s.values())):
        parts += ["", tables.hottest(tokens_per_s)]
    if status.events:
        parts += ["", tables.events(status.events)]
    return Group(*parts)


def _notable(hosts: Sequence[HostStatus], number: int | None) -> Sequence[HostStatus]:
    """So many of the hosts, in their order: those that are not ready, then the busiest."""
    if number is None or len(hosts) <= number:
        return hosts
    chosen = sorted(hosts, key=lambda host: (host.state == "ready", -host.utilisation))[:number]
    return [host for host in hosts if host in chosen]


def _rates(before: Look, now: Look) -> Text:
    seconds = _seconds(before, now)
    old, new = before.status.router, now.status.router
    tokens, again, hedged = (
        max(0, getattr(new, name) - getattr(old, name)) / seconds
        for name in ("generated_tokens", "retried_calls", "hedged_calls")
    )
    return Text.assemble(
        "now: ",
        (f"{tokens:.1f} tokens/s", "bold"),
        f"; {again:.1f} calls/s again, {hedged:.1f} hedged; longest pause {new.longest_pause_s:.2f} s",
    )


def _rows_per_s(before: Look, now: Look) -> Mapping[HostId, float]:
    """Of a host that began anew, none until the next look."""
    seconds = _seconds(before, now)
    old = {host.host_id: host.num_rows for host in before.status.hosts}
    return {
        host.host_id: max(0, host.num_rows - old.get(host.host_id, host.num_rows)) / seconds
        for host in now.status.hosts
    }


def _tokens_per_s(before: Look, now: Look) -> Mapping[LayerPath, Sequence[float]]:
    """Of each expert."""
    seconds = _seconds(before, now)
    rates = {}
    for layer, counts in now.status.tokens_per_expert.items():
        old = before.status.tokens_per_expert.get(layer, counts)
        rates[layer] = [max(0, new - past) / seconds for new, past in zip(counts, old, strict=True)]
    return rates


def _seconds(before: Look, now: Look) -> float:
    return max(now.at_s - before.at_s, 1e-3)
