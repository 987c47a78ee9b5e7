import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_moe.errors import InvalidRequest, WireError
from ray_moe.ops.compression import (
    GRIDS,
    Compressed,
    GradientQuantizer,
    decompress,
    pack_rows,
    unpack_rows,
)

SHAPES = st.one_of(
    st.lists(st.integers(0, 9), max_size=3),
    st.sampled_from([(256,), (3, 256), (5, 511), (3, 7, 33)]),
).map(tuple)


def random(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(
    SHAPES,
    st.integers(1, 8),
    st.integers(0, 2**32 - 1),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.sampled_from(list(GRIDS)),
)
def test_what_arrives_adds_up_to_the_gradients_but_for_the_last_error(shape, steps, seed, dtype, num_bits):
    compressor = GradientQuantizer(num_bits)
    sent, arrived = torch.zeros(shape).double(), torch.zeros(shape).double()
    for step in range(steps):
        gradient = random(shape, seed + step, dtype)
        before = (sent - arrived).float()
        sent += gradient.double()
        arrived += decompress(compressor.compress("w", gradient)).double()
        # One compression loses a part of what it was given, never more than that.
        assert (sent - arrived).norm() <= (before + gradient.float()).norm() * 1.0001 + 1e-6
    assert torch.allclose((sent - arrived).float(), compressor.state()["w"], atol=1e-5)


@pytest.mark.parametrize("num_bits", GRIDS)
def test_the_error_does_not_grow_with_the_steps(num_bits):
    compressor = GradientQuantizer(num_bits)
    errors = []
    for step in range(400):
        compressor.compress("w", random((64, 64), step))
        errors.append(compressor.state()["w"].norm().item())
    assert max(errors[200:]) < 1.2 * max(errors[:200])


@pytest.mark.parametrize("num_bits", GRIDS)
def test_training_on_few_bits_gets_to_where_whole_gradients_get(num_bits):
    target = random((32, 32), 0)
    losses = []
    for compress in (False, True):
        compressor, weights = GradientQuantizer(num_bits), torch.zeros(32, 32)
        for _ in range(300):
            gradient = weights - target
            weights -= 0.05 * (decompress(compressor.compress("w", gradient)) if compress else gradient)
        losses.append((weights - target).square().mean().item())
    assert losses == [pytest.approx(0, abs=1e-3)] * 2


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_numbers_whose_sizes_are_those_of_row_times_column_arrive_nearly_exactly(rows, columns, seed):
    sizes = [2 ** random((length,), seed + length).mul(4) for length in (rows, columns)]
    gradient = sizes[0][:, None] * sizes[1] * random((rows, columns), seed).sign()
    arrived = decompress(GradientQuantizer(1).compress("w", gradient))
    # Two magnitudes, each to half of a fourth of an octave, and the row's fitted to rounded columns.
    assert torch.allclose(arrived, gradient, rtol=2 ** (3 / 8) - 1 + 1e-4, atol=0)


def test_a_gradient_that_is_nothing_like_row_times_column_loses_no_more_than_it_is():
    gradient, compressor = torch.eye(64), GradientQuantizer(1)
    for _ in range(20):
        compressor.compress("w", gradient)
    assert compressor.state()["w"].norm() < 20 * gradient.norm()


@given(st.floats(-45, 30))
def test_magnitudes_that_cannot_be_said_are_sent_as_the_next_that_can_and_the_rest_later(exponent):
    gradient = torch.full((4, 4), 2.0**exponent)
    compressor = GradientQuantizer(1)
    arrived = decompress(compressor.compress("w", gradient))
    assert torch.allclose(arrived + compressor.state()["w"], gradient)
    assert (arrived <= min(2.0**exponent * 1.1, 2.0**24)).all()
    assert (arrived > 0).all() == (exponent > -39.625) or abs(exponent + 39.625) < 0.01


@pytest.mark.parametrize(("shape", "least"), [((32, 32), 16), ((128, 128), 28), ((1024, 300), 30)])
def test_a_matrix_in_single_bits_is_at_least_sixteen_times_smaller_scales_included(shape, least):
    gradient = torch.randn(shape)
    assert gradient.nbytes / GradientQuantizer(1).compress("w", gradient).nbytes >= least


def test_more_bits_lose_less():
    gradient, lost = random((64, 64), 0), []
    for num_bits in (1, 2, 4):
        compressor = GradientQuantizer(num_bits)
        assert gradient.nbytes / compressor.compress("w", gradient).nbytes > 24 / num_bits
        lost.append((compressor.state()["w"].norm() / gradient.norm()).item() ** 2)
    # Of numbers that are normally distributed, the best grids of 2, 4 and 16 even steps lose 0.363, 0.119 and 0.0115
    # (Max, "Quantizing for minimum distortion", 1960); magnitudes are rounded, which costs a little.
    assert lost == pytest.approx([0.363, 0.119, 0.0115], rel=0.1)


@pytest.mark.parametrize("num_bits", GRIDS)
def test_each_code_is_packed_and_stands_for_its_step(num_bits):
    num_codes = 2**num_bits
    packed = torch.zeros(-(-num_codes * num_bits // 8), dtype=torch.uint8)
    for code in range(num_codes):
        packed[code * num_bits // 8] |= code << (code * num_bits % 8)
    one = torch.tensor([255 - 24 * 4, 255 - 24 * 4 + 4] + [255 - 24 * 4] * (num_codes // 2), dtype=torch.uint8)
    arrived = decompress(Compressed(packed, one, (2, num_codes // 2), num_bits)).flatten()
    expected = [
        (code - (num_codes - 1) / 2) * GRIDS[num_bits] * (1 + (code >= num_codes // 2)) for code in range(num_codes)
    ]
    assert arrived.tolist() == pytest.approx(expected)


def test_zeros_arrive_as_zeros():
    compressor = GradientQuantizer(1)
    for shape in ((), (0,), (5,), (3, 256), (0, 4)):
        gradient = torch.zeros(shape)
        assert torch.equal(decompress(compressor.compress(str(shape), gradient)), gradient)


@pytest.mark.parametrize("wrong", [float("inf"), float("-inf"), float("nan")])
def test_a_gradient_that_is_not_finite_is_refused_and_forgotten(wrong):
    some, other = GradientQuantizer(1), GradientQuantizer(1)
    for compressor in (some, other):
        compressor.compress("w", random((9,), 0))
    with pytest.raises(InvalidRequest, match="not finite"):
        some.compress("w", torch.tensor([wrong] + [1.0] * 8))
    again = [decompress(compressor.compress("w", random((9,), 1))) for compressor in (some, other)]
    assert torch.equal(*again)


def test_a_step_that_is_done_again_loses_the_same_again():
    compressor = GradientQuantizer(1)
    compressor.compress("w", random((9,), 0))
    before = compressor.state()
    first = decompress(compressor.compress("w", random((9,), 1)))
    compressor.compress("v", random((9,), 2))
    compressor.load_state(before)
    assert torch.equal(decompress(compressor.compress("w", random((9,), 1))), first)
    assert compressor.state().keys() == {"w"}


def test_names_are_apart_and_can_be_forgotten():
    compressor = GradientQuantizer(1)
    first = decompress(compressor.compress("w", random((9,), 0)))
    assert torch.equal(decompress(compressor.compress("v", random((9,), 0))), first)
    assert not torch.equal(decompress(compressor.compress("w", random((9,), 0))), first)
    with pytest.raises(InvalidRequest, match="forget"):
        compressor.compress("w", torch.zeros(8))
    compressor.forget("w")
    compressor.forget("never seen")
    assert torch.equal(decompress(compressor.compress("w", random((9,), 0))), first)


@pytest.mark.parametrize(
    "small",
    [
        Compressed(torch.zeros(1, dtype=torch.uint8), torch.ones(10, dtype=torch.uint8), (9,), 1),
        Compressed(torch.zeros(2, dtype=torch.uint8), torch.ones(2, dtype=torch.uint8), (9,), 1),
        Compressed(torch.zeros(2, dtype=torch.int8), torch.ones(10, dtype=torch.uint8), (9,), 1),
        Compressed(torch.zeros(2, dtype=torch.uint8), torch.ones(10), (9,), 1),
    ],
)
def test_what_is_no_compressed_gradient_is_refused(small):
    with pytest.raises(WireError):
        decompress(small)


# --- Rows in 8 bits ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
def test_rows_that_8_bits_cannot_say_are_refused(wrong):
    with pytest.raises(InvalidRequest, match=r"inf|finite"):
        pack_rows(torch.tensor([[1.0, wrong]]))


@given(st.integers(0, 5), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_rows_in_8_bits_are_close_and_do_not_disturb_each_other(num_rows, width, seed):
    rows = random((num_rows, width), seed) * torch.logspace(-6, 6, max(num_rows, 1))[:num_rows, None]
    arrived = unpack_rows(pack_rows(rows), torch.float32)
    assert ((arrived - rows).abs() <= rows.abs().amax(-1, keepdim=True) / 254 * 1.0001).all()


@given(
    st.integers(0, 5), st.integers(1, 40), st.integers(0, 2**32 - 1), st.sampled_from([torch.float32, torch.bfloat16])
)
def test_a_packed_row_can_be_moved_by_itself(num_rows, width, seed, dtype):
    rows = random((num_rows, width), seed, dtype)
    packed = pack_rows(rows)
    assert (packed.dtype, packed.shape) == (torch.uint8, (num_rows, width + 4))
    order = torch.randperm(num_rows)
    arrived = unpack_rows(packed[order], torch.float32)
    exact = rows.float()[order]
    assert ((arrived - exact).abs() <= exact.abs().amax(-1, keepdim=True) / 254 * 1.001).all()
    assert unpack_rows(packed, dtype).dtype == dtype


@pytest.mark.parametrize(
    "packed",
    [
        torch.zeros(2, 8),
        torch.zeros(8, dtype=torch.uint8),
        torch.zeros(2, 3, dtype=torch.uint8),
        torch.full((2, 8), 255, dtype=torch.uint8),
        torch.cat([torch.zeros(1, 4, dtype=torch.uint8), torch.tensor([[-1.0]]).view(torch.uint8)], -1),
    ],
)
def test_what_is_no_packed_row_is_refused(packed):
    with pytest.raises(WireError):
        unpack_rows(packed, torch.float32)
