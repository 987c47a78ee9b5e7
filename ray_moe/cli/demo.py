"""`ray-moe demo`: the whole path on one machine, checked. It trains a small model (or takes it from the cache), serves
it with its experts in actors, asks for text, compares every token with `transformers` in one process, kills an actor
while streams run, and shows what the service tells about itself. Composes what the package has; decides nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

# Before torch is loaded: threads that wait asleep. Spinning ones take the core from whom they wait for as soon as
# anything else runs on the machine (measured: training on 2 busy cores went from 11,000 tokens/s to 340).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ray_moe.cli import tables
from ray_moe.cli.demo_streams import Stream, kill_busiest, run_streams, tokens_per_s
from ray_moe.cli.terminal import Interrupts, ProgressView
from ray_moe.client.sync import Client
from ray_moe.config import Config, ExpertsConfig, RayConfig, RouterConfig, ServerConfig
from ray_moe.models.demo import DemoModel, DemoSettings, TrainProgress, demo_model, reference_tokens
from ray_moe.service.composition import Service, ServiceProgress

NUM_ACTORS = 4
TO_GO_ON = f"--actors {NUM_ACTORS} --set experts.num_cpus=0.2 --set chaos.enabled=true"
"""What somebody serves the model with to see for themselves: room for the actors on two cores, and faults allowed."""
TEXT_PROMPT = "class Server:\n    def __init__(self, "
TEXT_TOKENS = 240
COMPARED_PROMPTS = ("import os\nimport sys\n\ndef main(", "    def read(self, size", "# Copyright ")
COMPARED_TOKENS = 64
STREAM_PROMPTS = ("def parse(", "class Error(", "    for name in ", "    return self.")
STREAM_TOKENS = 128
RECOVERY_TIMEOUT_S = 60.0


class Running(Protocol):
    """What the demo needs of a started service."""

    @property
    def address(self) -> str: ...


OpenService = Callable[[Config, Callable[[ServiceProgress], None]], AbstractContextManager[Running]]


@dataclass(slots=True)
class Report:
    """What was claimed, and whether it held."""

    console: Console
    failures: list[str] = field(default_factory=list)
    num_checks: int = 0

    def step(self, title: str) -> None:
        self.say("")
        self.console.print(Text(title, "bold"))

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def check(self, claim: str, held: bool, otherwise: str = "") -> None:
        """Record that `claim` held; `otherwise` says what was seen instead."""
        self.num_checks += 1
        mark = Text("ok    ", "green") if held else Text("FAILED ", "bold red")
        self.console.print(Text.assemble("  ", mark, claim, "" if held or not otherwise else f": {otherwise}"))
        if not held:
            self.failures.append(claim)


def run(
    train_seconds: float,
    cache_dir: Path | None,
    interrupts: Interrupts,
    console: Console | None = None,
    open_service: OpenService = Service,
) -> bool:
    """The walk; true when every claim held. Everything that was started has ended when this returns or raises."""
    started_s = time.monotonic()
    report = Report(console or Console())
    with ExitStack() as ending:
        model = _learn(report, train_seconds, cache_dir)
        report.step(f"2/6 Serve it: the experts in {NUM_ACTORS} actors, and one more on standby")
        running = ending.enter_context(_start(report, open_service, _config(model.path), interrupts))
        ending.callback(interrupts.ignore)  # before the service is stopped, which is not to be broken off
        with Client(running.address) as client:
            _walk(report, client, model)
    elapsed_s = time.monotonic() - started_s
    if report.failures:
        report.say(f"the demo failed after {elapsed_s:.0f} s: " + "; ".join(report.failures))
    else:
        report.say(f"all {report.num_checks} claims held, in {elapsed_s:.0f} s")
        report.say(f"to go on with it: ray-moe serve {model.path} {TO_GO_ON}")
    return not report.failures


def _config(model: Path) -> Config:
    return Config(
        model=str(model),
        service_name=f"demo-{os.getpid()}",
        ray=RayConfig(num_cpus=2),
        experts=ExpertsConfig(num_actors=NUM_ACTORS, num_cpus=0.2, standby_actors=1, standby_preload=True),
        router=RouterConfig(num_cpus=0.5),
        server=ServerConfig(port=0, http_port=None),
    )


@contextmanager
def _start(report: Report, open_service: OpenService, config: Config, interrupts: Interrupts) -> Iterator[Running]:
    with ExitStack() as ending:
        try:
            with ProgressView(report.console) as view:

                def show(progress: ServiceProgress) -> None:
                    interrupts.install()  # `ray.init` has put others in place
                    view.update(progress.stage, progress.done_bytes, progress.total_bytes, progress.detail)

                running = ending.enter_context(open_service(config, show))
        except SystemExit as error:  # Ray's own SIGTERM handler, in place while it starts
            raise KeyboardInterrupt from error
        report.say(f"  serving on {running.address} (gRPC)")
        yield running
        report.say("\nstopping the service")


def _learn(report: Report, train_seconds: float, cache_dir: Path | None) -> DemoModel:
    report.step("1/6 A model: 8 experts in each of 4 layers, byte by byte on Python's own library")
    with ProgressView(report.console) as view:

        def show(progress: TrainProgress) -> None:
            detail = f"loss {progress.loss:.2f} nats/byte, {progress.tokens_per_s:,.0f} tokens/s"
            view.update("training", min(progress.elapsed_s, train_seconds), train_seconds, detail)

        model = demo_model(DemoSettings(train_seconds=train_seconds), cache_dir, show)
    losses = " ".join(f"{loss:.2f}" for loss in model.losses[:: max(1, len(model.losses) // 10)])
    report.say(f"  {'taken from the cache' if model.reused else 'trained'}: {model.path}")
    report.say(f"  loss while training: {losses}; on files it never saw: {model.held_out_loss:.2f} nats/byte")
    report.check("the loss fell", model.losses[-1] < model.losses[0], losses)
    return model


def _walk(report: Report, client: Client, model: DemoModel) -> None:
    report.step("3/6 Ask for text through the SDK, streaming (temperature 0.6)")
    pieces = []
    report.console.print(Text(TEXT_PROMPT, "dim"), end="")
    for chunk in client.stream(TEXT_PROMPT, max_new_tokens=TEXT_TOKENS, temperature=0.6, top_p=0.95, seed=7):
        pieces.append(chunk.text)
        report.console.print(chunk.text, end="", markup=False, highlight=False, soft_wrap=True)
    report.say("")
    report.check("text came in pieces", len(pieces) > 1 and "".join(pieces).strip() != "", repr(pieces)[:200])

    report.step("4/6 Compare with transformers, the whole model in one process: greedy tokens")
    expected = reference_tokens(model.path, COMPARED_PROMPTS, COMPARED_TOKENS)
    for prompt, tokens in zip(COMPARED_PROMPTS, expected, strict=True):
        got = client.generate(prompt, max_new_tokens=COMPARED_TOKENS).token_ids
        same = next(
            (i for i, (a, b) in enumerate(zip(got, tokens, strict=False)) if a != b), min(len(got), len(tokens))
        )
        report.check(f"{prompt!r}: {len(tokens)} tokens are the same", got == tokens, f"only the first {same}")

    report.step(f"5/6 Kill an expert actor (SIGKILL) while {len(STREAM_PROMPTS)} streams run")
    undisturbed = run_streams(client, STREAM_PROMPTS, STREAM_TOKENS)
    _survive(report, client, undisturbed)

    report.step("6/6 What the service tells about itself")
    status = client.status()
    for part in tables.service(status, client.placement(), report.console.width):
        report.console.print(part)


def _survive(report: Report, client: Client, undisturbed: Sequence[Stream]) -> None:
    """Run the same streams again, with a kill in the middle of them."""
    victims = []

    def kill() -> None:
        victim = kill_busiest(client)
        victims.append(victim)
        report.say(f"  killed {victim.host_id}, process {victim.pid} (Ray may remark on it here)")

    disturbed = run_streams(client, STREAM_PROMPTS, STREAM_TOKENS, kill)
    table = Table(header_style="bold", box=SIMPLE_HEAD)
    for name in ("stream", "tokens", "longest pause, undisturbed", "with the kill"):
        table.add_column(name, justify="left" if name == "stream" else "right")
    for before, after in zip(undisturbed, disturbed, strict=True):
        pauses = [f"{1000 * stream.longest_stall_s:,.0f} ms" for stream in (before, after)]
        table.add_row(repr(after.prompt), str(len(after.token_ids)), *pauses)
    report.console.print(table)
    stall_s = max(stream.longest_stall_s for stream in disturbed)
    report.say(
        f"  {tokens_per_s(undisturbed):.0f} tokens/s undisturbed, {tokens_per_s(disturbed):.0f} with the kill; "
        f"longest stall {stall_s:.2f} s"
    )
    errors = [stream.error or stream.finish_reason for stream in (*undisturbed, *disturbed) if stream.error]
    unfinished = [stream.prompt for stream in disturbed if stream.finish_reason != "length"]
    report.check("no stream failed", not errors and not unfinished, "; ".join(errors) or f"unfinished: {unfinished}")
    different = [b.prompt for a, b in zip(disturbed, undisturbed, strict=True) if a.token_ids != b.token_ids]
    report.check("the same tokens as undisturbed", not different, f"different: {different}")
    _await_recovery(report, client, {victim.pid for victim in victims})


def _await_recovery(report: Report, client: Client, killed_pids: set[int]) -> None:
    give_up_s = time.monotonic() + RECOVERY_TIMEOUT_S
    while True:
        status = client.status()
        living = [host for host in status.hosts if host.state in ("ready", "standby")]
        whole = status.state == "ready" and len(living) == len(status.hosts)
        recovered = whole and killed_pids.isdisjoint(host.pid for host in living)
        if recovered or time.monotonic() > give_up_s:
            break
        time.sleep(0.2)
    seen = ", ".join(f"{host.host_id} {host.state}" for host in status.hosts)
    report.check("another took over, and the killed actor came back", recovered, f"{status.state}: {seen}")
