"""What a service reports, as tables for a terminal. Used by `ray-moe status`, `ray-moe top` and `ray-moe demo`."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ray_moe.cli.terminal import format_bytes
from ray_moe.types import ClusterEvent, HostId, HostStatus, LayerPath, RoutingTable, ServiceStatus, VersionStatus

HEAT = "·▁▂▃▄▅▆▇█"
"""Not used at all, then eight steps up to the busiest of the row."""
MAX_LAYER_ROWS = 24
"""A model with more layers than this shows the average of several in each row."""
MAX_EVENTS = 8
MAX_HOTTEST = 5
STATUS_COLUMNS = ("host", "state", "node", "pid", "experts", "weights", "memory", "rows", "busy", "restarts")
LIVE_COLUMNS = ("host", "state", "node", "experts", "memory", "rows/s", "busy", "queued", "restarts")
_LEFT = ("host", "state", "node", "pid", "experts")
_STATE_STYLES = {
    "failed": "bold red",
    "aborted": "bold yellow",
    "draining": "yellow",
    "repaired": "green",
    "resized": "green",
    "ready": "green",
    "current": "green",
    "published": "green",
    "rolled back": "bold yellow",
    "canary rolled back": "bold yellow",
    "standby": "cyan",
    "lost": "bold red",
    "degraded": "bold yellow",
}


def service(status: ServiceStatus, table: RoutingTable | None, width: int) -> Iterator[RenderableType]:
    """All of it, part by part."""
    yield summary(status)
    yield ""
    yield hosts(status.hosts, table)
    yield ""
    if any(map(sum, status.tokens_per_expert.values())):
        yield tokens_per_expert(status.tokens_per_expert, width)
    if len(status.versions) > 1:
        yield ""
        yield versions(status.versions)
    if status.events:
        yield ""
        yield events(status.events)


def summary(status: ServiceStatus) -> Text:
    """The service and its router in a few lines."""
    router = status.router
    state = (status.state, _STATE_STYLES.get(status.state, "yellow"))
    lines = [
        f"ray_moe {status.version}, routing epoch {status.epoch}",
        f"{router.router_id or 'router'}: pid {router.pid}, memory {format_bytes(router.rss_bytes)} "
        f"(weights {format_bytes(router.backbone_bytes)})",
        f"requests: {router.active_requests} active, {router.queued_requests} queued, {router.failed_requests} failed; "
        f"{router.generated_tokens} tokens generated",
        f"experts: balancedness {router.balancedness:.2f}, {100 * status.p_lossless:.0f}% to survive a lost node; "
        f"{router.retried_calls} calls again, {router.hedged_calls} hedged",
    ]
    if router.own_bytes or router.own_rows:
        lines.append(
            f"router's own experts: {format_bytes(router.own_bytes)}, {router.own_rows} rows computed, "
            f"{router.lifeboat_loads} read by the lifeboat"
        )
    if len(status.routers) > 1:
        others = ", ".join(each.grpc_address + ("" if each.ready else " (not ready)") for each in status.routers)
        lines.append(f"routers: {others}")
    if status.changing:
        lines.append(f"changing: {status.changing}")
    return Text.assemble(
        (status.model, "bold"),
        f" ({status.model_type})  ",
        state,
        f" for {_duration(status.uptime_s)}\n",
        "\n".join(lines),
    )


def hosts(
    statuses: Sequence[HostStatus],
    table: RoutingTable | None = None,
    rows_per_s: Mapping[HostId, float] | None = None,
) -> Table:
    """A row for each expert host: what it is, what it holds, what it did. Nodes are named when there are several.

    With `rows_per_s`, what it does now instead.
    """
    several_nodes = len({host.node_id for host in statuses}) > 1
    every = STATUS_COLUMNS if rows_per_s is None else LIVE_COLUMNS
    columns = [name for name in every if name != "node" or several_nodes]
    out = plain_table("expert hosts")
    for name in columns:
        out.add_column(name, justify="left" if name in _LEFT else "right", no_wrap=True)
    for host in statuses:
        loading = host.loaded_bytes < host.weight_bytes
        cells: dict[str, str | Text] = {
            "host": host.host_id,
            "state": Text(host.state, _STATE_STYLES.get(host.state, "yellow")),
            "node": host.node_id[:8],
            "pid": str(host.pid or ""),
            "experts": _experts_of(host, table),
            "weights": f"{100 * host.loaded_bytes / host.weight_bytes:.0f}%"
            if loading
            else format_bytes(host.weight_bytes),
            "memory": format_bytes(host.rss_bytes),
            "rows": str(host.num_rows),
            "rows/s": f"{(rows_per_s or {}).get(host.host_id, 0.0):.0f}",
            "busy": f"{100 * host.utilisation:.0f}%",
            "queued": str(host.queued_rows),
            "restarts": Text(str(host.restarts), "bold yellow" if host.restarts else ""),
        }
        out.add_row(*(cells[name] for name in columns))
    return out


def hottest(tokens_per_s: Mapping[LayerPath, Sequence[float]]) -> Table:
    """The experts that most tokens go to now, in all layers."""
    out = plain_table("hottest experts")
    for name in ("layer", "expert", "tokens/s", "of the layer"):
        out.add_column(name, justify="left" if name == "layer" else "right", no_wrap=True)
    found = ((rate, layer, expert) for layer, rates in tokens_per_s.items() for expert, rate in enumerate(rates))
    for rate, layer, expert in heapq.nlargest(MAX_HOTTEST, found, key=lambda one: one[0]):
        if rate > 0:
            out.add_row(_short(layer), str(expert), f"{rate:.0f}", f"{100 * rate / sum(tokens_per_s[layer]):.0f}%")
    return out


def versions(statuses: Sequence[VersionStatus]) -> Table:
    """A row for each version of the weights."""
    out = plain_table("versions of the weights")
    for name in ("version", "state", "checkpoint"):
        out.add_column(name, justify="right" if name == "version" else "left", no_wrap=name != "checkpoint")
    for version in statuses:
        drift = f" (drift {version.drift:.3g} over {version.num_rows} rows)" if version.state == "canary" else ""
        state = Text(version.state, _STATE_STYLES.get(version.state, ""))
        out.add_row(str(version.number), state, Text(version.model + drift))
    return out


def events(happened: Sequence[ClusterEvent]) -> Table:
    """The last of what happened to the cluster, a line each."""
    out = plain_table("what happened last")
    for name in ("time", "what"):
        out.add_column(name, no_wrap=True)
    out.add_column("")
    for event in happened[-MAX_EVENTS:]:
        clock = time.strftime("%H:%M:%S", time.localtime(event.at_s))
        out.add_row(clock, Text(event.kind, _STATE_STYLES.get(event.kind, "")), event.text)
    return out


def tokens_per_expert(counts: Mapping[LayerPath, Sequence[int]], width: int) -> Table:
    """A heat row for each layer, or for several: taller is busier, within the row."""
    out = plain_table("tokens per expert")
    out.add_column("layer")
    out.add_column("experts 0 …", no_wrap=True)
    out.add_column("busiest", justify="right")
    out.add_column("tokens", justify="right")
    out.add_column("balance", justify="right")
    layers = [(path, row) for path, row in counts.items() if row]
    group = -(-len(layers) // MAX_LAYER_ROWS) or 1
    for start in range(0, len(layers), group):
        rows = layers[start : start + group]
        num_experts = max(len(row) for _, row in rows)
        sums = [sum(row[expert] for _, row in rows if expert < len(row)) for expert in range(num_experts)]
        busiest = max(range(num_experts), key=sums.__getitem__)
        total = sum(sums)
        name = _short(rows[0][0]) + (f" … {_short(rows[-1][0])}" if len(rows) > 1 else "")
        out.add_row(
            name,
            heat(sums, max(8, min(128, width - 60))),
            f"{busiest} ({100 * sums[busiest] / total:.0f}%)" if total else "",
            str(total),
            f"{total / num_experts / sums[busiest]:.2f}" if total else "",
        )
    out.caption = "balance: mean / busiest since the start; 1 is even"
    return out


def heat(counts: Sequence[int], max_cells: int) -> Text:
    """One cell for each expert, or for several when they are more than `max_cells`."""
    group = -(-len(counts) // max_cells)
    sums = [sum(counts[start : start + group]) for start in range(0, len(counts), group)]
    top = max(sums)
    text = Text()
    for value in sums:
        level = -(-value * (len(HEAT) - 1) // top) if top else 0  # rounded up: a used expert is never shown as unused
        text.append(HEAT[level], "dim" if level == 0 else "green" if level < 4 else "yellow" if level < 8 else "red")
    return text


def plain_table(title: str) -> Table:
    """A table as all commands show them."""
    return Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        header_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # the tables fit into 80 columns
        show_edge=False,
    )


def _experts_of(host: HostStatus, table: RoutingTable | None) -> str:
    """`0-1 × 4 layers`, or only the number when the placement is not known."""
    held = {} if table is None else table.placement.experts_on(host.host_id)
    if not held:
        return str(host.num_experts)
    each = sorted({tuple(experts) for experts in held.values()})
    indices = _ranges(each[0]) if len(each) == 1 else f"{sum(map(len, held.values()))} in all"
    return f"{indices} × {len(held)} layers"


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> `0-2,5`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    return ",".join("-".join(map(str, span)) for span in spans)


def _short(path: LayerPath) -> str:
    """`model.layers.3.mlp.experts` -> `layers.3.mlp`."""
    return path.removeprefix("model.").removesuffix(".experts")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
