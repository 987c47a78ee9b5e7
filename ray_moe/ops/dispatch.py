"""Grouping the tokens of a batch by the host that will compute them, and putting the results together.

Pure array mathematics on the CPU: no Ray, no transport, no retry (that is `runtime/moe_layer.py`, which calls this
once per layer and batch, so it is on the hot path: numpy, no Python loop over more than a handful of rows).

Shape legend: T tokens, K experts per token, N = T*K slots (slot s is choice s % K of token s // K), E experts,
D model width, t tokens and n rows of one host.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

NOWHERE = -1
"""Owner of an index that goes nowhere: the sentinel ("no expert")."""

FEW_SLOTS = 32
"""Up to here a Python loop groups the slots faster than numpy does (5 against 21 microseconds for one)."""

_BLOCK_BYTES = 256 * 1024
"""Of the outputs that are summed together: a core's own cache holds them while the next choice is added."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

FEW_HOSTS, MANY_ROWS = 8, 512
"""With so few hosts, or so many rows for each, the tokens of each are looked up by themselves: that costs some numpy
calls and T for each host, and together it costs a sort of all rows."""

FEW_TO_SORT = 4096
"""Slots up to which numpy sorts them in less time than it takes to have a GPU do it (some 0.1 ms)."""

FEW_TOKENS = 64
"""Where no more are in a batch, and a host gets at least as many rows, all go there: to find out which it needs costs
more than to send the others, and they are never more than the rows that come back."""

BITS_16 = 2**15
"""Keys below this fit in 16 bits."""

Ints = npt.NDArray[np.int64]

Tokens: TypeAlias = tuple[Ints | None, npt.NDArray[np.int32] | None]
"""`HostShare.gather` and `.token`."""


@dataclass(frozen=True, slots=True)
class HostShare:
    """The rows of a batch that one host computes, each of its tokens named once."""

    host: int
    """Number of the host, as in `owner`."""
    slot: Ints
    """[n] the slot that each row answers; rows are grouped by expert, slots ascending within one."""
    gather: Ints | None
    """[t] ascending tokens that go to this host; None when all T do, and perhaps some that it has no use for."""
    token: npt.NDArray[np.int32] | None
    """[n] position among the t tokens of each row; None when row r is token r."""
    experts: list[int]
    """Experts touched, ascending."""
    counts: list[int]
    """Rows of each."""
    placed: torch.Tensor | None = None
    """[n] `slot` on the device of the batch, where the split was made there (`DeviceOrder`)."""


def split_by_host(
    index: Ints, owner: Ints, top_k: int, slot: Ints | None = None, host: Ints | None = None
) -> list[HostShare]:
    """Group slots by the host that computes them, then by expert.

    Args:
        index: [N] expert of each slot, or [m] expert of each of the slots in `slot`; the sentinel is E.
        owner: [E + 1] host number of each expert; `NOWHERE` drops the slot (the sentinel always does).
        top_k: K.
        slot: [m] ascending slots to place; None for all N.
        host: host number of each slot, where experts have replicas (see `spread`); None to go by `owner`.

    Returns: one share per host that gets rows, in host order. Slots that go nowhere are in none of them.
    """
    if len(index) <= FEW_SLOTS:
        return _split_few(index, owner, top_k, slot, host)
    num_tokens = len(index) // top_k if slot is None else None
    order, experts, counts, homes = (
        _order_by_owner(index, owner) if host is None else _order_by_host(index, host, len(owner))
    )
    if not len(order):
        return []
    slot = order if slot is None else slot[order]
    host_starts = _starts(homes)
    firsts = [*host_starts.tolist(), len(homes)]
    ends = [0, *np.cumsum(counts).tolist()]
    begins = [ends[first] for first in firsts]
    token = slot // top_k
    if len(host_starts) > max(FEW_HOSTS, len(order) // MANY_ROWS) and int(homes[-1]) < BITS_16:
        tokens = _tokens_of_hosts(token, begins, num_tokens)
    else:
        tokens = [_tokens_once(token[begin:end], num_tokens) for begin, end in itertools.pairwise(begins)]
    names, numbers = experts.tolist(), counts.tolist()
    return [
        HostShare(home, slot[begin:end], gather, position, names[first:last], numbers[first:last])
        for home, begin, end, (gather, position), first, last in zip(
            homes[host_starts].tolist(), begins, begins[1:], tokens, firsts, firsts[1:], strict=False
        )
    ]


Order: TypeAlias = tuple[Ints, Ints, Ints, Ints]
"""[n] what sorts those slots that go somewhere by host and then by expert; of each such group: expert, rows, host."""


def _order_by_owner(index: Ints, owner: Ints) -> Order:
    """Where all slots of an expert go to one host: the experts are sorted, and the slots only by them."""
    count = np.bincount(index, minlength=len(owner))
    experts = (count * (owner >= 0)).nonzero()[0]
    homes = owner[experts]
    by_home = np.argsort(homes, kind="stable")
    experts, homes = experts[by_home], homes[by_home]
    counts = count[experts]
    rank = np.full(len(owner), len(experts), dtype=np.int16 if len(owner) < BITS_16 else np.int64)
    rank[experts] = np.arange(len(experts))
    order = np.argsort(rank[index], kind="stable")[: int(counts.sum())]
    return order, experts, counts, homes


def _order_by_host(index: Ints, host: Ints, num_keys: int) -> Order:
    """Where each slot has its own host. Args: num_keys: above all of `index`."""
    key, largest_host = host * num_keys + index, int(host.max(initial=0))
    if (largest_host + 1) * num_keys < BITS_16:
        order = _sorted(key)
    else:  # the last key first
        order = _sorted(index) if num_keys < BITS_16 else np.argsort(index, kind="stable")
        order = order[_sorted(host[order]) if largest_host < BITS_16 else np.argsort(host[order], kind="stable")]
    if len(order) and host.min() < 0:
        order = order[np.count_nonzero(host < 0) :]  # negative keys come first
    key = key[order]
    starts = _starts(key)
    groups = key[starts]
    homes = groups // num_keys
    return order, groups - homes * num_keys, np.diff(starts, append=len(key)), homes


def _sorted(key: Ints) -> Ints:
    """What sorts keys below `BITS_16`, keeping the order of equal ones.

    On 16 bits numpy's stable sort is a radix sort: at 32k slots ten times faster than on 64.
    """
    return np.argsort(key.astype(np.int16), kind="stable")


def _starts(values: Ints) -> Ints:
    """Where each run of equal values begins."""
    is_start = np.empty(len(values), dtype=bool)
    is_start[:1] = True
    np.not_equal(values[1:], values[:-1], out=is_start[1:])
    return is_start.nonzero()[0]  # np.diff and np.flatnonzero take four times as long for a few dozen


def spread(index: Ints, host: Ints, rows: Ints) -> Ints:
    """Give each slot a replica of its expert, in the numbers that a split has decided.

    Args:
        index: [m] expert of each slot; the sentinel, which goes nowhere, is above all experts.
        host: [R] host number of each replica, grouped by expert, experts ascending.
        rows: [R] slots of each replica; those of an expert add up to its slots.

    Returns: [m] host number of each slot. A replica gets neighbouring slots, so that a token's choices meet.
    """
    # 16 bits: see `split_by_host`.
    order = np.argsort(index.astype(np.int16) if int(index.max(initial=0)) < 2**15 else index, kind="stable")
    of_slot = np.full(len(index), NOWHERE, dtype=np.int64)
    of_slot[order[: int(rows.sum())]] = np.repeat(host, rows)
    return of_slot


def cut(share: HostShare, top_k: int, max_rows: int) -> list[HostShare]:
    """The share in pieces of at most `max_rows` rows, so that a host answers now and then however large a batch is.

    An expert's rows are cut at multiples of `max_rows` and each piece has at most one cut of an expert, so the slots
    that go together stay the same when some pieces are sent again, to whichever host.
    """
    if len(share.slot) <= max_rows:
        return [share]
    pieces: list[HostShare] = []
    begin, end = 0, 0
    experts: list[int] = []
    counts: list[int] = []

    def close() -> None:
        if counts:
            rows = share.slot[begin:end]
            gather, token = _tokens_once(rows // top_k, None)
            pieces.append(HostShare(share.host, rows, gather, token, list(experts), list(counts)))
        experts.clear()
        counts.clear()

    for expert, count in zip(share.experts, share.counts, strict=True):
        for offset in range(0, count, max_rows):
            size = min(max_rows, count - offset)
            if end - begin + size > max_rows:
                close()
                begin = end
            experts.append(expert)
            counts.append(size)
            end += size
    close()
    return pieces


def _split_few(index: Ints, owner: Ints, top_k: int, slot: Ints | None, host: Ints | None) -> list[HostShare]:
    """The same for a handful of slots (decoding), where one numpy call costs more than the loop."""
    num_tokens = len(index) // top_k if slot is None else None
    expert_of = index.tolist()
    host_of = (owner[index] if host is None else host).tolist()
    slot_of = range(len(expert_of)) if slot is None else slot.tolist()
    rows_of: dict[int, list[tuple[int, int]]] = {}
    for home, expert, number in sorted(zip(host_of, expert_of, slot_of, strict=True)):
        if home != NOWHERE:
            rows_of.setdefault(home, []).append((expert, number))
    shares = []
    for home, rows in rows_of.items():
        counts: dict[int, int] = {}
        for expert, _ in rows:
            counts[expert] = counts.get(expert, 0) + 1
        token = [number // top_k for _, number in rows]
        distinct = list(range(len(index) // top_k)) if _gets_all(len(rows), num_tokens) else sorted(set(token))
        position = {number: place for place, number in enumerate(distinct)}
        shares.append(
            HostShare(
                host=home,
                slot=np.array([number for _, number in rows]),
                gather=None if len(distinct) == num_tokens else np.array(distinct),
                token=None if token == distinct else np.array([position[number] for number in token], dtype=np.int32),
                experts=list(counts),
                counts=list(counts.values()),
            )
        )
    return shares


def _gets_all(num_rows: int, num_tokens: int | None) -> bool:
    """Whether a host of so many rows is sent all of a batch's tokens (None: of a part of its slots)."""
    return num_tokens is not None and num_tokens <= FEW_TOKENS and num_rows >= num_tokens


def _tokens_once(token: Ints, num_tokens: int | None) -> Tokens:
    """From the token of each row [n]: the tokens to send (None: all `num_tokens`) and each row's place among them."""
    num_rows = len(token)
    if _gets_all(num_rows, num_tokens):
        in_order = num_rows == num_tokens and bool((token == np.arange(num_rows)).all())
        return None, None if in_order else token.astype(np.int32)
    last = int(token.max())
    present = np.zeros(last + 1, dtype=bool)
    present[token] = True
    distinct = present.nonzero()[0]
    every = len(distinct) == num_tokens
    position = token if every else (np.cumsum(present) - 1)[token]
    in_order = num_rows == len(distinct) and bool((position[1:] - position[:-1] == 1).all())
    return (None if every else distinct), (None if in_order else position.astype(np.int32))


def _tokens_of_hosts(token: Ints, begins: list[int], num_tokens: int | None) -> list[Tokens]:
    """`_tokens_once` for many hosts together: a dozen numpy calls for all of them and not for each.

    Args:
        token: [m] of each row, those of one host after those of another.
        begins: where each host's rows begin, and the end of the last.
    """
    bound = np.array(begins)
    number = bound[1:] - bound[:-1]
    host = np.repeat(np.arange(len(number)), number)
    span = int(token.max()) + 1
    order = _sorted(token) if span <= BITS_16 else np.argsort(token, kind="stable")
    order = order[_sorted(host[order])]
    by_host, by_token = host[order], token[order]
    is_first = np.empty(len(token), dtype=bool)
    is_first[0] = True
    np.not_equal(by_token[1:], by_token[:-1], out=is_first[1:])
    is_first[bound[:-1]] = True
    distinct = by_token[is_first]
    rank = np.cumsum(is_first)
    ends = rank[bound[1:] - 1]
    rank -= 1
    rank -= np.concatenate([[0], ends[:-1]])[by_host]
    position = np.empty(len(token), dtype=np.int32)
    position[order] = rank
    is_in_place = np.logical_and.reduceat(position == np.arange(len(token)) - bound[host], bound[:-1])
    result: list[Tokens] = []
    first = 0
    for begin, end, last, in_place in zip(begins, begins[1:], ends.tolist(), is_in_place.tolist(), strict=False):
        if _gets_all(end - begin, num_tokens):
            result.append(_tokens_once(token[begin:end], num_tokens))
            first = last
            continue
        gather = None if last - first == num_tokens else distinct[first:last]
        result.append((gather, None if in_place and end - begin == last - first else position[begin:end]))
        first = last
    return result


def combine(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted sum over the K choices of each token, in `transformers`' own order and dtypes.

    Args:
        rows: [N, D] unweighted outputs by slot (zeros where a slot went nowhere).
        weight: [T, K]; kept in its own dtype (some families route in float32), which promotes the sum.

    Returns: [T, D] in the dtype of `rows`. Bit-equal to `transformers`' grouped and batched implementations,
    which multiply, reshape and sum in the same order (transformers 5.23, integrations/moe.py).
    """
    num_tokens, top_k = weight.shape
    width = rows.shape[-1]
    block = max(1, _BLOCK_BYTES // max(1, width * rows.itemsize))
    if (
        num_tokens <= block
        or not rows.is_cpu
        or (torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad))
    ):
        return _combine(rows, weight).to(rows.dtype)
    out = rows.new_empty(num_tokens, width)
    dtype = torch.promote_types(rows.dtype, weight.dtype)
    in_turn = top_k <= 2 and dtype == rows.dtype and dtype in (torch.float32, torch.float64)  # the same bits, sooner
    each, spare = rows.reshape(num_tokens, top_k, width), rows.new_empty(block, width)
    for begin in range(0, num_tokens, block):
        end = min(begin + block, num_tokens)
        sums, factor = out[begin:end], weight[begin:end]
        if in_turn:
            torch.mul(each[begin:end, 0], factor[:, :1], out=sums)
            if top_k == 2:
                sums += torch.mul(each[begin:end, 1], factor[:, 1:], out=spare[: end - begin])
        else:
            sums.copy_(_combine(rows[begin * top_k : end * top_k], factor))
    return out


def _combine(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    num_tokens, top_k = weight.shape
    return (rows * weight.reshape(-1, 1)).view(num_tokens, top_k, rows.shape[-1]).sum(dim=1)


class DeviceOrder:
    """What sorts the slots of a layer where they lie, on a GPU: by host, and then by expert.

    Only for layers whose experts have one host each. There a split on the CPU would cost more than all the products.
    """

    def __init__(self, owner: Ints, device: torch.device) -> None:
        """Args: owner: as of `split_by_host`."""
        num_experts = len(owner) - 1
        experts = np.flatnonzero(owner[:-1] != NOWHERE)
        self._experts = experts[np.argsort(owner[experts], kind="stable")]
        of_expert = owner[self._experts]
        starts = _starts(of_expert).tolist() if len(of_expert) else []
        self._blocks = list(zip(of_expert[starts].tolist(), starts, [*starts[1:], len(of_expert)], strict=True))
        rank = np.full(num_experts + 1, num_experts, dtype=np.int16 if num_experts < BITS_16 else np.int64)
        rank[self._experts] = np.arange(len(self._experts))
        self._rank, self._rank_there = rank, torch.from_numpy(rank).to(device)

    def sort(self, index: torch.Tensor, slots: Ints) -> tuple[torch.Tensor, Ints]:
        """[N] expert of each slot -> [N] slots by host, then by expert, ascending within one; behind them those that go
        nowhere. There and here.

        Args:
            index: [N] on the device.
            slots: the same, on the CPU: there a few are sorted sooner than a GPU is told to.
        """
        if len(slots) <= FEW_TO_SORT:
            here = np.argsort(self._rank[slots], kind="stable")
            return torch.from_numpy(here).to(index.device), here
        there = torch.sort(self._rank_there[index], stable=True).indices
        return there, there.cpu().numpy()

    def split(self, tokens_per_expert: Ints, order: torch.Tensor, slots: Ints) -> list[HostShare]:
        """The shares of a batch, whose rows follow one another in `order`. All tokens go to each host.

        Args:
            tokens_per_expert: [E] slots of each.
            order: as `sort` made it.
            slots: the same, on the CPU.
        """
        counts = tokens_per_expert[self._experts]
        ends = np.concatenate([[0], np.cumsum(counts)]).tolist()
        shares = []
        for host, first, last in self._blocks:
            begin, end = ends[first], ends[last]
            if begin == end:
                continue
            numbers = counts[first:last]
            touched = numbers.nonzero()[0]
            experts = self._experts[first:last][touched].tolist()
            mine = slots[begin:end]
            shares.append(HostShare(host, mine, None, None, experts, numbers[touched].tolist(), order[begin:end]))
        return shares


def put_rows(rows: torch.Tensor, places: Ints | torch.Tensor, values: torch.Tensor) -> None:
    """``rows[places] = values``, without gradients. On the CPU by numpy, in a third of the time.

    Raises: `RuntimeError` when they differ in dtype or width.
    """
    if isinstance(places, torch.Tensor):
        rows.index_copy_(0, places, values)
    elif rows.is_cpu and values.is_cpu and (rows.dtype, rows.shape[1:]) == (values.dtype, values.shape[1:]):
        _bits(rows)[places] = _bits(values)
    else:
        rows.index_copy_(0, torch.from_numpy(places).to(rows.device), values.to(rows.device))


def _bits(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """The numbers of [n, D], as integers where numpy does not have their dtype."""
    known = tensor.dtype in (torch.float32, torch.float64, torch.float16)
    return (tensor if known else tensor.view(_INTEGERS[tensor.itemsize])).numpy()


def sum_parts(rows: torch.Tensor, num_parts: int) -> torch.Tensor:
    """[N·t, D] -> [N, D]: what an expert puts out is what its t parts do together; rows of one slot are neighbours.

    Weighted only then, so that the gradient of a weight is rounded once, as where nothing is cut.
    """
    if num_parts == 1:
        return rows
    return rows.view(len(rows) // num_parts, num_parts, rows.shape[-1]).sum(1)
