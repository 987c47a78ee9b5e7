"""The process of `real_doors.py` from outside, and the good clients that call beside the hostile ones."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import torch

from ray_moe.service.keys import ApiKey, Role, digest_of, editing, new_key
from ray_moe.service.limits import UNLIMITED, Limits
from ray_moe.wire.kserve import grpc_service_pb2 as kserve
from ray_moe.wire.v1 import inference_pb2 as pb
from tests.tiny_models import save, save_tokenizer

ROOT = Path(__file__).parents[4]
IN_FLIGHT_BYTES = 2**20
"""That all requests together may hold."""
TIMEOUT_S = 30.0
"""A call that has not ended after this hangs."""

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
)
MODEL = "tiny"
VOCAB_SIZE = 259
NUM_EXPERTS = 8
WIDTH = 32
POSITIONS = 4096
LAYER = "model.layers.0.mlp.experts"

GREEDY_TOKENS = 4
WITNESS_TOKENS = 500
CANARY = (11, 200, 7, 42, 99)
WITNESS = "the secret of the witness"

GENERATE = "/ray_moe.v1.Inference/Generate"
FORWARD = "/ray_moe.v1.Inference/Forward"
INFER = "/inference.GRPCInferenceService/ModelInfer"


@dataclass
class Keys:
    """API keys in a file, by what is wrong with them."""

    path: Path
    secrets: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, *roles: Role, expires_at: int | None = None, limits: Limits = UNLIMITED) -> None:
        self.secrets[name] = new_key()
        with editing(self.path) as entries:
            entries.append(
                ApiKey(name, digest_of(self.secrets[name]), frozenset(roles), expires_at=expires_at, limits=limits)
            )

    def metadata(self, name: str) -> tuple[tuple[str, str], ...]:
        """Of a call with that key."""
        return (("authorization", f"Bearer {self.secrets[name]}"),)


class Service:
    """A running process with two sets of doors, and channels to them."""

    def __init__(self, folder: Path) -> None:
        self.reference = save("qwen3_moe", folder, vocab_size=VOCAB_SIZE, max_position_embeddings=POSITIONS)
        self.tokenizer = save_tokenizer(folder, CHAT_TEMPLATE)
        self.keys = Keys(folder / "keys.json")
        self.keys.add("ana", "infer")
        self.keys.add("trainer", "train")
        self.keys.add("chief", "admin")
        self.keys.add("scraper", "metrics")
        self.keys.add("late", "infer", "train", "admin", expires_at=1)
        self.keys.add("spent", "infer", limits=Limits(requests_per_minute=1))
        self.keys.add("thirsty", "infer", limits=Limits(tokens_per_minute=1))
        command = [sys.executable, "-W", "error", str(Path(__file__).with_name("real_doors.py"))]
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, str(folder), str(self.keys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        self.expected = self._greedy(CANARY, GREEDY_TOKENS)
        """Tokens that the canary gets."""
        self.expected_of_witness = self._greedy(self.tokenizer(WITNESS)["input_ids"], WITNESS_TOKENS)
        told = self._answer()
        (self.grpc_port, self.http_port), (self.keyed_grpc_port, self.keyed_http_port) = told["ports"]
        self.pid = told["pid"]
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.grpc_port}", options=_CLIENT_OPTIONS)
        self.keyed_channel = grpc.insecure_channel(f"127.0.0.1:{self.keyed_grpc_port}", options=_CLIENT_OPTIONS)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.http_port}", timeout=TIMEOUT_S)

    def _greedy(self, prompt: Sequence[int], number: int) -> list[int]:
        """What `transformers` alone answers."""
        with torch.no_grad():
            tokens = self.reference.generate(
                torch.tensor([prompt]), max_new_tokens=number, do_sample=False, eos_token_id=[], pad_token_id=0
            )
        return list(tokens[0, len(prompt) :].tolist())

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the service ended with {self.process.wait()}: {self.log.read_text()[-4000:]}"
        return dict(json.loads(line))

    def facts(self) -> dict[str, Any]:
        """What the process says of itself."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()

    def say_nothing(self) -> list[socket.socket]:
        """Connections to the ports of gRPC and HTTP on which nothing is sent."""
        ports = (self.grpc_port, self.http_port)
        return [socket.create_connection(("127.0.0.1", port), timeout=2 * TIMEOUT_S) for port in ports]

    def hang_up(self) -> None:
        """Close all connections."""
        for channel in (self.channel, self.keyed_channel):
            channel.close()
        self.http.close()

    def stop(self) -> float:
        """Let it end by itself; returns how long its doors took, in seconds."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        stopped_s = self._answer()["stopped_s"]
        assert self.process.wait(60) == 0, self.log.read_text()[-4000:]
        return float(stopped_s)

    def check(self, door: str) -> None:
        """Another client gets the right answer at `door`."""
        right = self.tokenizer.decode(self.expected) if door == "http" else self.expected
        assert _CANARIES[door](self) == right

    def kill(self) -> None:
        """End it whatever state it is in."""
        self.hang_up()
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    # --- good calls ------------------------------------------------------------------------------------------
    def tokens_over_grpc(self) -> list[int]:
        token_ids = pb.TokenIds(ids=CANARY)
        request = pb.GenerateRequest(token_ids=token_ids, max_new_tokens=GREEDY_TOKENS, ignore_eos=True)
        call = calling(self.channel, GENERATE, [request.SerializeToString()])
        return [token for piece in call for token in pb.GenerateResponse.FromString(piece).token_ids]

    def tokens_over_kserve(self) -> list[int]:
        token_ids = kserve.InferTensorContents(int64_contents=CANARY)
        inputs = [
            kserve.ModelInferRequest.InferInputTensor(
                name="token_ids", datatype="INT64", shape=[len(CANARY)], contents=token_ids
            )
        ]
        parameters = {
            "max_tokens": kserve.InferParameter(int64_param=GREEDY_TOKENS),
            "ignore_eos": kserve.InferParameter(bool_param=True),
            "binary_data_output": kserve.InferParameter(bool_param=False),
        }
        outputs = [kserve.ModelInferRequest.InferRequestedOutputTensor(name="token_ids")]
        request = kserve.ModelInferRequest(model_name=MODEL, inputs=inputs, parameters=parameters, outputs=outputs)
        (data,) = calling(self.channel, INFER, [request.SerializeToString()])
        return list(kserve.ModelInferResponse.FromString(data).outputs[0].contents.int64_contents)

    def text_over_http(self) -> str:
        body = {"model": MODEL, "prompt": list(CANARY), "max_tokens": GREEDY_TOKENS, "temperature": 0}
        reply = self.http.post("/v1/completions", json={**body, "ignore_eos": True})
        assert reply.status_code == 200, reply.text
        return str(reply.json()["choices"][0]["text"])


def calling(
    channel: grpc.Channel, path: str, sent: Iterable[bytes], timeout_s: float | None = TIMEOUT_S, **options: Any
) -> Any:
    """A call, to be iterated over. On the wire all kinds of methods are streams."""
    return channel.stream_stream(path, None, None)(iter(sent), timeout=timeout_s, **options)


class Witness(threading.Thread):
    """A client that generates while there are tests, one generation after the other, and compares each token."""

    def __init__(self, service: Service) -> None:
        super().__init__(name="witness", daemon=True)
        self.num_streams = 0
        """That have come to their end."""
        self._expected = service.expected_of_witness
        self._channel = grpc.insecure_channel(f"127.0.0.1:{service.grpc_port}")
        self._is_wanted = threading.Event()
        self._is_ending = False
        self._complaint = ""

    def run(self) -> None:
        request = pb.GenerateRequest(prompt=WITNESS, max_new_tokens=WITNESS_TOKENS, ignore_eos=True)
        try:
            while not self._is_ending and not self._complaint:
                if not self._is_wanted.wait(0.1):
                    continue
                self._generate(request.SerializeToString())
        except grpc.RpcError as error:
            self._complaint = f"the witness was refused: {error}"

    def _generate(self, request: bytes) -> None:
        call = calling(self._channel, GENERATE, [request], None)
        try:
            self._compare(call)
            self.num_streams += 1
        except grpc.RpcError:
            if call.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            time.sleep(0.01)  # a request beside it holds all bytes that may be in flight: later
        finally:
            call.cancel()

    def _compare(self, call: Any) -> None:
        seen = [token for piece in call for token in pb.GenerateResponse.FromString(piece).token_ids]
        if seen != self._expected:
            self._complaint = f"the witness got other tokens than alone: {seen}"

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Around a test: it generates, and all was well until the end."""
        self._is_wanted.set()
        yield
        self._is_wanted.clear()
        self.check()

    def check(self) -> None:
        assert not self._complaint, self._complaint

    def stop(self) -> None:
        self._is_ending = True
        self.join(10 * TIMEOUT_S)
        self._channel.close()
        assert not self.is_alive(), "the witness hangs"
        self.check()


_CANARIES: dict[str, Callable[[Service], Any]] = {
    "grpc": Service.tokens_over_grpc,
    "kserve": Service.tokens_over_kserve,
    "http": Service.text_over_http,
}
_CLIENT_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_metadata_size", 2**20),
    ("grpc.absolute_max_metadata_size", 2**20),
]
