import copy
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_moe.config import ExpertsConfig
from ray_moe.errors import InvalidRequest, WireError
from ray_moe.models.experts import experts_modules
from ray_moe.ops.experts import StackedExperts, pack, unpack
from ray_moe.ops.quantization import LARGEST, Quantization, QuantizedExperts, ScaledTensor, codes_of, quantize
from ray_moe.runtime.expert_host import ExpertHost
from ray_moe.transport.base import ExpertCall, ExpertReply
from tests import tiny_models

KINDS: list[Quantization] = ["int8", "int8_compute", "fp8"]
every = pytest.mark.parametrize("kind", KINDS)

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


@given(
    magnitude=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_an_error_in_fp8_is_at_most_a_16th_of_the_number_and_half_a_step_of_the_smallest(magnitude, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(4, 50, generator=generator) * torch.randn(4, 50, generator=generator).exp() ** 2
    tensor = (tensor * magnitude).to(dtype)
    small = quantize(tensor, to="fp8")
    assert small.codes.dtype is torch.float8_e4m3fn and bool(small.codes.float().isfinite().all())
    exact = tensor.float()
    error = (small.dequantize() - exact).abs()
    assert (error <= torch.maximum(exact.abs() / 16, small.scale * 2.0**-10) * 1.00001).all()
    assert torch.allclose(small.scale * 448, exact.abs().amax(-1, keepdim=True))


def test_every_code_of_fp8_is_what_torch_makes_of_it():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = codes[~codes.float().isnan()]
    assert len(finite) == 254
    for shape in ((254,), (2, 127)):
        small = ScaledTensor(finite.view(shape), torch.ones(1))
        assert torch.equal(small.dequantize(), finite.float().view(shape))
    assert torch.equal(ScaledTensor(finite[::3], torch.ones(1)).dequantize(), finite[::3].float())


@pytest.mark.parametrize("to", LARGEST)
def test_zeros_stay_zeros(to):
    tensor = torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    assert torch.equal(quantize(tensor, to=to).dequantize(), tensor)


@pytest.mark.parametrize("to", LARGEST)
@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
def test_what_is_not_finite_is_refused(wrong, to):
    with pytest.raises(InvalidRequest, match="cannot be quantised"):
        quantize(torch.tensor([1.0, wrong]), to=to)


def test_each_form_can_be_asked_for_in_the_configuration():
    assert get_args(ExpertsConfig.model_fields["quantization"].annotation) == get_args(Quantization)
    assert [*KINDS] == [kind for kind in get_args(Quantization) if kind != "none"]


@pytest.fixture(params=["mixtral", "gpt_oss"])
def group(request):
    """Experts whose weights are [out, in], and such whose weights are [in, out], with biases."""
    module = next(iter(experts_modules(tiny_models.build(request.param)).values()))
    for name, parameter in module.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1 if "bias" in name else 0.2)
    return StackedExperts(module)


@every
def test_experts_in_8_bits_compute_nearly_the_same_in_a_fourth_of_the_memory(group, kind):
    small = QuantizedExperts(group, kind)
    rows = torch.randn(ROWS, 32)
    with torch.no_grad():
        wanted, given = group.run(rows, EXPERTS, COUNTS), small.run(rows, EXPERTS, COUNTS)
    assert given.dtype == wanted.dtype
    assert (given - wanted).norm() < {"int8": 0.015, "int8_compute": 0.02, "fp8": 0.06}[kind] * wanted.norm()
    stacks = sum(parameter.nbytes for parameter in group.module.parameters() if parameter.ndim == 3)
    assert small.nbytes < 0.4 * stacks  # the scales count where a row has only 24 weights


@every
def test_each_expert_in_8_bits_computes_with_its_dequantised_weights(group, kind):
    small = QuantizedExperts(group, kind)
    rows = torch.randn(ROWS, 32).requires_grad_(kind == "int8_compute")  # integers have no gradients
    inputs = -2 if group.module.is_transposed else -1
    with torch.no_grad():
        for parameter in group.module.parameters():
            if parameter.ndim == 3:
                parameter.copy_(quantize(parameter, inputs, codes_of(kind)).dequantize())
    with torch.set_grad_enabled(rows.requires_grad):
        torch.testing.assert_close(small.run(rows, EXPERTS, COUNTS), group.run(rows, EXPERTS, COUNTS))


@every
def test_gradients_reach_the_rows(group, kind):
    small = QuantizedExperts(group, kind)
    through = torch.randn(ROWS, 32, requires_grad=True)
    (given,) = torch.autograd.grad(small.run(through, EXPERTS, COUNTS).sum(), through)
    (wanted,) = torch.autograd.grad(group.run(through, EXPERTS, COUNTS).sum(), through)
    assert (given - wanted).norm() < (0.1 if kind == "fp8" else 0.03) * wanted.norm()


def test_integers_are_multiplied_as_the_formula_says(group):
    """down(act(gate(x)) * up(x)) with both factors of each product rounded, in numpy integers and python."""
    small = QuantizedExperts(group, "int8_compute")
    module = group.module

    def rounded(rows):
        scale = rows.abs().amax(-1, keepdim=True) / 127
        return (rows / scale).round().long().numpy(), scale

    def linear(rows, name):
        weights = group.module.get_parameter(name)[2]
        steps, of_row = rounded(rows)
        codes, of_out = rounded(weights.t() if module.is_transposed else weights)
        out = torch.from_numpy(steps @ codes.T).float() * of_row * of_out.t()
        return out + module.get_parameter(f"{name}_bias")[2] if module.has_bias else out

    rows = torch.randn(5, 32)
    with torch.no_grad():
        wanted = linear(module._apply_gate(linear(rows, "gate_up_proj")), "down_proj")
        torch.testing.assert_close(small.run(rows, [2], [5]), wanted, atol=1e-5, rtol=1e-4)


def test_integers_give_a_row_the_same_bits_in_any_batch(group):
    small = QuantizedExperts(group, "int8_compute")
    rows = torch.randn(40, 32)
    rows[3] = 0
    with torch.no_grad():
        together = small.run(rows, [0, 4], [30, 10])
        alone = torch.cat([small.run(row[None], [0 if n < 30 else 4], [1]) for n, row in enumerate(rows)])
    assert torch.equal(together, alone)
    assert small.run(rows[:0], [1], [0]).shape == (0, 32)


def test_what_is_not_finite_in_a_row_stays_so_and_in_that_row(group):
    small = QuantizedExperts(group, "int8_compute")
    rows = torch.randn(3, 32)
    wanted = small.run(rows, [0], [3])
    rows[1, 5] = float("nan")
    given = small.run(rows, [0], [3])
    assert not given[1].isfinite().any()
    assert torch.equal(given[[0, 2]], wanted[[0, 2]])


def test_wide_weights_have_a_fourth_of_their_memory():
    weights = torch.randn(2, 64, 1024)
    small = quantize(weights)
    assert small.nbytes <= 0.255 * weights.nbytes


@every
def test_experts_in_8_bits_are_taken_apart_without_a_change(group, kind):
    small = QuantizedExperts(group, kind)
    some = small.select([5, 2])
    rows = torch.randn(5, 32)
    with torch.no_grad():
        assert torch.equal(
            some.run(rows, [0, 1], [4, 1]), torch.cat([small.run(rows[:4], [5], [4]), small.run(rows[4:], [2], [1])])
        )
    assert some.nbytes * 3 == small.nbytes
    assert small.tensors([5])[0].keys() == some.tensors([0])[0].keys()


@every
def test_a_copy_of_experts_in_8_bits_computes_the_same_bits(group, kind):
    small = QuantizedExperts(group, kind)
    own, shared = small.tensors([5, 0])
    arrived = unpack(pack(own | shared))
    frame = copy.deepcopy(group.select([0, 1]).module).to("meta")
    copied = QuantizedExperts.from_tensors(frame, arrived, kind)
    rows = torch.randn(5, 32)
    with torch.no_grad():
        assert torch.equal(copied.run(rows, [0, 1], [4, 1]), small.select([5, 0]).run(rows, [0, 1], [4, 1]))
    assert copied.nbytes * 3 == small.nbytes
    whole = sum(tensor.nbytes for tensor in group.tensors([5, 0])[0].values())
    assert sum(tensor.nbytes for tensor in own.values()) < 0.4 * whole


@pytest.mark.parametrize("change", ["missing", "unknown", "dtype", "shape", "whole"])
def test_a_copy_of_something_else_is_refused(group, change):
    own, shared = QuantizedExperts(group, "fp8").tensors([0, 1])
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
        QuantizedExperts.from_tensors(group.select([0, 1]).module, tensors, "fp8")


@every
def test_a_host_copies_and_drops_experts_in_8_bits(group, kind):
    donor, taker = ExpertHost("a"), ExpertHost("b")
    donor.hold("layer", range(6), QuantizedExperts(group, kind))
    frame = group.select([0, 1]).module
    taker.hold("layer", [1, 4], QuantizedExperts.from_tensors(frame, unpack(donor.export("layer", [4, 1])), kind))
    donor.drop("layer", [0, 3])
    call = ExpertCall("layer", 0, torch.randn(4, 32), None, None, [1, 4], [3, 1])
    here, there = donor.run([call])[0], taker.run([call])[0]
    assert isinstance(here, ExpertReply)
    assert isinstance(there, ExpertReply)
    assert torch.equal(here.rows, there.rows)
    assert donor.held() == {"layer": [1, 2, 4, 5]}
