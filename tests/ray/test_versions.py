"""Versions of the weights are published and rolled back while clients generate: nobody notices, nothing is mixed."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch

from ray_moe.client.sync import Client
from ray_moe.errors import InvalidCheckpoint, InvalidRequest, NotFound, RayMoEError, Unavailable
from ray_moe.types import ServiceStatus
from tests.ray.support import all_ready, await_other, await_status, greedy, has_actors, has_routers, pid_of, prompts
from tests.tiny_models import build, save

NUM_VERSIONS = 6
NUM_CLIENTS = 8
NUM_TOKENS = 40


class Checkpoints:
    """Tiny models that differ in nothing but their weights."""

    def __init__(self, folder: Any) -> None:
        self.folders = [folder / f"seed-{seed}" for seed in range(NUM_VERSIONS)]
        self._models = [
            save("mixtral", path, seed=seed, max_position_embeddings=2048) for seed, path in enumerate(self.folders)
        ]
        self.expected = cache(self._expected)

    def _expected(self, number: int) -> list[tuple[int, ...]]:
        """What `transformers` continues each client's prompt with by the weights of a checkpoint."""
        return greedy(self._models[number], prompts(NUM_CLIENTS), NUM_TOKENS)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return Checkpoints(tmp_path_factory.mktemp("versions"))


class Answers:
    """What clients get who ask again and again, each the same."""

    def __init__(self) -> None:
        self.got: list[tuple[int, int, tuple[int, ...]]] = []
        """Client, version, tokens."""
        self.errors: list[BaseException] = []
        self.stop = threading.Event()

    def ask(self, client: Client, number: int) -> None:
        try:
            while not self.stop.is_set():
                answer = client.generate(token_ids=prompts(number + 1)[-1], max_new_tokens=NUM_TOKENS, ignore_eos=True)
                self.got.append((number, answer.version, answer.token_ids))
        except BaseException as error:
            self.errors.append(error)

    def wait_for(self, version: int, timeout_s: float = 60.0) -> None:
        """Return when every client has another answer of `version`."""
        end_s, begin = time.monotonic() + timeout_s, len(self.got)
        while {number for number, of, _ in self.got[begin:] if of == version} != set(range(NUM_CLIENTS)):
            assert time.monotonic() < end_s and not self.errors, f"not all answered by {version}: {self.errors}"
            time.sleep(0.02)

    def check(self, checkpoints: Checkpoints, of_version: dict[int, int]) -> None:
        """No request failed, and each answer is wholly that of the checkpoint of its version."""
        assert not self.errors
        wrong = [
            (number, version)
            for number, version, tokens in self.got
            if tokens != checkpoints.expected(of_version[version])[number]
        ]
        assert not wrong, f"{len(wrong)} of {len(self.got)} answers are of no version: {wrong[:5]}"


@contextmanager
def clients(address: str) -> Iterator[Answers]:
    answers = Answers()
    with Client(address) as client:
        threads = [threading.Thread(target=answers.ask, args=(client, number)) for number in range(NUM_CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield answers
        finally:
            answers.stop.set()
            for thread in threads:
                thread.join()


def is_loaded(status: ServiceStatus) -> bool:
    """Whether all hosts say that they hold what they should, and no more."""
    return all(host.loaded_bytes == host.weight_bytes for host in status.hosts)


def states(client: Client) -> dict[int, str]:
    return {version.number: version.state for version in client.versions()}


def test_five_versions_are_published_and_rolled_back_under_streams(checkpoints, serve):
    service = serve(checkpoints.folders[0], versions={"keep": 2})
    with Client(service.address) as admin, clients(service.address) as answers:
        answers.wait_for(0)
        for number in range(1, NUM_VERSIONS):
            version = admin.publish(str(checkpoints.folders[number]))
            assert (version.number, version.state) == (number, "current")
            assert admin.generate(token_ids=[3, 4, 5], max_new_tokens=2).version == number
            answers.wait_for(number)
        began_s = time.monotonic()
        assert admin.rollback().number == NUM_VERSIONS - 2
        print(f"rolled back after {time.monotonic() - began_s:.3f} s")
        answers.wait_for(NUM_VERSIONS - 2)
        with pytest.raises(InvalidRequest, match="no version before"):
            admin.rollback()
        assert admin.rollback(NUM_VERSIONS - 1).number == NUM_VERSIONS - 1
        with pytest.raises(NotFound, match="version 0 is not there"):
            admin.rollback(0)
        print(f"longest pause of a stream {admin.status().router.longest_pause_s:.3f} s")
        end_by = {NUM_VERSIONS - 2: "kept", NUM_VERSIONS - 1: "current"}
        status = await_status(admin, lambda _: states(admin) == end_by, what="retired")
        assert {version.number for version in status.versions} == set(end_by)
        await_status(admin, is_loaded, what="what it should be, in memory")
    answers.check(checkpoints, {number: number for number in range(NUM_VERSIONS)})
    assert {version for _, version, _ in answers.got} == set(range(NUM_VERSIONS))


# --- what cannot be published --------------------------------------------------------------------------------
def test_a_publish_that_fails_changes_nothing_and_the_next_one_succeeds(checkpoints, serve, tmp_path):
    service = serve(checkpoints.folders[0])
    missing, other = tmp_path / "missing", tmp_path / "other"
    shutil.copytree(checkpoints.folders[1], missing)
    (missing / "model.safetensors").unlink()
    save("mixtral", other, num_local_experts=4)
    with Client(service.address) as admin, clients(service.address) as answers:
        for model, error in (
            (missing, InvalidCheckpoint),
            (other, InvalidRequest),
            (tmp_path / "nowhere", NotFound),
        ):
            with pytest.raises(error):
                admin.publish(str(model))
            assert states(admin) == {0: "current"}
        answers.wait_for(0)
        published = admin.publish(str(checkpoints.folders[1]))
        answers.wait_for(published.number)
    answers.check(checkpoints, {0: 0, published.number: 1})


def test_what_only_a_host_finds_out_is_taken_back_everywhere(checkpoints, serve, tmp_path):
    """The router that is asked finds nothing wrong; the file is torn when the hosts come to read it."""
    service = serve(checkpoints.folders[0], versions={"load_timeout_s": 30})
    torn = tmp_path / "torn"
    shutil.copytree(checkpoints.folders[1], torn)
    with Client(service.address) as admin, clients(service.address) as answers:
        for host in admin.status().hosts:
            os.kill(host.pid, signal.SIGSTOP)
        publishing = threading.Thread(target=lambda: failed.append(_failure_of(admin, torn)))
        failed: list[BaseException | None] = []
        publishing.start()
        await_loading(admin, 1)
        weights = torn / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        for host in admin.status().hosts:
            os.kill(host.pid, signal.SIGCONT)
        publishing.join()
        assert isinstance(failed[0], RayMoEError), failed
        assert states(admin) == {0: "current"}
        answers.wait_for(0)
        status = await_status(admin, all_ready)
        assert [event.kind for event in status.events if event.kind == "aborted"] == ["aborted"]
        assert admin.publish(str(checkpoints.folders[2])).number == 2
        answers.wait_for(2)
    answers.check(checkpoints, {0: 0, 2: 2})


def _failure_of(admin: Client, model: Any) -> BaseException | None:
    try:
        admin.publish(str(model))
    except BaseException as error:
        return error
    return None


def await_loading(admin: Client, number: int, timeout_s: float = 20.0) -> None:
    end_s = time.monotonic() + timeout_s
    while states(admin).get(number) != "loading":
        assert time.monotonic() < end_s
        time.sleep(0.01)


# --- deaths --------------------------------------------------------------------------------------------------
def test_an_expert_actor_that_dies_during_a_publish_is_there_in_the_new_version_too(checkpoints, serve):
    service = serve(checkpoints.folders[0])
    with Client(service.address) as admin, clients(service.address) as answers:
        victim = admin.status().hosts[0].pid
        os.kill(victim, signal.SIGSTOP)  # so that it cannot be quicker than its end
        published: list[Any] = []
        publishing = threading.Thread(target=lambda: published.append(admin.publish(str(checkpoints.folders[1]))))
        publishing.start()
        await_loading(admin, 1)
        os.kill(victim, signal.SIGKILL)
        publishing.join()
        assert published[0].number == 1
        answers.wait_for(1)
        status = await_status(admin, all_ready)
        assert status.hosts[0].pid != victim
        loads = status.router.lifeboat_loads
        answers.wait_for(1)
        admin.rollback()
        answers.wait_for(0)
        assert admin.status().router.lifeboat_loads == loads, "the restarted actor has not all versions"
    answers.check(checkpoints, {0: 0, 1: 1})


def test_a_controller_that_dies_keeps_the_versions(checkpoints, serve):
    service = serve(checkpoints.folders[0])
    with Client(service.address) as admin, clients(service.address) as answers:
        admin.publish(str(checkpoints.folders[1]))
        admin.publish(str(checkpoints.folders[2]))
        answers.wait_for(2)
        os.kill(pid_of(service, "controller"), signal.SIGKILL)
        answers.wait_for(2)
        await_status(admin, lambda status: status.state == "ready" and bool(status.versions), what="recovered")
        assert {number: state for number, state in states(admin).items() if state != "ending"} == {
            1: "kept",
            2: "current",
        }
        assert admin.publish(str(checkpoints.folders[3])).number == 3
        answers.wait_for(3)
        assert admin.rollback().number == 2
        answers.wait_for(2)
    answers.check(checkpoints, {number: number for number in range(4)})


def test_the_versions_outlive_the_launcher_and_then_the_controller(checkpoints, serve):
    service = serve(checkpoints.folders[0])
    with Client(service.address, max_attempts=50) as admin:  # the router is gone for a while, too
        admin.publish(str(checkpoints.folders[1]))
        for role in ("launcher", "controller"):
            pid = pid_of(service, role)
            os.kill(pid, signal.SIGKILL)
            await_other(service, role, pid)
            await_status(admin, all_ready, what="whole")
            assert states(admin) == {0: "kept", 1: "current"}
            with clients(service.address) as answers:
                answers.wait_for(1)
            answers.check(checkpoints, {1: 1})
        assert admin.rollback().number == 0


def test_a_controller_that_dies_during_a_publish_takes_it_back(checkpoints, serve):
    service = serve(checkpoints.folders[0])
    with Client(service.address) as admin, clients(service.address) as answers:
        victim = admin.status().hosts[0].pid
        os.kill(victim, signal.SIGSTOP)
        failed: list[BaseException | None] = []
        publishing = threading.Thread(target=lambda: failed.append(_failure_of(admin, checkpoints.folders[1])))
        publishing.start()
        await_loading(admin, 1)
        os.kill(pid_of(service, "controller"), signal.SIGKILL)
        publishing.join()
        os.kill(victim, signal.SIGCONT)
        assert isinstance(failed[0], Unavailable), failed
        await_status(admin, lambda status: all_ready(status) and bool(status.versions), what="recovered")
        assert states(admin) == {0: "current"}
        assert admin.publish(str(checkpoints.folders[2])).number == 2
        answers.wait_for(2)
        status = await_status(admin, is_loaded, what="tidied")
        assert [(version.number, version.state) for version in status.versions] == [(0, "kept"), (2, "current")]
    answers.check(checkpoints, {0: 0, 2: 2})


def test_a_router_that_restarts_has_all_versions_and_streams_go_on_in_theirs(checkpoints, serve):
    service = serve(checkpoints.folders[0], router={"num_actors": 2})
    with Client(service.address) as first:
        await_status(first, has_routers(2), what="two routers")  # so that those who come now know both
    with Client(service.address) as admin, clients(service.address) as answers:
        admin.publish(str(checkpoints.folders[1]))
        answers.wait_for(1)
        status = await_status(admin, lambda status: has_routers(2)(status) and is_loaded(status), what="all loaded")
        os.kill(status.router.pid, signal.SIGKILL)
        with Client([router.grpc_address for router in status.routers]) as other:
            other.rollback(0)
        answers.wait_for(0)
        await_status(admin, has_routers(2), what="two routers again")
        assert admin.rollback(1).number == 1
        answers.wait_for(1)
    answers.check(checkpoints, {0: 0, 1: 1})


# --- a cluster that changes ----------------------------------------------------------------------------------
def test_a_new_actor_loads_all_versions_before_it_serves(checkpoints, serve):
    service = serve(checkpoints.folders[0])
    with Client(service.address) as admin, clients(service.address) as answers:
        admin.publish(str(checkpoints.folders[1]))
        admin.resize(3)
        await_status(admin, lambda status: has_actors(3)(status) and is_loaded(status), what="three actors")
        answers.wait_for(1)
        admin.rollback()
        answers.wait_for(0)
        admin.drain("expert-0")
        await_status(admin, has_actors(2), what="two actors")
        admin.publish(str(checkpoints.folders[2]))
        answers.wait_for(2)
        assert admin.status().router.lifeboat_loads == 0
    answers.check(checkpoints, {0: 0, 1: 1, 2: 2})


# --- canaries ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def canaries(checkpoints, tmp_path_factory):
    """Copies of the first checkpoint in which one expert is a little different, and quite another: its layer, its
    number, the folders, and what `transformers` answers by them."""
    layer, expert = "model.layers.1.mlp.experts", 0
    models, folders = {}, {}
    for name, noise in (("close", 0.01), ("far", 2.0)):
        model = build("mixtral", max_position_embeddings=2048)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.get_submodule(layer).parameters():
                row = parameter[expert]
                row += noise * row.std() * torch.randn(row.shape, generator=generator)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        models[name] = greedy(model, prompts(NUM_CLIENTS), NUM_TOKENS)
    assert models["far"] != checkpoints.expected(0)
    return layer, expert, folders, models


def wait_for_rows(admin: Client, number: int, num_rows: int, timeout_s: float = 60.0) -> Any:
    """The canary, when so many of its rows have been compared."""
    end_s = time.monotonic() + timeout_s
    while True:
        (canary,) = (version for version in admin.versions() if version.number == number)
        if canary.num_rows >= num_rows:
            return canary
        assert time.monotonic() < end_s, canary
        time.sleep(0.05)


def test_a_canary_that_drifts_too_far_ends_by_itself(checkpoints, serve, canaries):
    layer, expert, folders, _ = canaries
    service = serve(checkpoints.folders[0])
    with Client(service.address) as admin, clients(service.address) as answers:
        begun = admin.canary(1, expert, str(folders["far"]), share=1.0, max_drift=0.05)
        assert (begun.number, begun.state) == (1, "canary")
        status = await_status(admin, lambda status: "canary rolled back" in {e.kind for e in status.events})
        (event,) = (event for event in status.events if event.kind == "canary rolled back")
        assert "version 1: drift" in event.text
        assert "0.05 is allowed" in event.text
        await_status(admin, lambda _: states(admin) == {0: "current"}, what="retired")
        answers.wait_for(0)
        with pytest.raises(InvalidRequest, match="no version is being tried out"):
            admin.end_canary(promote=True)
        with pytest.raises(NotFound, match="no expert 99"):
            admin.canary(layer, 99, str(folders["far"]))
    answers.check(checkpoints, {0: 0})


def test_a_canary_gets_a_share_of_the_requests_and_is_promoted(checkpoints, serve, canaries):
    layer, expert, folders, expected = canaries
    service = serve(checkpoints.folders[0])
    with Client(service.address) as admin, clients(service.address) as answers:
        answers.wait_for(0)
        tried = admin.canary(layer, expert, str(folders["far"]), share=0.5, mode="traffic", max_drift=100.0)
        answers.wait_for(0)
        answers.wait_for(tried.number)
        assert wait_for_rows(admin, tried.number, 32).drift > 0.05
        with pytest.raises(Unavailable, match="version 1 is being tried out"):
            Client(service.address, max_attempts=1).publish(str(checkpoints.folders[1]))
        status = admin.status()
        await_status(admin, is_loaded, what="loaded")
        os.kill(status.hosts[0].pid, signal.SIGKILL)  # it comes back with the canary
        await_status(admin, lambda now: all_ready(now) and now.hosts[0].pid != status.hosts[0].pid, what="back")
        answers.wait_for(tried.number)
        os.kill(pid_of(service, "controller"), signal.SIGKILL)
        answers.wait_for(tried.number)
        await_status(admin, lambda now: all_ready(now) and bool(now.versions), what="recovered")
        assert states(admin) == {0: "current", 1: "canary"}
        assert admin.end_canary(promote=True).number == tried.number
        assert admin.generate(token_ids=[3, 4, 5], max_new_tokens=2).version == tried.number
        answers.wait_for(tried.number)
        assert admin.publish(str(checkpoints.folders[1])).number == 2
        answers.wait_for(2)
        assert admin.rollback().number == tried.number
        answers.wait_for(tried.number)
    assert not answers.errors
    whole = {0: checkpoints.expected(0), 1: expected["far"], 2: checkpoints.expected(1)}
    wrong = [(number, version) for number, version, tokens in answers.got if tokens != whole[version][number]]
    assert not wrong
    assert {version for _, version, _ in answers.got} == {0, 1, 2}


def test_a_canary_close_to_the_current_expert_goes_on_until_it_is_cancelled(checkpoints, serve, canaries):
    layer, expert, folders, _ = canaries
    service = serve(checkpoints.folders[0], dispatch={"combine": "host"}, router={"expert_cache_bytes": "1MiB"})
    with Client(service.address) as admin, clients(service.address) as answers:
        tried = admin.canary(layer, expert, str(folders["close"]), share=0.5, max_drift=0.2)
        canary = wait_for_rows(admin, tried.number, 100)
        assert 0 < canary.drift < 0.2
        assert admin.end_canary(promote=False).number == 0
        await_status(admin, lambda _: states(admin) == {0: "current"}, what="retired")
        answers.wait_for(0)
    answers.check(checkpoints, {0: 0})
