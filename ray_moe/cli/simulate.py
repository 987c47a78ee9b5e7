"""`ray-moe simulate`: the policies over a trace, on a virtual clock; and recording traces from a running service."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table

from ray_moe.actors.spec import cluster_settings
from ray_moe.cli.output import STDOUT, write_json
from ray_moe.cli.target import Target
from ray_moe.cli.terminal import ProgressView, format_bytes
from ray_moe.client.sync import Client
from ray_moe.config import Config, ExpertsConfig
from ray_moe.errors import InvalidConfig, Unavailable
from ray_moe.policy.hosts import ClusterSettings
from ray_moe.simulate.checks import check_range, check_writable
from ray_moe.simulate.cluster import Simulation
from ray_moe.simulate.recording import RecordedTrace, watch
from ray_moe.simulate.report import Faults, Report, StepReport
from ray_moe.simulate.scenario import Scenario
from ray_moe.simulate.trace import KINDS, Jump, Step, SyntheticTrace, Trace, parse_kind
from ray_moe.types import LayerSpec

NUM_HOSTS, NUM_LAYERS, NUM_EXPERTS, SECONDS = 8, 16, 64, 60.0
"""What is simulated when nothing else is said."""
LOOK_EVERY_S = 1.0
"""How often a service is looked at while it is recorded."""
LEVELS = "▁▂▃▄▅▆▇█"
MAX_CELLS = 60


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of the command that are no settings of the service; None where one was not given."""

    trace: str
    seconds: float | None
    num_layers: int | None
    num_experts: int | None
    tokens_per_s: float | None
    drift: float | None
    flash_crowd: str | None
    surge: str | None
    top_k: int
    tokens_per_batch: int
    batches_per_step: int
    batch_noise: float
    hosts_per_node: int
    expert_bytes: str
    bandwidth: str
    host_speed: float | None
    start_s: float
    planning_s: float
    spot_losses: float
    notice_s: float
    seed: int


def run(asked: Asked, config: Config, json_file: Path | None) -> None:
    """Simulate, and print what was found; with `json_file` write the numbers there (``-`` is standard output)."""
    if json_file is not None and json_file != STDOUT:
        check_writable(json_file)
    trace = make_trace(asked)
    settings = make_settings(asked, config, trace)
    simulation = Simulation(make_scenario(asked, config, trace), settings, trace)
    with ProgressView(Console(stderr=True)) as view:

        def show(step: StepReport) -> None:
            hosts = f"{step.num_hosts} hosts, balancedness {step.per_batch:.2f}"
            view.update("simulating", step.at_s, trace.duration_s, hosts)

        report = simulation.run(show)
    if json_file is not None:
        write_json(json_file, asdict(report))
    if json_file == STDOUT:
        return
    console = Console()
    for part in summary(report):
        console.print(part)


def record(to: Target, file: Path, seconds: float | None, timeout_s: float) -> None:
    """Watch a router and write its traffic to `file`; Ctrl-C ends it early, and what there is is kept."""
    seconds = SECONDS if seconds is None else seconds
    check_range("--seconds", seconds, 0, above=True)
    check_writable(file)
    steps: list[Step] = []
    num_experts: dict[str, int] = {}
    why = ""
    client = Client(to.server, timeout_s, discover=False, **to.access)  # what routers count is their own
    with client, ProgressView(Console(stderr=True)) as view:
        view.update("recording", 0, seconds)
        try:
            for layers, step in watch(client.status, seconds, LOOK_EVERY_S, time.monotonic, time.sleep):
                num_experts = layers
                steps.append(step)
                view.update("recording", min(seconds, sum(step.duration_s for step in steps)), seconds)
        except KeyboardInterrupt:
            why = "interrupted"
        except Unavailable as error:
            why = error.message
            if not steps:
                raise
    if not steps:
        raise Unavailable("nothing was recorded: it ended before the second look at the service")
    RecordedTrace.of(num_experts, steps).save(file)
    rows, duration_s = sum(int(step.rows.sum()) for step in steps), sum(step.duration_s for step in steps)
    text = f"{file}: {len(steps)} steps, {duration_s:.1f} s, {len(num_experts)} layers, {rows:,} rows routed"
    Console().print(f"{text}; ended early: {why}" if why else text, soft_wrap=True, highlight=False)


# --- out of options --------------------------------------------------------------------------------------------
def make_trace(asked: Asked) -> Trace:
    """Raises: `InvalidConfig` for what is no kind of trace and no file of one, or options that are of the other."""
    kind = parse_kind(asked.trace)
    synthetic = {
        "--layers": asked.num_layers,
        "--experts": asked.num_experts,
        "--tokens-per-second": asked.tokens_per_s,
        "--drift": asked.drift,
        "--flash-crowd": asked.flash_crowd,
        "--surge": asked.surge,
    }
    if asked.seconds is not None:
        check_range("--seconds", asked.seconds, 0, above=True)
    if kind is None:
        given = [name for name, value in synthetic.items() if value is not None]
        file = Path(asked.trace)
        if not file.exists():
            raise InvalidConfig(
                f"--trace is {asked.trace!r}, which is neither a kind of trace nor a file; expected "
                f"{', '.join(f'{name}:NUMBER' for name in KINDS[:-1])}, {KINDS[-1]}, or what "
                "`ray-moe simulate --save FILE` has written"
            )
        if given:
            raise InvalidConfig(
                f"{', '.join(given)}: only synthetic traces take that; {file} has its own, leave it out"
            )
        recorded = RecordedTrace.load(file)
        return recorded if asked.seconds is None else recorded.first(asked.seconds)
    return SyntheticTrace(
        kind=kind[0],
        shape=kind[1],
        num_layers=NUM_LAYERS if asked.num_layers is None else asked.num_layers,
        experts_per_layer=NUM_EXPERTS if asked.num_experts is None else asked.num_experts,
        top_k=asked.top_k,
        tokens_per_s=10.0 * asked.tokens_per_batch if asked.tokens_per_s is None else asked.tokens_per_s,
        seconds=SECONDS if asked.seconds is None else asked.seconds,
        drift=asked.drift or 0.0,
        flash_crowd=None if asked.flash_crowd is None else Jump.parse("--flash-crowd", asked.flash_crowd),
        surge=None if asked.surge is None else Jump.parse("--surge", asked.surge),
        seed=asked.seed,
    )


def make_scenario(asked: Asked, config: Config, trace: Trace) -> Scenario:
    """Raises: `InvalidConfig`."""
    per_host = config.experts.experts_per_actor
    num_hosts = NUM_HOSTS if per_host is None else -(-max(trace.num_experts) // per_host)
    return Scenario(
        num_hosts=config.experts.num_actors or num_hosts,
        num_standbys=config.experts.standby_actors,
        hosts_per_node=asked.hosts_per_node,
        bandwidth=_bytes("--bandwidth", asked.bandwidth),
        start_s=asked.start_s,
        planning_s=asked.planning_s,
        host_rows_per_s=asked.host_speed,
        losses_per_hour=asked.spot_losses,
        notice_s=asked.notice_s,
        tokens_per_batch=asked.tokens_per_batch,
        top_k=asked.top_k,
        batch_noise=asked.batch_noise,
        batches_per_step=asked.batches_per_step,
        seed=asked.seed,
    )


def make_settings(asked: Asked, config: Config, trace: Trace) -> ClusterSettings:
    """What the service would make of this configuration, for the layers of the trace."""
    size = _bytes("--expert-bytes", asked.expert_bytes)
    layers = tuple(
        LayerSpec(path, number, 0, 0, "", size) for path, number in zip(trace.layers, trace.num_experts, strict=True)
    )
    return cluster_settings(config, layers)


def _bytes(option: str, text: str) -> int:
    """A size, written as in the configuration."""
    try:
        return ExpertsConfig.model_validate({"max_bytes": text}).max_bytes or 0
    except ValueError:
        raise InvalidConfig(f"{option} is {text!r}; expected a size above 0, such as 64KiB, 16MiB or 2GB") from None


# --- what was found --------------------------------------------------------------------------------------------
def summary(report: Report) -> Iterator[RenderableType]:
    """All of it, part by part."""
    yield (
        f"{report.virtual_s:,.0f} s simulated in {report.wall.total_s:.1f} s: {report.num_layers} layers, up to "
        f"{report.num_experts} experts, {report.rows:,} rows\n"
    )
    yield _balance(report)
    yield ""
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for fact in _facts(report):
        facts.add_row(*fact)
    yield facts


def _balance(report: Report) -> Table:
    out = Table(
        title=f"balancedness: mean / highest {report.measured} of a host, 1 is perfect",
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 2, 0, 0),
    )
    out.add_column("")
    for name in ("mean", "5% are below", "lowest", "second half"):
        out.add_column(name, justify="right")
    for name, spread in (("per batch", report.per_batch), ("per window", report.per_window)):
        values = (spread.mean, spread.low, spread.least, spread.second_half)
        out.add_row(name, *(f"{value:.3f}" for value in values))
    return out


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    changes, faults, wall = report.changes, report.faults, report.wall
    yield "balance", trend([step.per_batch for step in report.steps])
    yield (
        "placement",
        f"{changes.plans} plans made, {changes.transactions} changes of the placement; "
        f"{changes.loaded_replicas:,} replicas loaded, "
        f"{changes.dropped_replicas:,} dropped",
    )
    yield (
        "copied",
        f"{format_bytes(changes.store_bytes + changes.copied_bytes)}, of which {format_bytes(changes.copied_bytes)} "
        "from other hosts",
    )
    yield "losses", _losses(faults)
    if faults.orphan_s:
        share = 100 * faults.lifeboat_rows / report.rows if report.rows else 0.0
        yield (
            "lifeboat",
            f"{faults.lifeboat_rows:,.0f} rows ({share:.2f}%), in {faults.orphan_s:.1f} s with experts without host",
        )
    which = "a node" if report.num_lost_nodes == 1 else f"{report.num_lost_nodes} nodes"
    yield (
        "p_lossless",
        f"{report.p_lossless:.3f} at the end, {report.least_p_lossless:.3f} at the lowest: chance that every expert "
        f"outlives the loss of {which}",
    )
    yield (
        "hosts",
        f"{report.first_hosts} at first, {report.most_hosts} at most, {report.last_hosts} at the end; "
        f"{report.host_hours:.2f} host-hours",
    )
    longest = max((step.queue_age_s for step in report.steps), default=0.0)
    busy = [step.utilisation for step in report.steps]
    yield "load", f"{100 * sum(busy) / max(1, len(busy)):.0f}% busy, queue of {longest:.1f} s at most"
    if wall.planning_s:
        mean = sum(wall.planning_s) / len(wall.planning_s)
        yield "planning", f"{mean:.3f} s a plan, {max(wall.planning_s):.3f} s at most (real time)"


def _losses(faults: Faults) -> str:
    lost = "none"
    if faults.lost_nodes:
        lost = f"{faults.lost_nodes} nodes with {faults.lost_hosts} hosts; {faults.survived} left every expert a host"
        if faults.orphaned_experts:
            lost += f", the others took the last one of {faults.orphaned_experts:,} experts"
    return f"{lost}; {faults.evacuated_hosts} hosts had handed over before" if faults.evacuated_hosts else lost


def trend(values: Sequence[float]) -> str:
    """Balancedness from the beginning to the end, a column for each step or several."""
    group = -(-len(values) // MAX_CELLS) or 1
    means = [sum(values[i : i + group]) / len(values[i : i + group]) for i in range(0, len(values), group)]
    return "".join(LEVELS[min(len(LEVELS) - 1, int(mean * len(LEVELS)))] for mean in means)
