"""What can be set about dispatching. Plain values; the router makes them from the user's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CombineAt = Literal["router", "host"]


@dataclass(frozen=True, slots=True)
class DispatchSettings:
    """How the dispatcher combines, how long it waits, and when it asks somebody else."""

    combine: CombineAt = "router"
    """``router``: unweighted rows come back and are summed in `transformers`' own order (bit-equal).
    ``host``: weighted partial sums come back; less traffic, other rounding in bf16."""
    call_timeout_s: float = 30.0
    """A host that has answered nothing for so long is taken for lost."""
    recovery_timeout_s: float = 60.0
    """How long rows wait for a host that can compute them before the batch fails with `Unavailable`."""
    hedge: bool = True
    """Whether a call that is overdue is sent to another replica as well."""
    hedge_factor: float = 3.0
    """A call is overdue after this many times what its host needs as a rule."""
    hedge_min_s: float = 0.05
    """But not before so long: what is faster than this is not worth computing twice."""
    num_parts: int = 1
    """Parts that each expert is cut into (`policy/parts.py`): hosts and tables know these."""
    check_finite: bool = True
    """Whether NaN and infinity in the experts' outputs, of tokens without, are computed again elsewhere."""
