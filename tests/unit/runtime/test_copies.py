"""Experts that are copied from a living host are those that the checkpoint has, bit by bit."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ray_moe.errors import NotFound, WireError
from ray_moe.models.huggingface import Checkpoint
from ray_moe.ops.experts import StackedExperts, pack, unpack
from ray_moe.ops.quantization import Quantization, QuantizedExperts, make_group
from ray_moe.runtime.expert_host import ExpertHost
from ray_moe.transport.base import ExpertCall
from tests import tiny_models

PATH = "model.layers.1.mlp.experts"


@pytest.fixture(params=["mixtral", "gpt_oss"])
def checkpoint(request, tmp_path: Path) -> Checkpoint:
    tiny_models.save(request.param, tmp_path, torch.bfloat16)
    return Checkpoint.open(str(tmp_path))


def host_of(checkpoint: Checkpoint, *parts: list[int]) -> ExpertHost:
    host = ExpertHost("expert-0")
    for part in parts:
        host.hold(PATH, part, StackedExperts(checkpoint.load_experts({PATH: part})[PATH]))
    return host


@pytest.mark.parametrize("ids", [[2], [0, 3, 5], [4, 1, 1]])
def test_a_copy_is_what_the_checkpoint_has(checkpoint: Checkpoint, ids: list[int]) -> None:
    host = host_of(checkpoint, [0, 1, 2], [5], [3, 4])
    arrays = host.export(PATH, ids)
    assert all(type(array) is np.ndarray for _, array in arrays.values())
    assert {dtype for dtype, _ in arrays.values()} == {"bfloat16"}
    copied, loaded = checkpoint.experts_from(PATH, ids, arrays), checkpoint.load_experts({PATH: ids})[PATH]
    assert type(copied) is type(loaded)
    assert copied.num_experts == loaded.num_experts
    expected = loaded.state_dict()
    assert copied.state_dict().keys() == expected.keys()
    for name, tensor in copied.state_dict().items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    wanted = sorted(set(ids))
    rows = torch.randn(2 * len(wanted), 32).to(torch.bfloat16)
    outs = []
    for module in (copied, loaded):
        taker = ExpertHost("expert-1")
        taker.hold(PATH, wanted, StackedExperts(module))
        outs.append(taker.run([ExpertCall(PATH, 1, rows, None, None, wanted, [2] * len(wanted))])[0])
    assert torch.equal(outs[0].rows, outs[1].rows)  # type: ignore[union-attr]


def test_a_copy_shares_nothing_with_its_host(checkpoint: Checkpoint) -> None:
    host = host_of(checkpoint, [0, 1])
    arrays = host.export(PATH, [0, 1])
    copied = checkpoint.experts_from(PATH, [0, 1], arrays)
    for _, array in arrays.values():
        array[...] = 0
    loaded = checkpoint.load_experts({PATH: [0, 1]})[PATH]
    held = host._layers[0, PATH].groups[0]
    assert isinstance(held, StackedExperts)
    for module in (copied, held.module):
        state = module.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in loaded.state_dict().items())


def test_a_copy_that_came_read_only_is_taken(checkpoint: Checkpoint) -> None:
    arrays = host_of(checkpoint, [0, 1]).export(PATH, [0])
    for _, array in arrays.values():
        array.flags.writeable = False
    assert checkpoint.experts_from(PATH, [0], arrays).num_experts == 1


def test_what_is_no_copy_of_these_experts_is_refused(checkpoint: Checkpoint) -> None:
    arrays = host_of(checkpoint, [0, 1]).export(PATH, [0, 1])
    name = next(iter(arrays))
    missing = {key: value for key, value in arrays.items() if key != name}
    for ids, given in (([0], arrays), ([0, 1], missing), ([0, 1], {**arrays, "more": arrays[name]})):
        with pytest.raises(WireError, match="not a copy"):
            checkpoint.experts_from(PATH, ids, given)
    with pytest.raises(WireError, match="float33"):
        checkpoint.experts_from(PATH, [0, 1], {**arrays, name: ("float33", arrays[name][1])})
    with pytest.raises(NotFound):
        checkpoint.experts_from(PATH, [], arrays)
    with pytest.raises(NotFound, match=r"model\.layers\.7"):
        checkpoint.experts_from("model.layers.7.mlp.experts", [0], arrays)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_every_dtype_travels_as_plain_numbers(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 5).to(dtype)
    packed = pack({"w": tensor})
    assert packed["w"][1].dtype.kind in "fu"
    assert torch.equal(unpack(packed)["w"].view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("kind", ["int8", "int8_compute", "fp8"])
def test_experts_in_8_bits_are_copied_with_the_same_bits_and_have_the_bytes_that_are_planned_for(
    checkpoint: Checkpoint, kind: Quantization
) -> None:
    ids = [0, 2, 5]
    group = make_group(checkpoint.load_experts({PATH: ids})[PATH], kind)
    assert isinstance(group, QuantizedExperts)
    donor, taker = ExpertHost("expert-0"), ExpertHost("expert-1")
    donor.hold(PATH, ids, group)
    arrays = donor.export(PATH, [5, 0])
    taker.hold(PATH, [0, 5], checkpoint.quantized_experts_from(PATH, [5, 0], arrays, kind))
    call = ExpertCall(PATH, 1, torch.randn(4, 32).to(torch.bfloat16), None, None, [0, 5], [1, 3])
    here, there = donor.run([call])[0], taker.run([call])[0]
    assert torch.equal(here.rows, there.rows)  # type: ignore[union-attr]
    planned = {layer.path: layer.expert_bytes for layer in checkpoint.layers_as(kind)}
    assert sum(tensor.nbytes for tensor in group.tensors([0])[0].values()) == planned[PATH]
    assert checkpoint.layers_as("none") == tuple(checkpoint.layers.values())
    with pytest.raises(WireError):
        checkpoint.quantized_experts_from(PATH, [0], arrays, kind)
