"""Malformed calls of the Open Inference Protocol: name -> what is sent, and the status that must come."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ray_moe.wire.kserve import grpc_service_pb2 as pb
from tests.unit.service.hostile.grpc_corpus import BAD, INDEX, NO_MESSAGES, WEIGHT, C, Call
from tests.unit.service.hostile.service import INFER, LAYER, MODEL, VOCAB_SIZE, WIDTH

KSERVE = INFER.rpartition("/")[0]
STREAM = f"{KSERVE}/ModelStreamInfer"
HIDDEN = np.ones((2, WIDTH), np.float32)
Tensor = pb.ModelInferRequest.InferInputTensor


def parameter(value: Any) -> pb.InferParameter:
    field = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}[type(value)]
    return pb.InferParameter(**{field: value})


def ask(
    *inputs: tuple[str, str, Sequence[int], bytes],
    model: str = MODEL,
    outputs: Sequence[str] = (),
    parameters: Mapping[str, Any] | None = None,
    **others: Any,
) -> pb.ModelInferRequest:
    """A request whose inputs (name, datatype, shape, bytes) are raw."""
    given = {
        name: value if isinstance(value, pb.InferParameter) else parameter(value)
        for name, value in (parameters or {}).items()
    }
    return pb.ModelInferRequest(
        model_name=model,
        inputs=[Tensor(name=name, datatype=datatype, shape=shape) for name, datatype, shape, _ in inputs],
        raw_input_contents=[data for *_, data in inputs],
        outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs],
        parameters=given,
        **others,
    )


def layer(*inputs: tuple[str, str, Sequence[int], bytes], **others: Any) -> pb.ModelInferRequest:
    return ask(*inputs, model=f"{MODEL}/{LAYER}", **others)


def hidden(datatype: str = "FP32", shape: Sequence[int] = (2, WIDTH), data: bytes = HIDDEN.tobytes()) -> Any:
    return ("hidden", datatype, shape, data)


def tokens(*ids: int) -> Any:
    return ("token_ids", "INT64", [len(ids)], np.array(ids, np.int64).tobytes())


def text(data: bytes, name: str = "text_input", shape: Sequence[int] = (1,)) -> Any:
    return (name, "BYTES", shape, data)


def setting(**given: Any) -> pb.ModelInferRequest:
    return ask(tokens(5, 6), parameters={"max_tokens": 2, **given})


def words(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def typed(datatype: str, shape: Sequence[int], **contents: Any) -> pb.ModelInferRequest:
    tensor = Tensor(name="hidden", datatype=datatype, shape=shape, contents=pb.InferTensorContents(**contents))
    return pb.ModelInferRequest(model_name=f"{MODEL}/{LAYER}", inputs=[tensor])


def both_contents() -> pb.ModelInferRequest:
    request = typed("FP16", [1, WIDTH], fp32_contents=[1.0] * WIDTH)
    request.raw_input_contents.append(bytes(2 * WIDTH))
    return request


def shared_memory() -> pb.ModelInferRequest:
    request = layer(hidden())
    request.inputs[0].parameters["shared_memory_region"].string_param = "/dev/shm/x"
    return request


def more_raw(number: int) -> pb.ModelInferRequest:
    request = layer(hidden())
    request.raw_input_contents.extend([b""] * number)
    return request


GOOD = layer(hidden()).SerializeToString()
INDEX_INPUT = ("index", "INT64", [2, 2], INDEX.tobytes())
WEIGHT_INPUT = ("weight", "FP32", [2, 2], WEIGHT.tobytes())

REQUESTS: dict[str, tuple[pb.ModelInferRequest, str]] = {
    # raw contents and shapes
    "more raw contents than inputs": (more_raw(2), "raw_input_contents has 3 entries for 1 inputs"),
    "a raw byte less": (layer(hidden(data=bytes(255))), "has 255 raw bytes"),
    "a raw byte more": (layer(hidden(data=bytes(257))), "has 257 raw bytes"),
    "no raw bytes": (layer(hidden(data=b"")), "has 0 raw bytes"),
    "a negative size": (layer(hidden(shape=[-2, WIDTH])), "has shape [-2, 32]"),
    "size -1, as in the metadata": (layer(hidden(shape=[-1, WIDTH])), "has shape [-1, 32]"),
    "size -2^63": (layer(hidden(shape=[-(2**63), WIDTH])), "has shape"),
    "10^9 tokens": (layer(hidden(shape=[10**9, WIDTH])), "takes 128,000,000,000"),
    "sizes whose product is 2^64": (layer(hidden(shape=[2**59, WIDTH], data=b"")), "takes 73,786,976,294,838,206,464"),
    "2^32 by 2^32": (layer(hidden(shape=[2**32, 2**32])), "has shape [4294967296, 4294967296]"),
    "another width": (layer(hidden(shape=[2, WIDTH + 1])), "expected [-1, 32]"),
    "no dimension": (layer(hidden(shape=[])), "has shape []"),
    "100,000 dimensions": (layer(hidden(shape=[1] * 100_000)), "100000 sizes"),
    "no token, 2^62 experts": (
        layer(
            hidden(shape=[0, WIDTH], data=b""),
            ("index", "INT64", [0, 2**62], b""),
            ("weight", "FP32", [0, 2**62], b""),
        ),
        "has shape [0, 4611686018427387904]",
    ),
    "too many tokens": (
        layer(hidden("FP16", [1025, WIDTH], bytes(2050 * WIDTH))),
        "at most 1,024 go in one call",
    ),
    # datatypes
    "no datatype": (layer(hidden("")), "has datatype ''"),
    "an unknown datatype": (layer(hidden("FP8")), "has datatype 'FP8'"),
    "a datatype in small letters": (layer(hidden("fp32")), "has datatype 'fp32'"),
    "numbers as texts": (layer(hidden("BYTES")), "has datatype 'BYTES'"),
    "integer hidden": (layer(hidden("INT64")), "has datatype 'INT64'"),
    "a datatype of 1 MB": (layer(hidden("F" * 1_000_000)), "has datatype 'FFF"),
    "float index": (layer(hidden(), ("index", "FP64", [2, 2], bytes(32)), WEIGHT_INPUT), "expected INT64 or INT32"),
    # numbers
    "NaN": (layer(hidden(data=(HIDDEN * np.nan).tobytes())), "hidden[0, 0] is nan"),
    "infinity": (layer(hidden(data=(HIDDEN * np.inf).tobytes())), "hidden[0, 0] is inf"),
    "an index beyond": (
        layer(hidden(), ("index", "INT64", [2, 2], (INDEX + 1).tobytes()), WEIGHT_INPUT),
        "index[1, 1] is 9",
    ),
    "an index below 0": (
        layer(hidden(), ("index", "INT32", [2, 2], b"\xff" * 16), WEIGHT_INPUT),
        "index[0, 0] is -1",
    ),
    "NaN weight": (
        layer(hidden(), INDEX_INPUT, ("weight", "FP32", [2, 2], (WEIGHT * np.nan).tobytes())),
        "weight[0, 0] is nan",
    ),
    "index without weight": (layer(hidden(), INDEX_INPUT), "index and weight belong together"),
    # typed contents
    "typed contents of half precision": (typed("FP16", [1, WIDTH], fp32_contents=[1.0] * WIDTH), "no typed contents"),
    "typed and raw contents": (both_contents(), "has contents beside raw_input_contents"),
    "contents of another type": (typed("FP32", [1, WIDTH], int_contents=[1] * WIDTH), "but has int_contents"),
    "contents of two types": (
        typed("FP32", [1, WIDTH], fp32_contents=[1.0] * WIDTH, bytes_contents=[b"x"]),
        "but has bytes_contents",
    ),
    "an element less": (typed("FP32", [1, WIDTH], fp32_contents=[1.0] * (WIDTH - 1)), "has 31 elements"),
    "no contents": (typed("FP32", [1, WIDTH]), "has 0 elements"),
    "10^9 typed tokens": (typed("FP32", [10**9, WIDTH], fp32_contents=[1.0]), "has 1 elements"),
    # texts
    "a text longer than the message": (ask(text(b"\xff\xff\xff\xffab")), "inside element 0"),
    "a text without its length": (ask(text(b"ab")), "ends at byte 2, inside element 0"),
    "bytes behind a text": (ask(text(words(b"a") + b"b")), "1 or more elements"),
    "no text": (ask(text(b"")), "has 0 elements"),
    "an empty text": (ask(text(words(b""))), "the prompt is empty"),
    "two texts": (ask(text(words(b"a", b"b"), shape=[2])), "has shape [2]"),
    "a text that is not UTF-8": (ask(text(words(b"\xff\xfe"))), "text_input is not UTF-8"),
    "a surrogate as text": (ask(text(words(b"\xed\xa0\x80"))), "text_input is not UTF-8"),
    "a text of too many bytes": (ask(text(words(b"a" * (2**16 + 1)))), "at most 65,536"),
    "10^18 stops": (ask(tokens(1), text(bytes(4000), "stop", [10**18])), "expected at most 1,000 texts"),
    "a million stops": (ask(tokens(1), text(bytes(4_000_000), "stop", [1_000_000])), "expected at most 1,000 texts"),
    "100 stops": (ask(tokens(1), text(words(*[b"a"] * 100), "stop", [100])), "100 stops are given"),
    "stops that lie about their lengths": (
        ask(tokens(1), text(words(b"a") + b"\x09\0\0\0b", "stop", [2])),
        "element 1",
    ),
    "a stop that is not UTF-8": (ask(tokens(1), text(words(b"\xff"), "stop")), "stop is not UTF-8"),
    # tokens and settings
    "text and tokens": (ask(text(words(b"a")), tokens(1)), "exactly one of text_input and token_ids"),
    "neither text nor tokens": (ask(), "exactly one of text_input and token_ids"),
    "no tokens": (ask(tokens()), "the prompt is empty"),
    "token -1": (ask(tokens(-1)), "token_ids[0] is -1"),
    "token beyond": (ask(tokens(1, VOCAB_SIZE)), f"token_ids[1] is {VOCAB_SIZE}"),
    "token 2^64 - 1": (ask(("token_ids", "UINT64", [1], b"\xff" * 8)), "token_ids[0] is 18446744073709551615"),
    "half a million tokens": (ask(tokens(*[1] * 500_000)), "500,000 tokens"),
    "an input twice": (ask(tokens(1), tokens(1)), "is given twice"),
    "an unknown input": (ask(tokens(1), ("logits", "FP32", [1], bytes(4))), "has no input 'logits'"),
    "an unknown output": (ask(tokens(1), outputs=["logits"]), "has no output 'logits'"),
    "an output twice": (ask(tokens(1), outputs=["token_ids"] * 2), "is requested twice"),
    "an unknown parameter": (setting(best_of=2), "there is no parameter 'best_of'"),
    "a parameter without a value": (setting(seed=pb.InferParameter()), "seed is 'None'"),
    "1000 parameters": (setting(**{f"p{number}": 1 for number in range(1000)}), "there is no parameter"),
    "shared memory": (shared_memory(), "shared_memory_region"),
    "max_tokens 0": (setting(max_tokens=0), "max_tokens is 0"),
    "max_tokens -1": (setting(max_tokens=-1), "max_tokens is -1"),
    "max_tokens 2^63 - 1": (setting(max_tokens=2**63 - 1), "max_tokens is 9223372036854775807"),
    "max_tokens as text": (setting(max_tokens="many"), "max_tokens is 'many'"),
    "temperature NaN": (setting(temperature="nan"), "temperature is nan"),
    "temperature of a long text": (setting(temperature="1" * 100_000), "temperature is"),
    "temperature true": (setting(temperature=True), "temperature is 'True'"),
    "top_p -inf": (setting(top_p=float("-inf")), "top_p is -inf"),
    "top_k 2^40": (setting(top_k=2**40), "top_k is 1099511627776"),
    "repetition penalty 1e-300": (setting(repetition_penalty=1e-300, temperature=1.0), "expected 0.01 to 100"),
    "seed -2^63": (setting(seed=-(2**63)), "seed is -9223372036854775808"),
    "timeout -1": (setting(timeout=-1), "timeout is -1"),
    "stream over ModelInfer": (setting(stream=True), "ModelInfer answers once"),
    "stop as a number": (setting(stop=5), "stop is '5'"),
    "a setting twice": (
        ask(tokens(1), ("seed", "UINT64", [1], bytes(8)), parameters={"seed": 1}),
        "as a parameter and as an input",
    ),
    "parameters of a layer": (layer(hidden(), parameters={"temperature": 1.0}), "there is no parameter 'temperature'"),
}

UNKNOWN = {
    "no model": ask(tokens(1), model=""),
    "an unknown model": ask(tokens(1), model="gpt"),
    "an unknown layer": ask(hidden(), model=f"{MODEL}/model.layers.9.mlp.experts"),
    "a layer of another model": ask(hidden(), model=f"gpt/{LAYER}"),
    "path traversal": ask(tokens(1), model=f"{MODEL}/../../etc/passwd"),
    "a model of 10 MB": ask(tokens(1), model="m" * 10_000_000),
    "version 2": ask(tokens(1), model_version="2"),
    "version of 1 MB": ask(tokens(1), model_version="1" * 1_000_000),
}

CORPUS: dict[str, Call] = {
    **{f"infer: {name}": Call(INFER, [r.SerializeToString()], BAD, says) for name, (r, says) in REQUESTS.items()},
    **{f"infer: {name}": Call(INFER, [r.SerializeToString()], C.NOT_FOUND) for name, r in UNKNOWN.items()},
    **{f"infer: {name}": Call(INFER, [data], BAD, "are not a ModelInferRequest") for name, data in NO_MESSAGES.items()},
    **{f"infer cut at byte {cut}": Call(INFER, [GOOD[:cut]], BAD) for cut in (1, 10, 40, 60, 80, 200, len(GOOD) - 1)},
    "infer: nothing": Call(INFER, [], BAD, "before its request came"),
    "infer: in no time": Call(INFER, [setting(timeout=1, max_tokens=4000).SerializeToString()], C.DEADLINE_EXCEEDED),
    "infer: in all the time there is": Call(
        INFER, [setting(timeout=pb.InferParameter(uint64_param=2**64 - 1)).SerializeToString()], C.OK, num_answers=1
    ),
    "metadata of an unknown model": Call(f"{KSERVE}/ModelMetadata", [b"\x0a\x01x"], C.NOT_FOUND),
    "config by no message": Call(f"{KSERVE}/ModelConfig", [b"\xff"], BAD, "are not a ModelConfigRequest"),
    "statistics of a version that is none": Call(f"{KSERVE}/ModelStatistics", [b"\x12\x019"], C.NOT_FOUND),
    "ready by no message": Call(f"{KSERVE}/ServerReady", [b"\x0b"], BAD, "are not a ServerReadyRequest"),
    "index of an unknown repository": Call(f"{KSERVE}/RepositoryIndex", [b"\x0a\x01x"], C.OK, num_answers=1),
    "a method of Triton's that is not here": Call(f"{KSERVE}/RepositoryModelUnload", [b""], C.UNIMPLEMENTED),
    "stream: nothing": Call(STREAM, [], C.OK),
    "stream: a thousand bad requests": Call(STREAM, [b"\xff"] * 1000, C.OK, num_answers=1000),
    "stream: a cut request between good ones": Call(STREAM, [GOOD, GOOD[:60], GOOD], C.OK, num_answers=3),
}
