"""The demo's walk against a service of fakes: what it claims, and that it notices when a claim does not hold."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from rich.console import Console

from ray_moe.cli import demo
from ray_moe.cli.demo_streams import kill_busiest, run_streams, tokens_per_s
from ray_moe.cli.terminal import Interrupts
from ray_moe.config import Config
from ray_moe.errors import Unavailable
from ray_moe.models.demo import DemoModel, DemoSettings, TrainProgress
from ray_moe.service.composition import ServiceProgress
from ray_moe.types import HostStatus, ServiceStatus
from tests import pages
from tests.unit.cli.fakes import FakeClient, client_that, continuation, status


def recovered(client: FakeClient) -> ServiceStatus:
    return status(hosts=tuple(replace(host, pid=host.pid + 1000) for host in status().hosts))


class Stage:
    """Everything around the walk, faked; tests exchange single pieces."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.console = Console(record=True, width=80, color_system=None, file=open(os.devnull, "w"))  # noqa: SIM115
        self.monkeypatch = monkeypatch
        self.ended = False
        self.configs: list[Config] = []
        self.use(client_that(status=recovered))
        monkeypatch.setattr(demo, "demo_model", self.model)
        monkeypatch.setattr(demo, "reference_tokens", self.reference)
        monkeypatch.setattr(demo, "kill_busiest", lambda client: status().hosts[0])
        monkeypatch.setattr(demo, "RECOVERY_TIMEOUT_S", 0.01)

    def use(self, client: type[FakeClient]) -> None:
        self.monkeypatch.setattr(demo, "Client", client)

    def model(
        self, settings: DemoSettings, cache: Path | None, on_progress: Callable[[TrainProgress], None]
    ) -> DemoModel:
        on_progress(TrainProgress(1, 0.5, 3.0, 1000.0))
        return DemoModel(Path("/cache/demo"), False, 1.4, (5.0, 2.0, 1.5))

    def reference(self, path: Path, prompts: Sequence[str], max_new_tokens: int) -> list[tuple[int, ...]]:
        return [tuple(continuation(prompt, max_new_tokens)) for prompt in prompts]

    @contextmanager
    def service(self, config: Config, on_progress: Callable[[ServiceProgress], None]) -> Iterator[Any]:
        self.configs.append(config)
        on_progress(ServiceProgress("loading", 1, 2, "1 of 4"))
        try:
            yield SimpleNamespace(address="127.0.0.1:1")
        finally:
            self.ended = True

    def walk(self) -> tuple[bool, str]:
        """The verdict and what was printed."""
        with self.console.file, Interrupts() as interrupts:
            held = demo.run(1.0, None, interrupts, self.console, self.service)
        assert self.ended
        return held, self.console.export_text()


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield Stage(monkeypatch)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_when_all_holds(stage: Stage) -> None:
    held, said = stage.walk()
    assert held, said
    assert "all 8 claims held" in said
    (arguments,) = re.findall(r"to go on with it: ray-moe (.*)", said)
    assert pages.parse(shlex.split(arguments))["model"] == "/cache/demo"
    assert "killed expert-0, process 101" in said
    assert "tokens per expert" in said
    assert "FAILED" not in said
    (config,) = stage.configs
    assert (config.model, config.experts.num_actors, config.server.port) == ("/cache/demo", demo.NUM_ACTORS, 0)


def test_other_tokens_than_transformers(stage: Stage) -> None:
    stage.monkeypatch.setattr(demo, "reference_tokens", lambda path, prompts, n: [(1,) * n] * len(prompts))
    held, said = stage.walk()
    assert not held
    assert f"FAILED {demo.COMPARED_PROMPTS[0]!r}: 64 tokens are the same: only the first 0" in " ".join(said.split())
    assert "the demo failed" in said


def test_streams_that_break(stage: Stage) -> None:
    def stream(self: FakeClient, prompt: str, **options: Any) -> Iterator[Any]:
        client = FakeClient(self.target)
        client.fails_after = 20 if prompt == demo.STREAM_PROMPTS[1] else None
        return client.stream(prompt, **options)

    stage.use(client_that(status=recovered, stream=stream))
    held, said = stage.walk()
    assert not held
    assert "FAILED no stream failed: Unavailable: the service broke off" in " ".join(said.split())


def test_an_actor_that_does_not_come_back(stage: Stage) -> None:
    stage.use(client_that(status=lambda self: status(state="degraded")))
    held, said = stage.walk()
    assert not held
    assert "FAILED another took over, and the killed actor came back: degraded" in " ".join(said.split())


def test_a_killed_actor_that_lives_on(stage: Stage) -> None:
    stage.use(FakeClient)  # its process ids stay what they were
    held, _ = stage.walk()
    assert not held


def test_an_interrupt_ends_the_service(stage: Stage) -> None:
    stage.monkeypatch.setattr(demo, "reference_tokens", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        stage.walk()
    assert stage.ended


# --- Streams -------------------------------------------------------------------------------------------------
def test_something_happens_when_all_streams_are_under_way() -> None:
    client: Any = FakeClient("t")
    happened: list[int] = []
    streams = run_streams(client, ["a", "bc"], 12, lambda: happened.append(1))
    assert happened == [1]
    assert [stream.token_ids for stream in streams] == [continuation("a", 12), continuation("bc", 12)]
    assert all(stream.finish_reason == "length" and stream.longest_stall_s >= 0 for stream in streams)
    assert tokens_per_s(streams) > 0


def test_streams_shorter_than_warm_and_failing_ones_do_not_hang() -> None:
    client: Any = FakeClient("t")
    client.fails_after = 1
    (stream,) = run_streams(client, ["a"], 12)
    assert (stream.error, stream.longest_stall_s) == ("Unavailable: the service broke off", 0.0)
    assert tokens_per_s([]) == 0.0


# --- The kill ------------------------------------------------------------------------------------------------
def client_with(host: HostStatus) -> Any:
    return SimpleNamespace(status=lambda: status(hosts=(host,)))


def test_only_our_own_actors_are_killed() -> None:
    """A child of this process that is no actor, and an actor's name that is no child of ours."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        for pid in (child.pid, os.getppid()):
            with pytest.raises(Unavailable, match="is not an actor of this demo"):
                kill_busiest(client_with(replace(status().hosts[0], pid=pid)))
        assert child.poll() is None
    finally:
        child.communicate()


def test_the_busiest_actor_is_killed() -> None:
    child = subprocess.Popen(["bash", "-c", "exec -a ray::expert sleep 60"])
    try:
        while not "".join(psutil.Process(child.pid).cmdline()).startswith("ray::"):
            pass
        assert kill_busiest(client_with(replace(status().hosts[0], pid=child.pid))).pid == child.pid
        assert child.wait(10) == -signal.SIGKILL
    finally:
        child.kill()
        child.wait()


def test_nobody_to_kill() -> None:
    with pytest.raises(Unavailable, match="no expert actor is ready"):
        kill_busiest(client_with(replace(status().hosts[0], state="lost")))
