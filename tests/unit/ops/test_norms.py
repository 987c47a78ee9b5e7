import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_moe.errors import InvalidConfig, InvalidRequest
from ray_moe.ops.norms import CHUNK, clip_coefficient, norm, squares


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.randoms(), st.sampled_from([1e-30, 1.0, 1e30]))
def test_the_norm_is_that_of_all_elements_in_any_order(sizes, random, magnitude):
    tensors = [torch.randn(size) * magnitude for size in sizes]
    whole = torch.cat(tensors).double().norm().item()
    own = squares(tensors)
    assert norm(own) == pytest.approx(whole, rel=1e-12)
    shuffled = random.sample(own, len(own))
    assert norm(shuffled) == norm(own)


def test_many_small_numbers_count_beside_each_other():
    tensor = torch.ones(3 * CHUNK + 5)
    assert squares([tensor]) == [tensor.numel()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_squares_of_half_precision_neither_overflow_nor_are_rounded(dtype):
    tensor = torch.tensor([[60000.0, 2e-7], [1.0, 3.0]], dtype=dtype)
    assert squares([tensor.T]) == [pytest.approx(math.fsum(x * x for x in tensor.flatten().tolist()), rel=1e-15)]


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1.0, 3.0, 1000.0])
def test_gradients_are_clipped_as_torch_clips_them(max_norm):
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in ((4, 5), (3,), (2, 2, 2))]
    own = [torch.randn(param.shape, dtype=torch.float64) for param in params]
    for param, gradient in zip(params, own, strict=True):
        param.grad = gradient.clone()
    total = torch.nn.utils.clip_grad_norm_(params, max_norm)
    assert norm(squares(own)) == pytest.approx(total.item(), rel=1e-14)
    coefficient = clip_coefficient(total.item(), max_norm)  # of the very same norm: to the last bit
    for gradient, param in zip(own, params, strict=True):
        assert param.grad is not None
        assert torch.equal(gradient * coefficient, param.grad)


def test_without_a_maximum_nothing_is_clipped():
    assert clip_coefficient(1e30, None) == 1


@pytest.mark.parametrize("wrong", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_is_refused(wrong):
    total = norm([1.0, *squares([torch.tensor([1.0, wrong])])])
    assert not math.isfinite(total)
    with pytest.raises(InvalidRequest, match="norm is"):
        clip_coefficient(total, 1.0)


def test_a_sum_that_is_too_large_is_infinite():
    assert norm([1.7e308, 1.7e308]) == math.inf


@pytest.mark.parametrize("max_norm", [-1.0, math.nan])
def test_a_maximum_that_is_none_is_refused(max_norm):
    with pytest.raises(InvalidConfig, match="max_norm"):
        clip_coefficient(1.0, max_norm)
