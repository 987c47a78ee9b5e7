"""Numbers of the parts that experts are cut into, where one expert is on several hosts (`experts.tensor`).

Hosts, placements and plans know parts alone, each as if it were an expert: of a layer with E experts in t parts they
see E·t. Part p of expert e has the number p·E + e. So whoever deals contiguous blocks of numbers to t hosts or more,
each of them at most E long, gives the parts of an expert to different hosts. Where nothing is cut the number of an
expert is its own.

Pure. Called wherever experts, which people and gates know, meet parts. How weights are cut is `ops/parts.py`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def parts_of(expert: int, num_experts: int, num_parts: int) -> list[int]:
    """The parts of an expert, in their order."""
    return [part * num_experts + expert for part in range(num_parts)]


def whole_of(number: int, num_experts: int) -> tuple[int, int]:
    """The opposite: the expert that a part is of, and which part of it."""
    part, expert = divmod(number, num_experts)
    return expert, part


def slots_in_parts(slots: Ints, num_experts: int, num_parts: int) -> Ints:
    """[N] expert of each slot -> [N·t] part of each: a slot becomes one for each part, side by side.

    "No expert" (E, `num_experts`) becomes "no part" (E·t).
    """
    parts: Ints = slots[:, None] + num_experts * np.arange(num_parts)
    parts[slots >= num_experts] = num_experts * num_parts
    return parts.reshape(-1)
