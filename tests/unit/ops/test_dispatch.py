import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_moe.ops import dispatch
from ray_moe.ops.dispatch import NOWHERE, DeviceOrder, combine, put_rows, split_by_host


@st.composite
def batches(draw):
    num_experts = draw(st.integers(1, 40))
    num_hosts = draw(st.integers(1, 5))
    top_k = draw(st.integers(1, min(4, num_experts)))
    num_tokens = draw(st.one_of(st.integers(0, 8), st.integers(0, 40)))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    index = rng.integers(0, num_experts + 1, size=num_tokens * top_k)
    owner = np.append(rng.integers(0, num_hosts, size=num_experts), NOWHERE)
    return index, owner, top_k


@given(batches())
def test_every_slot_goes_to_the_owner_of_its_expert_exactly_once(batch):
    index, owner, top_k = batch
    seen = []
    for share in split_by_host(index, owner, top_k):
        experts = np.repeat(share.experts, share.counts)
        assert (index[share.slot] == experts).all()
        assert (owner[experts] == share.host).all()
        assert share.experts == sorted(set(share.experts))
        seen.extend(share.slot.tolist())
    kept = np.flatnonzero(owner[index] != NOWHERE)
    assert sorted(seen) == kept.tolist()


@given(batches())
def test_each_token_is_sent_to_a_host_once_and_rows_find_it(batch):
    index, owner, top_k = batch
    num_tokens = len(index) // top_k
    for share in split_by_host(index, owner, top_k):
        sent = np.arange(num_tokens) if share.gather is None else share.gather
        assert len(np.unique(sent)) == len(sent)
        token_of_row = sent if share.token is None else sent[share.token]
        assert (token_of_row == share.slot // top_k).all()


@given(batches(), st.data())
def test_a_subset_of_slots_is_placed_as_in_the_whole(batch, data):
    index, owner, top_k = batch
    chosen = np.array(sorted(data.draw(st.sets(st.sampled_from(range(len(index))))) if len(index) else []), dtype=int)
    placed = [slot for share in split_by_host(index[chosen], owner, top_k, chosen) for slot in share.slot.tolist()]
    assert sorted(placed) == [slot for slot in chosen.tolist() if owner[index[slot]] != NOWHERE]


@pytest.mark.parametrize("few", [0, 2**20], ids=["there", "here"])
@given(batch=batches())
def test_a_split_on_a_device_gives_the_shares_of_one_on_the_cpu(few, batch):
    index, owner, top_k = batch
    order_of = DeviceOrder(owner, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "FEW_TO_SORT", few)
        order, slots = order_of.sort(torch.from_numpy(index), index)
    assert order.tolist() == slots.tolist()
    shares = order_of.split(np.bincount(index, minlength=len(owner))[:-1], order, slots)
    wanted = split_by_host(index, owner, top_k)
    begin = 0
    for share, other in zip(shares, wanted, strict=True):
        assert (share.host, share.experts, share.counts) == (other.host, other.experts, other.counts)
        assert share.placed is not None
        assert share.slot.tolist() == share.placed.tolist() == other.slot.tolist()
        assert share.slot.tolist() == slots[begin : begin + len(share.slot)].tolist()
        begin += len(share.slot)


def test_an_expert_without_owner_is_left_out():
    owner = np.array([0, NOWHERE, 1, NOWHERE])
    shares = split_by_host(np.array([0, 1, 2, 3]), owner, 2)
    assert [(share.host, share.slot.tolist()) for share in shares] == [(0, [0]), (1, [2])]


def test_many_hosts_and_experts_do_not_overflow_the_sort_key():
    owner = np.append(np.arange(300) % 200, NOWHERE)
    index = np.random.default_rng(0).permutation(300)
    placed = np.concatenate([share.slot for share in split_by_host(index, owner, 1)])
    assert sorted(placed.tolist()) == list(range(300))


@pytest.mark.parametrize("num_hosts", [40, 2**15 + 40])
@pytest.mark.parametrize("num_experts", [64, 2**15 + 64])
@pytest.mark.parametrize("is_part", [False, True])
def test_tokens_for_many_hosts_are_found_together_as_they_are_one_by_one(num_hosts, num_experts, is_part):
    rng = np.random.default_rng(0)
    index = rng.integers(num_experts - 64, num_experts + 1, size=600)
    host = np.where(index == num_experts, NOWHERE, rng.integers(num_hosts - 40, num_hosts, size=600))
    slot = np.flatnonzero(rng.random(600) < 0.5) if is_part else None
    owner = np.append(np.zeros(num_experts, dtype=np.int64), NOWHERE)
    index, host = (index, host) if slot is None else (index[slot], host[slot])
    together = split_by_host(index, owner, 4, slot, host)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "FEW_SLOTS", 10**9)
        one_by_one = split_by_host(index, owner, 4, slot, host)
    assert len(together) == 40
    assert [repr(share) for share in together] == [repr(share) for share in one_by_one]


@given(batches(), st.integers(1, 9))
def test_pieces_of_a_share_are_the_share(batch, max_rows):
    index, owner, top_k = batch
    for share in split_by_host(index, owner, top_k):
        pieces = dispatch.cut(share, top_k, max_rows)
        assert np.concatenate([piece.slot for piece in pieces]).tolist() == share.slot.tolist()
        for piece in pieces:
            assert len(piece.slot) == sum(piece.counts) <= max_rows or len(pieces) == 1
            assert (index[piece.slot] == np.repeat(piece.experts, piece.counts)).all()
            sent = np.arange(len(index) // top_k) if piece.gather is None else piece.gather
            token_of_row = sent if piece.token is None else sent[piece.token]
            assert (token_of_row == piece.slot // top_k).all()


@given(batches(), st.integers(1, 5), st.data())
def test_the_rows_that_go_together_stay_the_same_when_some_are_sent_again(batch, max_rows, data):
    index, owner, top_k = batch

    def groups(slot):
        """The rows of each expert in each piece."""
        found = set()
        for share in split_by_host(index if slot is None else index[slot], owner, top_k, slot):
            for piece in dispatch.cut(share, top_k, max_rows):
                parts = np.split(piece.slot, np.cumsum(piece.counts)[:-1])
                found |= {(expert, *part.tolist()) for expert, part in zip(piece.experts, parts, strict=True)}
        return found

    first = groups(None)
    again = data.draw(st.sets(st.sampled_from(sorted(first)))) if first else set()
    if again:
        owner = np.where(owner == NOWHERE, NOWHERE, 0)  # all of them move to one host
        assert groups(np.array(sorted(slot for _, *slots in again for slot in slots))) == again


@given(batches())
def test_few_slots_are_grouped_as_many_are(batch):
    index, owner, top_k = batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "FEW_SLOTS", 0)
        many = split_by_host(index, owner, top_k)
        patch.setattr(dispatch, "FEW_SLOTS", 10**9)
        few = split_by_host(index, owner, top_k)
    assert [repr(share) for share in many] == [repr(share) for share in few]


@given(batches(), st.data())
def test_replicas_get_the_slots_of_their_experts_in_the_numbers_given(batch, data):
    index, owner, _ = batch
    num_experts = len(owner) - 1
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    hosts_of = [rng.permutation(6)[: rng.integers(1, 4)] for _ in range(num_experts)]
    count = np.bincount(index, minlength=num_experts + 1)[:num_experts]
    rows_of = [rng.multinomial(n, np.ones(len(hosts)) / len(hosts)) for n, hosts in zip(count, hosts_of, strict=True)]
    host = dispatch.spread(index, np.concatenate(hosts_of), np.concatenate(rows_of))
    assert (host[index == num_experts] == NOWHERE).all()
    for expert, (hosts, rows) in enumerate(zip(hosts_of, rows_of, strict=True)):
        assert np.bincount(host[index == expert], minlength=6)[hosts].tolist() == rows.tolist()


@given(batches(), st.sampled_from([0, 10**9]), st.data())
def test_slots_are_grouped_by_the_hosts_they_were_given(batch, few_slots, data):
    index, owner, top_k = batch
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    host = np.where(owner[index] == NOWHERE, NOWHERE, rng.integers(0, 7, size=len(index)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "FEW_SLOTS", few_slots)
        shares = split_by_host(index, owner, top_k, host=host)
    assert [share.host for share in shares] == sorted(set(host[host != NOWHERE].tolist()))
    for share in shares:
        assert (host[share.slot] == share.host).all()
        assert (index[share.slot] == np.repeat(share.experts, share.counts)).all()
        sent = np.arange(len(index) // top_k) if share.gather is None else share.gather
        assert ((sent if share.token is None else sent[share.token]) == share.slot // top_k).all()
    assert sum(len(share.slot) for share in shares) == np.count_nonzero(host != NOWHERE)


@given(batches())
def test_combine_after_dispatch_is_the_identity_for_identity_experts(batch):
    index, owner, top_k = batch
    num_tokens = len(index) // top_k
    hidden = torch.arange(num_tokens * 3, dtype=torch.float64).reshape(num_tokens, 3)
    rows = torch.zeros(len(index), 3, dtype=torch.float64)
    for share in split_by_host(index, owner, top_k):
        rows[torch.from_numpy(share.slot)] = hidden[torch.from_numpy(share.slot // top_k)]
    kept = torch.from_numpy(owner[index] != NOWHERE).reshape(num_tokens, top_k).double()
    num_kept = kept.sum(1, keepdim=True)
    weight = kept / num_kept.clamp(min=1)
    torch.testing.assert_close(combine(rows, weight), hidden * (num_kept > 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, None])
@pytest.mark.parametrize("top_k", [1, 2, 8, 15, 16, 40])
def test_a_sum_has_the_bits_of_the_plain_expression_however_many_tokens_there_are(dtype, weight_dtype, top_k):
    num_tokens, width = 333, 1000
    generator = torch.Generator().manual_seed(top_k)
    rows = torch.randn(num_tokens * top_k, width, generator=generator).to(dtype)
    weight = torch.rand(num_tokens, top_k, generator=generator).to(weight_dtype or dtype)
    plain = (rows * weight.reshape(-1, 1)).view(num_tokens, top_k, width).sum(dim=1).to(dtype)
    assert torch.equal(combine(rows, weight), plain)
    assert torch.equal(combine(rows.clone().requires_grad_(), weight).detach(), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.uint8])
def test_rows_are_put_where_they_belong(dtype):
    rows = torch.zeros(50, 7, dtype=dtype)
    places = np.random.default_rng(0).permutation(50)[:20]
    values = torch.randint(1, 9, (20, 7)).to(dtype)
    put_rows(rows, places, values)
    for place in range(50):
        expected = values[places.tolist().index(place)] if place in places else torch.zeros(7, dtype=dtype)
        assert torch.equal(rows[place].float(), expected.float())


@pytest.mark.parametrize(("width", "dtype"), [(1, torch.float32), (6, torch.float32), (7, torch.bfloat16)])
def test_rows_of_another_kind_are_not_put(width, dtype):
    with pytest.raises(RuntimeError):
        put_rows(torch.zeros(5, 7), np.array([1, 3]), torch.ones(2, width, dtype=dtype))
