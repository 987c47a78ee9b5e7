"""Malformed calls of `ray_moe.v1`, of health and of reflection: name -> what is sent, and the status that must come."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from ray_moe.wire import arrays
from ray_moe.wire.v1 import admin_pb2, training_pb2
from ray_moe.wire.v1 import inference_pb2 as pb
from tests.unit.service.hostile.service import FORWARD, GENERATE, LAYER, NUM_EXPERTS, POSITIONS, VOCAB_SIZE, WIDTH

C = grpc.StatusCode
BAD = C.INVALID_ARGUMENT

ADMIN = "/ray_moe.v1.Admin/"
HEALTH = "/grpc.health.v1.Health/"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
FORWARD_STREAM = "/ray_moe.v1.Inference/ForwardStream"


@dataclass(frozen=True)
class Call:
    """A call of gRPC, whatever kind of method it is."""

    path: str
    sent: Sequence[bytes]
    code: grpc.StatusCode
    says: str = ""
    """Part of the message."""
    metadata: Sequence[tuple[str, str | bytes]] = ()
    compression: grpc.Compression | None = None
    num_answers: int = 0
    """Messages that come before the status."""


# --- bytes that are no message -------------------------------------------------------------------------------
HIDDEN = np.linspace(-1, 1, 2 * WIDTH, dtype=np.float32).reshape(2, WIDTH)
INDEX = np.array([[0, 1], [NUM_EXPERTS - 1, NUM_EXPERTS]], np.int64)
WEIGHT = np.full((2, 2), 0.5, np.float32)


def tensor(dtype: int, shape: Sequence[int], data: bytes = b"") -> pb.Tensor:
    return pb.Tensor(dtype=dtype, shape=shape, data=data)  # type: ignore[arg-type]


def routing(index: Any = INDEX, weight: Any = WEIGHT) -> pb.Routing:
    given = (each if isinstance(each, pb.Tensor) else arrays.encode(np.asarray(each)) for each in (index, weight))
    return pb.Routing(**dict(zip(("index", "weight"), given, strict=True)))


def forward(hidden: Any = HIDDEN, **others: Any) -> pb.ForwardRequest:
    if hidden is not None and not isinstance(hidden, pb.Tensor):
        hidden = arrays.encode(np.asarray(hidden))
    layer = {} if "layer_index" in others else {"layer_path": LAYER}
    return pb.ForwardRequest(hidden=hidden, **{**layer, **others})


def generate(**fields: Any) -> pb.GenerateRequest:
    given = {} if {"prompt", "token_ids"} & fields.keys() else {"token_ids": pb.TokenIds(ids=[5, 6])}
    return pb.GenerateRequest(**{"max_new_tokens": 2, **given, **fields})


def tokens(*ids: int) -> pb.TokenIds:
    return pb.TokenIds(ids=ids)


GOOD_FORWARD = forward(routing=routing()).SerializeToString()
GOOD_GENERATE = generate(prompt="hello", stop=["x"], seed=3).SerializeToString()

NO_MESSAGES = {
    "noise": b"\xff" * 100,
    "a field without a number": b"\x00\x01",
    "wire type 6": b"\x0e\x01",
    "wire type 7": b"\x0f\x01",
    "a group that does not end": b"\x0b\x08\x01",
    "a group that ends without a beginning": b"\x0c",
    "a varint of 11 bytes": b"\x08" + b"\xff" * 11,
    "a length beyond the message": b"\x0a\x7fab",
    "a length of 2^63": b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    "groups 10,000 deep": b"\x7b" * 10_000 + b"\x7c" * 10_000,
    "text that is not UTF-8": b"\x0a\x02\xff\xfe",
    "a lone surrogate as text": b"\x0a\x03\xed\xa0\x80",
}
"""Neither is a ForwardRequest nor a GenerateRequest."""

WIRE = {
    **{
        f"{path.rpartition('/')[2]}: {name}": Call(path, [data], BAD, "are not a")
        for path in (FORWARD, GENERATE)
        for name, data in NO_MESSAGES.items()
    },
    **{
        f"Forward cut at byte {cut}": Call(FORWARD, [GOOD_FORWARD[:cut]], BAD)
        for cut in (1, 2, 20, 40, 45, 60, 200, len(GOOD_FORWARD) - 40, len(GOOD_FORWARD) - 1)
    },
    **{
        f"Generate cut at byte {cut}": Call(GENERATE, [GOOD_GENERATE[:cut]], BAD, "are not a")
        for cut in (1, 2, 5, 8, len(GOOD_GENERATE) - 1)
    },
    "no message at all": Call(GENERATE, [], BAD, "the call ended before its request came"),
    "Forward without a message": Call(FORWARD, [], BAD, "the call ended before its request came"),
    "Status without a message": Call(f"{ADMIN}Status", [], BAD, "the call ended before its request came"),
    "an empty message": Call(GENERATE, [b""], BAD, "exactly one of prompt (text) and token_ids"),
    "10 MB of a field nobody knows": Call(
        GENERATE, [b"\xfa\x3f\x80\xad\xe2\x04" + bytes(10_000_000)], BAD, "exactly one"
    ),
    "a message beyond the limit": Call(GENERATE, [bytes(17 * 2**20)], C.RESOURCE_EXHAUSTED, "larger than max"),
    "64 MiB in 64 KiB, by gzip": Call(
        GENERATE, [bytes(64 * 2**20)], C.RESOURCE_EXHAUSTED, "larger than max", compression=grpc.Compression.Gzip
    ),
    "no such method": Call("/ray_moe.v1.Inference/Train", [b""], C.UNIMPLEMENTED),
    "no such service": Call("/ray_moe.v2.Inference/Forward", [b""], C.UNIMPLEMENTED),
    "a path of 4 KB": Call("/ray_moe.v1.Inference/" + "x" * 4000, [b""], C.UNIMPLEMENTED),
    "metadata of 12 KB": Call(
        GENERATE, [GOOD_GENERATE], C.RESOURCE_EXHAUSTED, "metadata size", [(f"x-{n}", "v" * 1000) for n in range(16)]
    ),
    "metadata of 200 KB": Call(
        GENERATE, [GOOD_GENERATE], C.RESOURCE_EXHAUSTED, "metadata size", [(f"x-{n}", "v" * 1000) for n in range(200)]
    ),
    "a thousand small entries of metadata": Call(
        GENERATE, [GOOD_GENERATE], C.RESOURCE_EXHAUSTED, "metadata size", [("x", "v")] * 1000
    ),
    "health: no message": Call(f"{HEALTH}Check", [b"\xff"], BAD, "an encoded grpc.health.v1.HealthCheckRequest"),
    "health: nothing": Call(f"{HEALTH}Check", [], BAD, "before its request came"),
    "health: an unknown service": Call(f"{HEALTH}Check", [b"\x0a\x01x"], C.NOT_FOUND, "expected one of"),
    "health: watch no message": Call(f"{HEALTH}Watch", [b"\xff"], BAD, "an encoded grpc.health.v1.HealthCheckRequest"),
    "reflection: no message": Call(
        REFLECTION, [b"\xff"], BAD, "an encoded grpc.reflection.v1alpha.ServerReflectionRequest"
    ),
    "reflection: an unknown symbol": Call(REFLECTION, [b"\x22\x03a.b"], C.OK, num_answers=1),
    "reflection: an empty question": Call(REFLECTION, [b""], C.OK, num_answers=1),
}

# --- one layer -----------------------------------------------------------------------------------------------
FORWARDS: dict[str, tuple[pb.ForwardRequest, grpc.StatusCode, str]] = {
    "no layer": (pb.ForwardRequest(hidden=arrays.encode(HIDDEN)), BAD, "no layer is named"),
    "layer -1": (forward(layer_index=-1), C.NOT_FOUND, "no MoE layer has index -1"),
    "layer 2": (forward(layer_index=2), C.NOT_FOUND, "expected 0..1"),
    "layer 2^31 - 1": (forward(layer_index=2**31 - 1), C.NOT_FOUND, "no MoE layer has index 2147483647"),
    "unknown layer": (forward(layer_path="model.layers.7.mlp.experts"), C.NOT_FOUND, "did you mean"),
    "empty layer path": (forward(layer_path=""), C.NOT_FOUND, "has no MoE layer ''"),
    "layer path with NULs": (forward(layer_path="\0" * 100), C.NOT_FOUND, "has no MoE layer"),
    "layer path of 10 MB": (forward(layer_path="x" * 10_000_000), C.NOT_FOUND, "has no MoE layer"),
    "path traversal": (forward(layer_path="../../etc/passwd"), C.NOT_FOUND, "has no MoE layer"),
    "no hidden": (forward(None), BAD, "hidden is missing"),
    "no dtype": (forward(tensor(0, [2, WIDTH], bytes(8 * WIDTH))), BAD, "hidden has dtype number 0"),
    "dtype 7": (forward(tensor(7, [2, WIDTH], bytes(8 * WIDTH))), BAD, "hidden has dtype number 7"),
    "dtype -1": (forward(tensor(-1, [2, WIDTH])), BAD, "hidden has dtype number -1"),
    "integer hidden": (forward(HIDDEN.astype(np.int64)), BAD, "expected a float dtype"),
    "a byte less": (forward(tensor(2, [2, WIDTH], bytes(8 * WIDTH - 1))), BAD, "hidden has 255 bytes"),
    "a byte more": (forward(tensor(2, [2, WIDTH], bytes(8 * WIDTH + 1))), BAD, "hidden has 257 bytes"),
    "no bytes": (forward(tensor(2, [2, WIDTH])), BAD, "hidden has 0 bytes"),
    "float32 sent as float64": (forward(tensor(1, [2, WIDTH], bytes(8 * WIDTH))), BAD, "takes 512"),
    "negative size": (forward(tensor(2, [-2, WIDTH], bytes(8 * WIDTH))), BAD, "none below 0"),
    "two negative sizes": (forward(tensor(2, [-2, -WIDTH], bytes(8 * WIDTH))), BAD, "none below 0"),
    "size -2^63": (forward(tensor(2, [-(2**63), WIDTH])), BAD, "none below 0"),
    "10^9 tokens": (forward(tensor(2, [10**9, WIDTH], bytes(8 * WIDTH))), BAD, "takes 128,000,000,000"),
    "10^9 tokens of no width": (forward(tensor(2, [10**9, 0])), BAD, "a row per token"),
    "sizes whose product is 2^64": (forward(tensor(2, [2**32, 2**32])), BAD, "takes 73,786,976,294,838,206,464"),
    "sizes whose product is 2^64 + 2": (
        forward(tensor(2, [2**32 + 1, 2**32 - 1], bytes(8))),
        BAD,
        "hidden has 8 bytes",
    ),
    "no token, 2^62 wide": (forward(tensor(2, [0, 2**62])), BAD, "hidden has shape [0, 4611686018427387904]"),
    "a million dimensions": (forward(tensor(2, [1] * 1_000_000, bytes(4))), BAD, "at most 8 sizes"),
    "one dimension": (forward(HIDDEN[0]), BAD, f"hidden has shape [{WIDTH}]"),
    "three dimensions": (forward(HIDDEN[None]), BAD, "hidden has shape [1, 2, 32]"),
    "no dimension": (forward(np.float32(1)), BAD, "hidden has shape []"),
    "another width": (forward(HIDDEN[:, 1:]), BAD, "hidden has shape [2, 31]"),
    "too many tokens": (forward(np.zeros((1025, WIDTH), np.float16)), BAD, "at most 1,024 go in one call"),
    "NaN": (forward(HIDDEN * np.nan), BAD, "hidden[0, 0] is nan"),
    "a NaN in half precision": (forward(tensor(3, [1, WIDTH], bytes(62) + b"\xff\x7f")), BAD, "hidden[0, 31] is nan"),
    "a NaN in bfloat16": (forward(tensor(4, [1, WIDTH], bytes(62) + b"\xc0\x7f")), BAD, "hidden[0, 31] is nan"),
    "infinity": (forward(np.full_like(HIDDEN, np.inf)), BAD, "expected finite numbers"),
    "more than float32 holds": (forward(HIDDEN.astype(np.float64) * 1e300), BAD, "float32, the layer's dtype"),
    "index below 0": (forward(routing=routing(INDEX - 1)), BAD, "index[0, 0] is -1"),
    "index beyond": (forward(routing=routing(INDEX + 1)), BAD, f"index[1, 1] is {NUM_EXPERTS + 1}"),
    "index 2^63 - 1": (forward(routing=routing(np.full((2, 2), 2**63 - 1))), BAD, "index[0, 0] is 9223372036854775807"),
    "index -2^63": (forward(routing=routing(np.full((2, 2), -(2**63)))), BAD, "index[0, 0] is -9223372036854775808"),
    "float index": (forward(routing=routing(WEIGHT)), BAD, "index has dtype float32"),
    "integer weight": (forward(routing=routing(INDEX, INDEX)), BAD, "weight has dtype int64"),
    "NaN weight": (forward(routing=routing(INDEX, WEIGHT * np.nan)), BAD, "weight[0, 0] is nan"),
    "infinite weight": (forward(routing=routing(INDEX, WEIGHT * np.inf)), BAD, "weight[0, 0] is inf"),
    "weight of another shape": (forward(routing=routing(INDEX, WEIGHT[:, :1])), BAD, "expected the same [T, K]"),
    "index of fewer tokens": (forward(routing=routing(INDEX[:1], WEIGHT[:1])), BAD, "expected [2, K]"),
    "no experts per token": (forward(routing=routing(INDEX[:, :0], WEIGHT[:, :0])), BAD, "index has 0 experts"),
    "too many experts per token": (
        forward(routing=routing(np.zeros((2, 9), np.int64), np.zeros((2, 9)))),
        BAD,
        "index has 9 experts per token",
    ),
    "10^18 experts per token of no tokens": (
        forward(HIDDEN[:0], routing=routing(tensor(5, [0, 10**18]), tensor(2, [0, 10**18]))),
        BAD,
        "index has",
    ),
    "routing without its tensors": (forward(routing=pb.Routing()), BAD, "index has dtype number 0"),
    "index without weight": (forward(routing=pb.Routing(index=arrays.encode(INDEX))), BAD, "weight has dtype number 0"),
    "index in three dimensions": (
        forward(routing=routing(INDEX[None], WEIGHT[None])),
        BAD,
        "index has shape [1, 2, 2]",
    ),
}

# Legal, however strange: answered like any other call.
STRANGE_FORWARDS = {
    "no tokens": forward(HIDDEN[:0]),
    "no tokens, routed": forward(HIDDEN[:0], routing=routing(INDEX[:0], WEIGHT[:0])),
    "the largest numbers": forward(np.full((2, WIDTH), 3.4e38, np.float32)),
    "the largest numbers, routed": forward(
        np.full((2, WIDTH), 3.4e38, np.float32), routing=routing(weight=WEIGHT * 3e38)
    ),
    "the smallest numbers": forward(np.full((2, WIDTH), 1e-45, np.float32)),
    "no expert for any token": forward(routing=routing(np.full((2, 2), NUM_EXPERTS))),
    "one expert, eight times": forward(routing=routing(np.zeros((2, 8), np.int64), np.ones((2, 8)))),
    "a request id of 1 MB": forward(request_id="r" * 1_000_000),
    "a field nobody knows": pb.ForwardRequest.FromString(GOOD_FORWARD + b"\xfa\x3f\x01x"),
}

# --- generation ----------------------------------------------------------------------------------------------
GENERATES: dict[str, tuple[pb.GenerateRequest, str]] = {
    "neither prompt nor tokens": (pb.GenerateRequest(max_new_tokens=2), "exactly one of prompt (text) and token_ids"),
    "an empty prompt": (generate(prompt=""), "the prompt is empty"),
    "no tokens": (generate(token_ids=tokens()), "the prompt is empty"),
    "token -1": (generate(token_ids=tokens(-1)), "token_ids[0] is -1"),
    "token -2^63": (generate(token_ids=tokens(1, -(2**63))), "token_ids[1] is -9223372036854775808"),
    "token beyond": (generate(token_ids=tokens(VOCAB_SIZE)), f"the vocabulary has 0..{VOCAB_SIZE - 1}"),
    "token 2^63 - 1": (generate(token_ids=tokens(2**63 - 1)), "token_ids[0] is 9223372036854775807"),
    "token 2^32 + 1": (generate(token_ids=tokens(2**32 + 1)), "token_ids[0] is 4294967297"),
    "too many tokens": (generate(token_ids=tokens(*[1] * POSITIONS)), f"the model's {POSITIONS:,} positions"),
    "a million tokens": (generate(token_ids=tokens(*[1] * 1_000_000)), "1,000,000 tokens"),
    "a million wrong tokens": (generate(token_ids=tokens(*[-1] * 1_000_000)), "1,000,000 tokens"),
    "too long a text": (generate(prompt="a" * (2**16 + 1)), "at most 65,536 are taken"),
    "a text of too many tokens": (generate(prompt="a" * 2**16), "positions"),
    "a text of NULs that is too long": (generate(prompt="\0" * 60_000), "positions"),
    "0 new tokens": (generate(max_new_tokens=0), "max_new_tokens is 0"),
    "-1 new tokens": (generate(max_new_tokens=-1), "max_new_tokens is -1"),
    "-2^31 new tokens": (generate(max_new_tokens=-(2**31)), "max_new_tokens is -2147483648"),
    "2^31 - 1 new tokens": (generate(max_new_tokens=2**31 - 1), "max_new_tokens is 2,147,483,647"),
    "temperature -1": (generate(temperature=-1), "temperature is -1"),
    "temperature NaN": (generate(temperature=math.nan), "temperature is nan"),
    "temperature infinite": (generate(temperature=math.inf), "temperature is inf"),
    "temperature 5e-324": (generate(temperature=5e-324), "temperature is 5e-324"),
    "top_p 0": (generate(top_p=0), "top_p is 0"),
    "top_p NaN": (generate(top_p=math.nan), "top_p is nan"),
    "top_p 2": (generate(top_p=2), "top_p is 2"),
    "top_p -0.0": (generate(top_p=-0.0), "top_p is -0.0"),
    "top_k -1": (generate(top_k=-1), "top_k is -1"),
    "top_k -2^31": (generate(top_k=-(2**31)), "top_k is -2147483648"),
    "min_p -1": (generate(min_p=-1), "min_p is -1"),
    "min_p 1.5": (generate(min_p=1.5), "min_p is 1.5"),
    "min_p NaN": (generate(min_p=math.nan), "min_p is nan"),
    "repetition penalty 0": (generate(repetition_penalty=0), "repetition_penalty is 0"),
    "repetition penalty -1": (generate(repetition_penalty=-1), "repetition_penalty is -1"),
    "repetition penalty 1e-300": (generate(repetition_penalty=1e-300, temperature=1), "expected 0.01 to 100"),
    "repetition penalty 1e-38": (generate(repetition_penalty=1e-38, temperature=1e-4), "expected 0.01 to 100"),
    "repetition penalty 1e300": (generate(repetition_penalty=1e300, temperature=1), "expected 0.01 to 100"),
    "repetition penalty NaN": (generate(repetition_penalty=math.nan), "repetition_penalty is nan"),
    "repetition penalty infinite": (generate(repetition_penalty=math.inf), "repetition_penalty is inf"),
    "presence penalty NaN": (generate(presence_penalty=math.nan), "presence_penalty is nan"),
    "presence penalty infinite": (generate(presence_penalty=-math.inf), "presence_penalty is -inf"),
    "frequency penalty 101": (generate(frequency_penalty=101), "frequency_penalty is 101"),
    "frequency penalty NaN": (generate(frequency_penalty=math.nan), "frequency_penalty is nan"),
    "logprobs -1": (generate(logprobs=-1), "logprobs is -1"),
    "logprobs 1000": (generate(logprobs=1000), "logprobs is 1000"),
    "an empty stop": (generate(stop=[""]), "stop[0] has 0 characters"),
    "a stop of 1 MB": (generate(stop=["a" * 1_000_000]), "stop[0] has 1000000 characters"),
    "10^5 stops": (generate(stop=["a"] * 100_000), "100000 stops are given"),
    "stop token -1": (generate(stop_token_ids=[-1]), "stop_token_ids[0] is -1"),
    "stop token beyond": (generate(stop_token_ids=[1, VOCAB_SIZE]), f"stop_token_ids[1] is {VOCAB_SIZE}"),
    "10^5 stop tokens": (generate(stop_token_ids=[1] * 100_000), "100000 stop tokens"),
}

STRANGE_GENERATES = {
    "a text with NULs": generate(prompt="a\0b\0"),
    "a text of special tokens": generate(prompt="<eos><bos><pad>" * 10),
    "a text of unassigned code points": generate(prompt="\U0010ffff\ufffe\u202e"),
    "the hottest": generate(temperature=1.7e308),
    "the coldest": generate(temperature=1e-4, presence_penalty=100, frequency_penalty=-100, repetition_penalty=0.01),
    "all that narrows the choice": generate(temperature=1, top_p=5e-324, top_k=1, min_p=1.0, repetition_penalty=100),
    "the largest top_k": generate(temperature=1, top_k=2**31 - 1),
    "the largest seed": generate(temperature=1, seed=2**64 - 1),
    "prompt and token_ids, of which the last counts": pb.GenerateRequest.FromString(
        pb.GenerateRequest(prompt="x" * 5000).SerializeToString() + generate().SerializeToString()
    ),
    "a parameter sent many times": pb.GenerateRequest.FromString(
        generate().SerializeToString() + b"\x21" + struct.pack("<d", math.nan) + b"\x21" + struct.pack("<d", 0)
    ),
}

# --- the cluster ---------------------------------------------------------------------------------------------
KILL = {"kind": "kill", "target": "random", "duration_s": 1.0, "factor": 1.0}


def resize(number: int) -> bytes:
    return admin_pb2.ResizeRequest(num_actors=number).SerializeToString()


def drain(target: str) -> bytes:
    return admin_pb2.DrainRequest(target=target).SerializeToString()


def publish(model: str) -> bytes:
    return admin_pb2.PublishRequest(model=model).SerializeToString()


def canary(**fields: Any) -> bytes:
    given = {"layer_index": 0, "model": "/nowhere/at/all", **fields}
    return admin_pb2.BeginCanaryRequest(**given).SerializeToString()


def rollback(version: int) -> bytes:
    return admin_pb2.RollbackRequest(version=version).SerializeToString()


def chaos(**fields: Any) -> bytes:
    return admin_pb2.ChaosRequest(**{**KILL, **fields}).SerializeToString()


ADMINS: dict[str, tuple[str, bytes, grpc.StatusCode, str]] = {
    "resize to 0": ("Resize", resize(0), C.FAILED_PRECONDITION, "0 expert actors were asked for"),
    "resize to -1": ("Resize", resize(-1), BAD, "num_actors is -1"),
    "resize to 10^6": ("Resize", resize(10**6), BAD, "expected 0 to 100,000"),
    "resize to 2^63 - 1": ("Resize", resize(2**63 - 1), BAD, "num_actors is 9223372036854775807"),
    "resize by no message": ("Resize", b"\xff", BAD, "are not a ResizeRequest"),
    "drain nobody": ("Drain", drain(""), BAD, "expected the name of an expert actor"),
    "drain an unknown actor": ("Drain", drain("expert-99"), C.NOT_FOUND, "no expert actor and no node"),
    "drain 1 MB": ("Drain", drain("x" * 1_000_000), C.NOT_FOUND, "no expert actor and no node"),
    "drain text that is not UTF-8": ("Drain", b"\x0a\x01\xff", BAD, "are not a DrainRequest"),
    "publish nothing": ("Publish", publish(""), BAD, "expected the directory of a checkpoint"),
    "publish what is not there": ("Publish", publish("/nowhere/at/all"), C.NOT_FOUND, "there is no directory"),
    "publish by no message": ("Publish", b"\x0a\x01\xff", BAD, "are not a PublishRequest"),
    "roll back to -1": ("Rollback", rollback(-1), C.NOT_FOUND, "version -1 is not there"),
    "roll back to 2^63 - 1": ("Rollback", rollback(2**63 - 1), C.NOT_FOUND, "version 9223372036854775807 is not there"),
    "roll back from the first": ("Rollback", b"", BAD, "no version before 0"),
    "a canary of no layer": ("BeginCanary", b"", BAD, "no layer is named"),
    "a canary of no model": ("BeginCanary", canary(model=""), BAD, "expected the directory of a checkpoint"),
    "a canary of what is not there": ("BeginCanary", canary(), C.NOT_FOUND, "there is no directory"),
    "a canary of share 0": ("BeginCanary", canary(share=0.0), BAD, "share is 0"),
    "a canary of share NaN": ("BeginCanary", canary(share=math.nan), BAD, "share is nan"),
    "a canary of share 2": ("BeginCanary", canary(share=2.0), BAD, "share is 2"),
    "a canary of no such mode": ("BeginCanary", canary(mode="coal"), BAD, "mode is 'coal'"),
    "a canary that may drift for ever": ("BeginCanary", canary(max_drift=math.inf), BAD, "max_drift is inf"),
    "a canary that may not drift": ("BeginCanary", canary(max_drift=-1.0), BAD, "max_drift is -1"),
    "the end of no canary": ("EndCanary", b"", BAD, "no version is being tried out"),
    "versions by no message": ("ListVersions", b"\x0b", BAD, "are not a ListVersionsRequest"),
    "chaos that is off": ("Chaos", chaos(), C.FAILED_PRECONDITION, "chaos.enabled"),
    "chaos of no kind": ("Chaos", chaos(kind=""), BAD, "kind is ''"),
    "chaos of an unknown kind": ("Chaos", chaos(kind="meteor"), BAD, "kind is 'meteor'"),
    "chaos for nobody": ("Chaos", chaos(target=""), BAD, "target is empty"),
    "chaos at NaN": ("Chaos", chaos(at_s=math.nan), BAD, "at_s is nan"),
    "chaos at -1 s": ("Chaos", chaos(at_s=-1), BAD, "at_s is -1"),
    "chaos for ever": ("Chaos", chaos(duration_s=math.inf), BAD, "duration_s is inf"),
    "chaos by NaN": ("Chaos", chaos(factor=math.nan), BAD, "factor is nan"),
    "plan by no message": ("Plan", b"\x0b", BAD, "are not a PlanRequest"),
    "placement by no message": ("Placement", b"\x0b", BAD, "are not a PlacementRequest"),
    "status by no message": ("Status", b"\x0b", BAD, "are not a StatusRequest"),
}

# --- training ------------------------------------------------------------------------------------------------
TRAINING = "/ray_moe.v1.Training/"
TOKENS = np.array([[5, 6, 7], [8, 9, 5]])


def micro(input_ids: Any = TOKENS, labels: Any = None, **others: Any) -> training_pb2.MicroBatch:
    named = {"input_ids": input_ids, "labels": labels}
    given = {
        name: each if isinstance(each, pb.Tensor) else arrays.encode(np.asarray(each))
        for name, each in named.items()
        if each is not None
    }
    return training_pb2.MicroBatch(**{"id": "a", **given, **others})


def optim_step(**options: Any) -> bytes:
    given = training_pb2.StepOptions(**{"id": "a", **options})
    return training_pb2.OptimStepRequest(options=given).SerializeToString()


def train_step(*batches: training_pb2.MicroBatch, op_id: str = "a") -> bytes:
    options = training_pb2.StepOptions(id=op_id)
    return training_pb2.TrainStepRequest(batches=batches, options=options).SerializeToString()


GOOD_MICRO = training_pb2.ForwardBackwardRequest(batch=micro()).SerializeToString()

MICROS: dict[str, tuple[training_pb2.MicroBatch, str]] = {
    "nothing": (training_pb2.MicroBatch(), "input_ids has dtype number 0"),
    "no tokens": (micro(None), "input_ids has dtype number 0"),
    "no id": (micro(id=""), "id is ''"),
    "an id of 1 MB": (micro(id="x" * 1_000_000), "expected 1 to 64 letters"),
    "an id that is a path": (micro(id="../../etc/passwd"), "id is '../../etc/passwd'"),
    "an id with a NUL": (micro(id="a\0"), "expected 1 to 64 letters"),
    "an id with a line break": (micro(id="a\n"), "expected 1 to 64 letters"),
    "float tokens": (micro(TOKENS * 1.0), "input_ids has dtype float64"),
    "one dimension": (micro(TOKENS[0]), "input_ids has shape [3]"),
    "no dimension": (micro(np.int64(5)), "input_ids has shape []"),
    "no sequence": (micro(TOKENS[:0]), "input_ids has shape [0, 3]"),
    "no sequence, 2^62 long": (micro(tensor(5, [0, 2**62])), "input_ids has shape"),
    "sequences of one token": (micro(TOKENS[:, :1]), "two or more tokens"),
    "10^9 sequences": (micro(tensor(5, [10**9, 3], bytes(48))), "takes 24,000,000,000"),
    "too many tokens": (micro(np.ones((1025, 2), np.int32)), "at most 1,024 go in one"),
    "too long a sequence": (micro(np.ones((1, POSITIONS + 1), np.int64)), "at most 1,024 go in one"),
    "token -1": (micro(TOKENS - 6), "input_ids[0, 0] is -1"),
    "token -100": (micro(np.where(TOKENS == 7, -100, TOKENS), TOKENS), "input_ids[0, 2] is -100"),
    "token beyond": (micro(TOKENS + VOCAB_SIZE - 6), f"input_ids[0, 1] is {VOCAB_SIZE}"),
    "token 2^32 + 5": (micro(TOKENS + 2**32), "input_ids[0, 0] is 4294967301"),
    "label -1": (micro(TOKENS, TOKENS - 6), "labels[0, 0] is -1"),
    "label -99": (micro(TOKENS, TOKENS - 104), "labels[0, 0] is -99"),
    "label beyond": (micro(TOKENS, TOKENS + VOCAB_SIZE - 6), f"labels[0, 1] is {VOCAB_SIZE}"),
    "label 2^63 - 1": (micro(TOKENS, np.full((2, 3), 2**63 - 1)), "labels[0, 0] is 9223372036854775807"),
    "labels of another shape": (micro(TOKENS, TOKENS.T), "labels has shape [3, 2]"),
    "float labels": (micro(TOKENS, TOKENS * 1.0), "labels has dtype float64"),
    "labels of no dtype": (micro(TOKENS, pb.Tensor()), "labels has dtype number 0"),
    "no label that counts": (micro(TOKENS, np.full((2, 3), -100)), "no label counts"),
    "none behind the first": (micro(TOKENS, [[5, -100, -100], [8, -100, -100]]), "no label counts"),
    "weight 0": (micro(weight=0), "weight is 0"),
    "weight -1": (micro(weight=-1), "weight is -1"),
    "weight NaN": (micro(weight=math.nan), "weight is nan"),
    "weight infinite": (micro(weight=math.inf), "weight is inf"),
    "weight 1e300": (micro(weight=1e300), "weight is 1e+300"),
}
TRAININGS: dict[str, tuple[str, bytes, str]] = {
    **{
        f"forward_backward: {name}": (
            "ForwardBackward",
            training_pb2.ForwardBackwardRequest(batch=batch).SerializeToString(),
            says,
        )
        for name, (batch, says) in MICROS.items()
    },
    **{
        f"ForwardBackward: {name}": ("ForwardBackward", data, "are not a ForwardBackwardRequest")
        for name, data in NO_MESSAGES.items()
    },
    **{
        f"ForwardBackward cut at byte {cut}": ("ForwardBackward", GOOD_MICRO[:cut], "")
        for cut in (1, 5, 12, len(GOOD_MICRO) - 1)
    },
    "a step without an id": ("OptimStep", optim_step(id=""), "id is ''"),
    "a step without options": ("OptimStep", b"", "id is ''"),
    "step -1": ("OptimStep", optim_step(step=-1), "step is -1"),
    "step 2^63 - 1": ("OptimStep", optim_step(step=2**63 - 1), "step is 9223372036854775807"),
    "lr -1": ("OptimStep", optim_step(lr=-1), "lr is -1"),
    "lr NaN": ("OptimStep", optim_step(lr=math.nan), "lr is nan"),
    "lr infinite": ("OptimStep", optim_step(lr=math.inf), "lr is inf"),
    "clip_norm 0": ("OptimStep", optim_step(clip_norm=0), "clip_norm is 0"),
    "clip_norm NaN": ("OptimStep", optim_step(clip_norm=math.nan), "clip_norm is nan"),
    "a step by no message": ("OptimStep", b"\xff", "are not a OptimStepRequest"),
    "train_step of nothing": ("TrainStep", train_step(), "0 micro-batches"),
    "train_step of too many": (
        "TrainStep",
        train_step(*[micro(id=str(number)) for number in range(1025)]),
        "1025 micro-batches",
    ),
    "train_step of the same twice": ("TrainStep", train_step(micro(), micro()), "the same id"),
    "train_step with a bad one": ("TrainStep", train_step(micro(), micro(TOKENS - 9, id="b")), "input_ids[0, 0] is -4"),
    "train_step without an id": ("TrainStep", train_step(micro(), op_id=""), "id is ''"),
    "load step -1": ("LoadState", training_pb2.LoadStateRequest(step=-1).SerializeToString(), "step is -1"),
    "load by no message": ("LoadState", b"\x0b", "are not a LoadStateRequest"),
    "save by no message": ("SaveState", b"\x0b", "are not a SaveStateRequest"),
    "state by no message": ("GetState", b"\x0b", "are not a GetStateRequest"),
    "discard by no message": ("Discard", b"\x0a\x01\xff", "are not a DiscardRequest"),
    "publish by no message": ("PublishTrained", b"\x0b", "are not a PublishTrainedRequest"),
    "sample without a prompt": ("Sample", b"", "exactly one of prompt (text) and token_ids"),
    "sample with stops": ("Sample", generate(stop=["x"]).SerializeToString(), "stop is for published weights only"),
    "sample with log-probabilities": ("Sample", generate(logprobs=1).SerializeToString(), "logprobs is for published"),
    "sample of a version": ("Sample", generate(version=0).SerializeToString(), "not of a version"),
    "a sample of token -1": ("Sample", generate(token_ids=tokens(-1)).SerializeToString(), "token_ids[0] is -1"),
    "a sample of too many": ("Sample", generate(max_new_tokens=1025).SerializeToString(), "max_new_tokens is 1,025"),
    "a sample of too long a text": ("Sample", generate(prompt="a" * 60_000).SerializeToString(), "positions"),
    "no message at all": ("Sample", generate().SerializeToString()[:1], "are not a GenerateRequest"),
}

CORPUS: dict[str, Call] = {
    **WIRE,
    **{f"forward: {n}": Call(FORWARD, [r.SerializeToString()], code, says) for n, (r, code, says) in FORWARDS.items()},
    **{
        f"strange forward: {name}": Call(FORWARD, [request.SerializeToString()], C.OK, num_answers=1)
        for name, request in STRANGE_FORWARDS.items()
    },
    **{f"generate: {n}": Call(GENERATE, [r.SerializeToString()], BAD, says) for n, (r, says) in GENERATES.items()},
    **{
        f"strange generate: {name}": Call(GENERATE, [request.SerializeToString()], C.OK, num_answers=2)
        for name, request in STRANGE_GENERATES.items()
    },
    **{f"admin: {n}": Call(f"{ADMIN}{method}", [data], code, says) for n, (method, data, code, says) in ADMINS.items()},
    **{f"training: {n}": Call(f"{TRAINING}{method}", [d], BAD, says) for n, (method, d, says) in TRAININGS.items()},
    "training: a good one": Call(f"{TRAINING}ForwardBackward", [GOOD_MICRO], C.OK, num_answers=1),
    "training: no message": Call(f"{TRAINING}OptimStep", [], BAD, "the call ended before its request came"),
    "stream: a bad request between good ones": Call(
        FORWARD_STREAM, [GOOD_FORWARD, GOOD_FORWARD, GOOD_FORWARD[:40], GOOD_FORWARD], BAD, num_answers=2
    ),
    "stream: nothing": Call(FORWARD_STREAM, [], C.OK),
    "stream: another layer in the middle": Call(
        FORWARD_STREAM, [GOOD_FORWARD, forward(layer_index=9).SerializeToString()], C.NOT_FOUND, num_answers=1
    ),
}
