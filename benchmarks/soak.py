"""A service at saturation while everything goes wrong: are all answers right, does no request fail, is memory flat?

`python benchmarks/soak.py [--minutes 10] [--kill-every 60]`. Two routers and three expert actors serve a tiny model to
clients of three kinds (our own, `openai`, `tritonclient`), whose greedy output is compared with what `transformers`
generates. Beside them, clients cancel and hang up at random, others send what is oversized or malformed and must be
told so, and every minute an expert actor is killed. Results go to `benchmarks/results/soak.{json,md}`; exit
status 1 when an answer was wrong or a valid request failed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import openai
import psutil
import ray
import torch
import tritonclient.grpc as triton
from rich.progress import track

from benchmarks import report
from ray_moe.actors.spec import NAMESPACE
from ray_moe.client.sync import Client
from ray_moe.errors import InvalidRequest, NotFound
from tests.ray.support import all_ready, await_status, serving
from tests.tiny_models import save, save_tokenizer

MODEL = "tiny"
OURS, OPENAI, TRITON, IMPATIENT, RUDE = 8, 4, 2, 3, 2
"""Clients of each kind. Those that wait for answers keep as many requests under way as there are of them."""
PROMPTS = 24
SAMPLE_S = 5.0


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, and what `transformers` continues it with."""

    text: str
    num_tokens: int
    answer: str


@dataclass
class Soak:
    """What has happened so far."""

    grpc: str
    http: str
    questions: Sequence[Question]
    stop: threading.Event = field(default_factory=threading.Event)
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    tokens: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def told(self, kind: str, problem: str = "", tokens: int = 0) -> None:
        with self.lock:
            self.counts[kind] += 1
            self.tokens += tokens
            if problem:
                self.problems.append(f"{kind}: {problem}")

    def check(self, kind: str, question: Question, text: str) -> None:
        wrong = "" if text == question.answer else f"wrong answer {text!r}, expected {question.answer!r}"
        self.told(kind, wrong, question.num_tokens)


# --- Clients -------------------------------------------------------------------------------------------------
def ours(soak: Soak, rng: random.Random) -> None:
    with Client(soak.grpc) as client:
        while not soak.stop.is_set():
            asked = rng.choice(soak.questions)
            chunks = client.stream(asked.text, max_new_tokens=asked.num_tokens, ignore_eos=True)
            soak.check("our client", asked, "".join(chunk.text for chunk in chunks))


def by_openai(soak: Soak, rng: random.Random) -> None:
    with openai.OpenAI(base_url=f"{soak.http}/v1", api_key="none", max_retries=0) as client:
        while not soak.stop.is_set():
            asked = rng.choice(soak.questions)
            pieces = client.completions.create(
                model=MODEL,
                prompt=asked.text,
                max_tokens=asked.num_tokens,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            soak.check("openai", asked, "".join(piece.choices[0].text for piece in pieces))


def by_triton(soak: Soak, rng: random.Random) -> None:
    with triton.InferenceServerClient(soak.grpc) as client:
        while not soak.stop.is_set():
            asked = rng.choice(soak.questions)
            text = triton.InferInput("text_input", [1], "BYTES")
            text.set_data_from_numpy(np.array([asked.text.encode()], dtype=object))
            answer = client.infer(MODEL, [text], parameters={"max_tokens": asked.num_tokens, "ignore_eos": True})
            soak.check("tritonclient", asked, answer.as_numpy("text_output")[0].decode())


def impatient(soak: Soak, rng: random.Random) -> None:
    """Cancels streams of gRPC, and hangs up on HTTP."""
    address, _, port = soak.http.removeprefix("http://").partition(":")
    with Client(soak.grpc) as client:
        while not soak.stop.is_set():
            asked = rng.choice(soak.questions)
            if rng.random() < 0.5:
                stream = client.stream(asked.text, max_new_tokens=asked.num_tokens, ignore_eos=True)
                for _ in range(rng.randrange(4)):
                    next(stream, None)
                stream.close()
                soak.told("cancelled")
                continue
            body = json.dumps({"model": MODEL, "prompt": asked.text, "max_tokens": asked.num_tokens, "stream": True})
            head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            sent = f"{head}content-length: {len(body)}\r\n\r\n{body}".encode()
            with socket.create_connection((address, int(port))) as connection:
                connection.sendall(sent[: rng.randrange(1, len(sent) + 1)])
                connection.settimeout(rng.random() / 10)
                with suppress(TimeoutError, ConnectionError):
                    connection.recv(rng.randrange(1, 4096))
            soak.told("hung up")


def rude(soak: Soak, rng: random.Random) -> None:
    """Asks for what cannot be, and must be told so, by the error that it is."""
    with Client(soak.grpc) as client, openai.OpenAI(base_url=f"{soak.http}/v1", api_key="none", max_retries=0) as http:
        layer = next(iter(client.placement().placement.hosts_of))
        complete = http.completions.create
        asks: list[tuple[type[Exception], Callable[[], object]]] = [
            (InvalidRequest, lambda: client.generate("x" * 2**21)),
            (InvalidRequest, lambda: client.generate(token_ids=[-1])),
            (InvalidRequest, lambda: client.generate(token_ids=[10**6])),
            (InvalidRequest, lambda: client.generate("x", max_new_tokens=10**9)),
            (InvalidRequest, lambda: client.generate("x", temperature=float("nan"))),
            (InvalidRequest, lambda: client.forward(layer, np.zeros((2, 3), np.float32))),
            (InvalidRequest, lambda: client.forward(layer, np.zeros((200_000, 32), np.float32))),
            (NotFound, lambda: client.forward("no.such.layer", np.zeros((2, 32), np.float32))),
            (openai.BadRequestError, lambda: complete(model=MODEL, prompt="x", max_tokens=-1)),
            (openai.BadRequestError, lambda: complete(model=MODEL, prompt="x" * 2**21)),
            (openai.BadRequestError, lambda: complete(model=MODEL, prompt="x", extra_body={"n": "many"})),
            (openai.NotFoundError, lambda: complete(model="other", prompt="x")),
        ]
        while not soak.stop.is_set():
            expected, ask = rng.choice(asks)
            problem = "was not refused"
            try:
                ask()
            except Exception as error:
                problem = "" if isinstance(error, expected) else f"{error!r} instead of {expected.__name__}"
            soak.told("malformed", problem)
            time.sleep(0.02)


KINDS = ((ours, OURS), (by_openai, OPENAI), (by_triton, TRITON), (impatient, IMPATIENT), (rude, RUDE))


@contextmanager
def clients(soak: Soak) -> Iterator[None]:
    """All of them, while the block lasts."""

    def run(kind: Callable[[Soak, random.Random], None], seed: int) -> None:
        rng = random.Random(seed)
        while not soak.stop.is_set():
            try:
                kind(soak, rng)
            except Exception as error:
                soak.told(kind.__name__, f"failed: {error!r}")

    threads = [
        threading.Thread(target=run, args=(kind, 100 * number + each))
        for number, (kind, count) in enumerate(KINDS)
        for each in range(count)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        soak.stop.set()
        for thread in threads:
            thread.join()


# --- What is watched, and what is killed ---------------------------------------------------------------------
def watch(client: Client, routers: Sequence[int], minutes: float, kill_every_s: float) -> tuple[dict[int, Any], int]:
    """Memory of the routers' processes over time ([(s, MiB)] for each), and how many experts were killed."""
    rng = random.Random(0)
    began_s = time.monotonic()
    next_kill_s, killed = began_s + kill_every_s, 0
    memory: dict[int, list[tuple[float, float]]] = {pid: [] for pid in routers}
    for _ in track(range(int(minutes * 60 / SAMPLE_S)), description="soaking"):
        time.sleep(SAMPLE_S)
        for pid, samples in memory.items():
            samples.append((time.monotonic() - began_s, psutil.Process(pid).memory_info().rss / 2**20))
        if time.monotonic() >= next_kill_s:
            next_kill_s += kill_every_s
            os.kill(rng.choice([host.pid for host in client.status().hosts if host.state == "ready"]), signal.SIGKILL)
            killed += 1
    return memory, killed


# --- The run -------------------------------------------------------------------------------------------------
def questions(model: Any, tokenizer: Any) -> list[Question]:
    rng = random.Random(1)
    made = []
    for _ in range(PROMPTS):
        text = "".join(rng.choices("abcdefghijklmnop (){}:=\n", k=rng.randrange(3, 160)))
        num_tokens = rng.randrange(8, 80)
        prompt = tokenizer(text, return_tensors="pt").input_ids
        with torch.inference_mode():
            out = model.generate(prompt, max_new_tokens=num_tokens, do_sample=False, eos_token_id=[], pad_token_id=0)
        answer = tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
        made.append(Question(text, num_tokens, answer))
    return made


def main(argv: list[str] | None = None) -> None:
    parser = report.options(__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--kill-every", type=float, default=60.0, help="seconds between two killed expert actors")
    arguments = parser.parse_args(argv)
    minutes = 0.5 if arguments.quick else arguments.minutes
    torch.set_num_threads(1)
    # A Ray of the benchmark's own: when the service is gone, it is asked what is left.
    ray.init(num_cpus=16, namespace=NAMESPACE, include_dashboard=False, log_to_driver=False, logging_level="error")
    with tempfile.TemporaryDirectory() as folder:
        model = save("qwen3_moe", folder, vocab_size=259, max_position_embeddings=1024)
        asked = questions(model, save_tokenizer(folder))
        settings: dict[str, Any] = {
            "model_name": MODEL,
            "experts": {"num_actors": 3, "num_cpus": 0.1},
            # Beginnings of prompts are kept within this: it is full within the first part, and then memory is flat.
            "router": {"num_actors": 2, "num_cpus": 0.1, "kv_cache_bytes": 16 * 2**20},
            "server": {"port": 0, "http_port": 0, "grace_s": 2},
        }
        with serving(Path(folder), **settings) as service, Client(service.address) as client:
            status = await_status(client, lambda s: all_ready(s) and sum(r.ready for r in s.routers) == 2, what="ready")
            routers = []
            for router in status.routers:
                with Client(router.grpc_address, discover=False) as one:
                    routers.append(one.status().router.pid)
            soak = Soak(service.address, service.http_address, asked)
            with clients(soak):
                memory, killed = watch(client, routers, minutes, arguments.kill_every)
            ended = await_status(client, all_ready, what="whole again")
    measured = {
        "minutes": minutes,
        "killed": killed,
        "tokens": soak.tokens,
        "longest_pause_s": ended.router.longest_pause_s,
        "counts": soak.counts,
        "problems": soak.problems,
        "memory_mib": memory,
    }
    report.finish("soak", measured, arguments)
    sys.exit(1 if soak.problems else 0)


if __name__ == "__main__":
    main()
