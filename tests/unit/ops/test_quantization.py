import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_moe.errors import InvalidRequest, WireError
from ray_moe.models.experts import experts_modules
from ray_moe.ops.experts import StackedExperts, pack, unpack
from ray_moe.ops.quantization import Int8Experts, quantize
from ray_moe.runtime.expert_host import ExpertHost
from ray_moe.transport.base import ExpertCall, ExpertReply
from tests import tiny_models

ROWS, EXPERTS, COUNTS = 9, [0, 2, 5], [4, 1, 4]


@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    dim=st.integers(0, 2),
    magnitude=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_an_error_is_at_most_half_a_step_of_its_channel(shape, dim, magnitude, dtype, seed):
    dim = min(dim, len(shape) - 1)
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * magnitude).to(dtype)
    small = quantize(tensor, dim)
    assert small.codes.shape == tensor.shape
    error = (small.dequantize() - tensor.float()).abs()
    assert (error <= small.scale * 0.50001).all()
    if tensor.numel():
        assert torch.allclose(small.scale * 127, tensor.float().abs().amax(dim, keepdim=True))


def test_zeros_stay_zeros():
    tensor = torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    assert torch.equal(quantize(tensor).dequantize(), tensor)


@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
def test_what_is_not_finite_is_refused(wrong):
    with pytest.raises(InvalidRequest, match="cannot be quantised"):
        quantize(torch.tensor([1.0, wrong]))


@pytest.fixture(params=["mixtral", "gpt_oss"])
def group(request):
    """Experts whose weights are [out, in], and such whose weights are [in, out], with biases."""
    module = next(iter(experts_modules(tiny_models.build(request.param)).values()))
    for name, parameter in module.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1 if "bias" in name else 0.2)
    return StackedExperts(module)


def test_experts_in_8_bits_compute_nearly_the_same_in_a_fourth_of_the_memory(group):
    small = Int8Experts(group)
    rows = torch.randn(ROWS, 32)
    with torch.no_grad():
        wanted, given = group.run(rows, EXPERTS, COUNTS), small.run(rows, EXPERTS, COUNTS)
    assert given.dtype == wanted.dtype
    assert (given - wanted).norm() < 0.015 * wanted.norm()
    stacks = sum(parameter.nbytes for parameter in group.module.parameters() if parameter.ndim == 3)
    assert small.nbytes < 0.4 * stacks  # the scales count where a row has only 24 weights


def test_each_expert_in_8_bits_computes_with_its_dequantised_weights(group):
    small = Int8Experts(group)
    rows = torch.randn(ROWS, 32)
    inputs = -2 if group.module.is_transposed else -1
    with torch.no_grad():
        for parameter in group.module.parameters():
            if parameter.ndim == 3:
                parameter.copy_(quantize(parameter, inputs).dequantize())
        torch.testing.assert_close(small.run(rows, EXPERTS, COUNTS), group.run(rows, EXPERTS, COUNTS))


def test_gradients_reach_the_rows(group):
    small = Int8Experts(group)
    through = torch.randn(ROWS, 32, requires_grad=True)
    (given,) = torch.autograd.grad(small.run(through, EXPERTS, COUNTS).sum(), through)
    (wanted,) = torch.autograd.grad(group.run(through, EXPERTS, COUNTS).sum(), through)
    assert (given - wanted).norm() < 0.03 * wanted.norm()


def test_wide_weights_have_a_fourth_of_their_memory():
    weights = torch.randn(2, 64, 1024)
    small = quantize(weights)
    assert small.nbytes <= 0.255 * weights.nbytes


def test_experts_in_8_bits_are_taken_apart_without_a_change(group):
    small = Int8Experts(group)
    some = small.select([5, 2])
    rows = torch.randn(5, 32)
    with torch.no_grad():
        assert torch.equal(
            some.run(rows, [0, 1], [4, 1]), torch.cat([small.run(rows[:4], [5], [4]), small.run(rows[4:], [2], [1])])
        )
    assert some.nbytes * 3 == small.nbytes
    assert small.tensors([5])[0].keys() == some.tensors([0])[0].keys()


def test_a_copy_of_experts_in_8_bits_computes_the_same_bits(group):
    small = Int8Experts(group)
    own, shared = small.tensors([5, 0])
    arrived = unpack(pack(own | shared))
    frame = copy.deepcopy(group.select([0, 1]).module).to("meta")
    copied = Int8Experts.from_tensors(frame, arrived)
    rows = torch.randn(5, 32)
    with torch.no_grad():
        assert torch.equal(copied.run(rows, [0, 1], [4, 1]), small.select([5, 0]).run(rows, [0, 1], [4, 1]))
    assert copied.nbytes * 3 == small.nbytes
    whole = sum(tensor.nbytes for tensor in group.tensors([5, 0])[0].values())
    assert sum(tensor.nbytes for tensor in own.values()) < 0.4 * whole


@pytest.mark.parametrize("change", ["missing", "unknown", "dtype", "shape", "whole"])
def test_a_copy_of_something_else_is_refused(group, change):
    own, shared = Int8Experts(group).tensors([0, 1])
    tensors = own | shared
    if change == "missing":
        del tensors["down_proj.scale"]
    elif change == "unknown":
        tensors["other"] = torch.zeros(2)
    elif change == "dtype":
        tensors["down_proj"] = tensors["down_proj"].float()
    elif change == "shape":
        tensors["down_proj"] = tensors["down_proj"][:1]
    else:
        tensors = {name: tensor for part in group.tensors([0, 1]) for name, tensor in part.items()}
    with pytest.raises(WireError):
        Int8Experts.from_tensors(group.select([0, 1]).module, tensors)


def test_a_host_copies_and_drops_experts_in_8_bits(group):
    donor, taker = ExpertHost("a"), ExpertHost("b")
    donor.hold("layer", range(6), Int8Experts(group))
    frame = group.select([0, 1]).module
    taker.hold("layer", [1, 4], Int8Experts.from_tensors(frame, unpack(donor.export("layer", [4, 1]))))
    donor.drop("layer", [0, 3])
    call = ExpertCall("layer", 0, torch.randn(4, 32), None, None, [1, 4], [3, 1])
    here, there = donor.run([call])[0], taker.run([call])[0]
    assert isinstance(here, ExpertReply)
    assert isinstance(there, ExpertReply)
    assert torch.equal(here.rows, there.rows)
    assert donor.held() == {"layer": [1, 2, 4, 5]}
