"""The service as an application of Ray Serve, brought up by Serve's own command: its proxies, its routers, upgrades."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import ray
import tritonclient.grpc as triton
from ray import serve
from ray.serve._private.constants import SERVE_DEPLOYMENT_ACTOR_PREFIX
from ray.serve.config import HTTPOptions, gRPCOptions

from ray_moe.client.requests import Forward
from ray_moe.client.sync import Client
from tests.ray.support import Streams, all_ready, await_status, free_port, no_leaks, prompts
from tests.tiny_models import save, save_tokenizer

PROMPT = "def f(x):"
NUM_TOKENS = 24
LONG = 400
BIN = Path(sys.executable).parent
README = (Path(__file__).parents[2] / "README.md").read_text()


@dataclass(frozen=True)
class Application:
    """Where it is, and how to put another checkpoint in its place."""

    http: str
    """Of Serve's proxy."""
    proxied: str
    """The gRPC port of Serve's proxy."""
    direct: str
    """The gRPC port of a router."""
    deploy: Callable[..., None]
    """Of a checkpoint; with other settings than the README's command has, as keywords."""


def checkpoint(folder: Path, seed: int) -> tuple[Path, str]:
    """A tiny model with a tokenizer, and how it continues the prompt."""
    model = save("qwen3_moe", folder, vocab_size=259, max_position_embeddings=1024, seed=seed)
    tokenizer = save_tokenizer(folder)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    out = model.generate(prompt, max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=[], pad_token_id=0)
    return folder, tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, str]]:
    return [checkpoint(tmp_path_factory.mktemp(f"model-{seed}"), seed) for seed in range(2)]


@pytest.fixture(scope="module")
def application(
    local_ray: Any, models: list[tuple[Path, str]], tmp_path_factory: pytest.TempPathFactory, monkeypatch_module: Any
) -> Iterator[Application]:
    http, grpc, direct = free_port(), free_port(), free_port()
    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    made = subprocess.run(
        [BIN / "ray-moe", "keys", "create", "--file", keys, "--name", "ana", "--role", "infer", "--role", "admin"],
        capture_output=True,
        text=True,
        check=True,
    )
    (key,) = re.findall(r"\brm_\S+", made.stdout)
    monkeypatch_module.setenv("RAY_MOE_API_KEY", key)

    def deploy(model: Path, **changed: object) -> None:
        settings: dict[str, object] = {
            "model": model,
            "server.keys_file": keys,
            "server.port": direct,
            "server.grace_s": 1,
        }
        settings |= {"router.num_cpus": 0.1, "experts.num_actors": 1, "experts.num_cpus": 0.1}
        settings |= {"model_name": "tiny", "service_name": "served"} | changed
        (line,) = [line for line in README.splitlines() if line.startswith("serve run ")]
        words = [word for word in line.split() if word.partition("=")[0] not in settings]  # the number of routers stays
        command = [
            BIN / words[0],
            words[1],
            "--non-blocking",
            "--address",
            local_ray.address,
            "--name",
            "moe",
            *words[2:],
        ]
        command += [f"{name}={value}" for name, value in settings.items()]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr

    with no_leaks("served", timeout_s=30):
        serve.start(
            http_options=HTTPOptions(host="127.0.0.1", port=http),
            grpc_options=gRPCOptions(
                port=grpc,
                grpc_servicer_functions=[
                    "ray_moe.wire.kserve.grpc_service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server",
                    "ray_moe.wire.v1.inference_pb2_grpc.add_InferenceServicer_to_server",
                ],
            ),
        )
        try:
            deploy(models[0][0])
            yield Application(f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc}", f"127.0.0.1:{direct}", deploy)
        finally:
            serve.shutdown()


def ask(client: openai.OpenAI) -> str:
    options: Any = {"temperature": 0, "extra_body": {"ignore_eos": True}}
    return client.completions.create(model="tiny", prompt=PROMPT, max_tokens=NUM_TOKENS, **options).choices[0].text


def test_http_comes_through_the_proxy_of_serve(application: Application, models: list[tuple[Path, str]]) -> None:
    with openai.OpenAI(
        base_url=f"{application.http}/v1", api_key=os.environ["RAY_MOE_API_KEY"], max_retries=0
    ) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert {ask(client) for _ in range(6)} == {models[0][1]}
        stream = client.completions.create(
            model="tiny",
            prompt=PROMPT,
            max_tokens=NUM_TOKENS,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        assert "".join(piece.choices[0].text for piece in stream) == models[0][1]
        with pytest.raises(openai.NotFoundError, match="the model 'other' does not exist"):
            client.completions.create(model="other", prompt=PROMPT)


def test_grpc_comes_through_the_proxy_of_serve(application: Application, models: list[tuple[Path, str]]) -> None:
    with triton.InferenceServerClient(application.proxied) as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("tiny")
        text = triton.InferInput("text_input", [1], "BYTES")
        text.set_data_from_numpy(np.array([PROMPT.encode()], dtype=object))
        parameters = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
        with pytest.raises(triton.InferenceServerException, match="UNAUTHENTICATED"):
            client.infer("tiny", [text], parameters=parameters)
        key = {"authorization": f"Bearer {os.environ['RAY_MOE_API_KEY']}"}
        answer = client.infer("tiny", [text], parameters=parameters, headers=key)
        assert answer.as_numpy("text_output").tolist() == [models[0][1].encode()]
        with pytest.raises(triton.InferenceServerException, match="NOT_FOUND"):
            client.infer("other", [text], headers=key)
    with Client(application.proxied, discover=False) as client:
        chunks = list(client.stream(PROMPT, max_new_tokens=NUM_TOKENS, ignore_eos=True))
        assert "".join(chunk.text for chunk in chunks) == models[0][1]
        assert len(chunks) > 1
        rng = np.random.default_rng(0)
        batches = [Forward(0, rng.standard_normal((5, 32), dtype=np.float32)) for _ in range(4)]
        with Client(application.direct) as direct:
            for batch, answer in zip(batches, client.forward_stream(batches), strict=True):
                # Not to the last bit: which rows are computed together, chance decides.
                np.testing.assert_allclose(answer, direct.forward(batch.layer, batch.hidden), rtol=1e-4, atol=1e-5)


def test_clients_of_grpc_find_all_routers_and_outlive_one(application: Application) -> None:
    with Client(application.direct) as client:
        status = await_status(
            client, lambda s: all_ready(s) and sum(r.ready for r in s.routers) == 2, what="two routers"
        )
        pids = {pid_at(router.grpc_address) for router in status.routers}
        assert len(pids) == 2
        assert application.direct in {router.grpc_address for router in status.routers}
        with Streams(application.direct, prompts(4), LONG) as whole:
            pass
        with Streams(application.direct, prompts(4), LONG) as streams:
            streams.wait_for(10)
            os.kill(pid_at(application.direct), signal.SIGKILL)
        assert streams.results == whole.results
        await_status(client, lambda s: sum(r.ready for r in s.routers) == 2, timeout_s=120, what="two routers again")


def test_all_that_owns_the_experts_is_lost_and_no_request_fails(
    application: Application, models: list[tuple[Path, str]]
) -> None:
    """The actor that Serve keeps for them dies, and with it the launcher, the controller and every expert: meanwhile
    the routers have them in their lifeboats, until Serve has another such actor up, and routers that belong to it."""
    (owner,) = [
        ray.get_actor(actor["name"], actor["namespace"])
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["name"].startswith(SERVE_DEPLOYMENT_ACTOR_PREFIX)
    ]
    with Client(application.direct, max_attempts=50) as client:
        before = {host.pid for host in await_status(client, all_ready, what="whole").hosts}
        with asked(application) as (answers, failures):
            os.kill(ray.get(owner.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
            await_status(
                client,
                lambda s: all_ready(s) and before.isdisjoint(host.pid for host in s.hosts),
                timeout_s=180,
                what="whole again",
            )
    print(f"{len(answers)} requests meanwhile")
    assert failures == []
    assert set(answers) == {models[0][1]}


def pid_at(address: str) -> int:
    with Client(address, discover=False) as client:
        return client.status().router.pid


@contextmanager
def asked(application: Application, **options: Any) -> Iterator[tuple[list[str], list[Exception]]]:
    """Answers and failures of three clients who ask all the time. Args: options: of the `openai` clients."""
    answers: list[str] = []
    failures: list[Exception] = []
    stop = threading.Event()

    def again_and_again(ask_once: Callable[[], str]) -> None:
        while not stop.is_set():
            try:
                answers.append(ask_once())
            except Exception as error:
                failures.append(error)
            time.sleep(0.05)

    def by_http() -> None:
        key = os.environ["RAY_MOE_API_KEY"]
        with openai.OpenAI(base_url=f"{application.http}/v1", api_key=key, **options) as client:
            again_and_again(lambda: ask(client))

    def by_grpc() -> None:
        with Client(application.direct) as client:
            again_and_again(lambda: client.generate(PROMPT, max_new_tokens=NUM_TOKENS, ignore_eos=True).text)

    asking = [threading.Thread(target=target) for target in (by_http, by_http, by_grpc)]
    for thread in asking:
        thread.start()
    try:
        yield answers, failures
    finally:
        stop.set()
        for thread in asking:
            thread.join()


def test_another_checkpoint_takes_its_place_under_load(
    application: Application, models: list[tuple[Path, str]]
) -> None:
    with asked(application, max_retries=0) as (answers, failures):
        application.deploy(models[1][0])
        time.sleep(1)
    print(f"{len(answers)} requests during the upgrade")
    assert failures == []
    assert set(answers) == {models[0][1], models[1][1]}
    with openai.OpenAI(
        base_url=f"{application.http}/v1", api_key=os.environ["RAY_MOE_API_KEY"], max_retries=0
    ) as client:
        assert ask(client) == models[1][1]
    names = {actor["name"].partition("/")[0] for actor in ray.util.list_named_actors(all_namespaces=True)}
    assert len({name for name in names if name.startswith("served-")}) == 1  # the first set of experts has ended


def test_what_is_published_is_served_by_all_routers(application: Application, models: list[tuple[Path, str]]) -> None:
    with Client(application.direct) as client:
        await_status(client, lambda s: all_ready(s) and sum(r.ready for r in s.routers) == 2, what="two routers")
        before = client.generate(PROMPT, max_new_tokens=NUM_TOKENS, ignore_eos=True).text
        other, text = models[0] if before == models[1][1] else models[1]
        assert before != text
        assert client.publish(str(other)).number == 1
        for router in client.status().routers:
            with Client(router.grpc_address, discover=False) as one:
                assert one.generate(PROMPT, max_new_tokens=NUM_TOKENS, ignore_eos=True).text == text


def test_routers_follow_the_load(application: Application, models: list[tuple[Path, str]]) -> None:
    application.deploy(models[0][0], **{"router.max_actors": 3, "router.target_requests": 1})
    with Client(application.direct) as client:
        await_status(client, lambda s: all_ready(s) and sum(r.ready for r in s.routers) == 2, what="two routers")
        stop = threading.Event()
        failures: list[Exception] = []

        def load() -> None:
            while not stop.is_set():
                try:
                    client.generate(PROMPT, max_new_tokens=LONG, ignore_eos=True)
                except Exception as error:
                    failures.append(error)

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            await_status(client, lambda s: sum(r.ready for r in s.routers) == 3, timeout_s=150, what="another router")
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert failures == []
