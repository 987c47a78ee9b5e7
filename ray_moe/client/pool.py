"""Which router a call goes to: who there is, how busy each is, and which of them rest.

Routers are *given* to the client, or *listed* by one of the service's. A listed one takes calls once it has answered a
question itself, so that no call waits for an address that leads nowhere. One that fails rests, longer each time, and is
asked again before it takes calls. Those that were given take calls while no listed one can.

No I/O, no clock and no chance: times (seconds, monotonic) and numbers drawn from 0..1 are passed in. Not thread-safe.
Used by `routers.py`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

from ray_moe.errors import Cancelled, DeadlineExceeded, Overloaded, RayMoEError, Unavailable
from ray_moe.types import RouterAddress

LIST_EVERY_S: Final = 10.0
"""A client that is in use asks so often who there is."""
LIST_ALONE_S: Final = 1.0
"""And so often while it knows of one router only, whose end would leave it without any."""
LIST_AGAIN_S: Final = 1.0
"""And after a failure so soon."""
REFUSED_S: Final = 300.0
"""A service that does not tell, or not to this caller, is asked again after this time."""
FIRST_REST_S: Final = 0.5
LONGEST_REST_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Question:
    """ListRouters, to be put to a router: `Pool.heard` or `Pool.unheard` takes what comes of it."""

    target: str
    for_list: bool
    """To learn who there is; otherwise only whether this one answers."""


@dataclass(slots=True)
class _Router:
    is_given: bool = False
    router_id: str = ""
    """As it is listed; empty when it is not."""
    is_proven: bool = False
    """Whether it has answered since it was listed, and since it failed."""
    num_calls: int = 0
    num_questions: int = 0
    num_failures: int = 0
    """In a row."""
    failed_s: float = -math.inf
    rests_until_s: float = -math.inf
    turn: int = 0
    """When it was chosen last, as a number that grows."""


class Pool:
    """The routers of one service, as one client knows them."""

    def __init__(self, given: Iterable[str], *, discover: bool = True) -> None:
        """Args:
        given: gRPC targets, at least one.
        discover: whether to ask for more.
        """
        self._routers = {target: _Router(is_given=True) for target in given}
        self._turn = 0
        self._list_due_s = -math.inf if discover else math.inf
        self._listed_s = -math.inf
        """When the list was last asked for."""
        self._is_listing = False
        self._discover = discover

    # --- calls -----------------------------------------------------------------------------------------------
    def pick(self, now_s: float, avoid: Collection[str] = ()) -> str:
        """The router for a call: of those that can take one the least busy, in turn; counts it until `release`.

        Those in `avoid` only when there is no other. When all of them rest it is the one whose rest ends first.
        """
        target = self._best(now_s, avoid)
        router = self._routers[target]
        self._turn += 1
        router.turn = self._turn
        router.num_calls += 1
        return target

    def release(self, target: str) -> None:
        """A call that was given to `target` has ended."""
        self._routers[target].num_calls -= 1

    def has_other(self, now_s: float, avoid: Collection[str]) -> bool:
        """Whether a router can take a call that is not in `avoid`."""
        return bool(self._able(now_s, avoid))

    def answered(self, target: str, since_s: float) -> None:
        """A call that began at `since_s` went well: the router needs no rest, unless it has failed in the meantime."""
        router = self._routers[target]
        if since_s >= router.failed_s:
            router.is_proven, router.num_failures, router.rests_until_s = True, 0, -math.inf

    def failed(self, target: str, now_s: float, chance: float, retry_after_s: float | None = None) -> None:
        """A router could not be reached, or had no room: it rests, at least for `retry_after_s`."""
        router = self._routers[target]
        router.is_proven, router.failed_s = False, now_s
        if now_s >= router.rests_until_s:  # what else fails by the same accident says nothing new
            router.num_failures += 1
            rest_s = min(LONGEST_REST_S, FIRST_REST_S * 2.0 ** min(router.num_failures - 1, 16))
            router.rests_until_s = now_s + rest_s * (1 + chance) / 2
        router.rests_until_s = max(router.rests_until_s, now_s + (retry_after_s or 0.0))
        if self._discover:
            self._list_due_s = min(self._list_due_s, self._listed_s + LIST_AGAIN_S)

    def _best(self, now_s: float, avoid: Collection[str] = ()) -> str:
        able = self._able(now_s, avoid) or self._able(now_s)
        routers = self._routers
        if able:
            return min(able, key=lambda target: (routers[target].num_calls, routers[target].turn))
        present = [target for target, router in routers.items() if router.is_given or router.router_id]
        return min(present, key=lambda target: (routers[target].rests_until_s, routers[target].turn))

    def _able(self, now_s: float, avoid: Collection[str] = ()) -> list[str]:
        rested = {t: r for t, r in self._routers.items() if r.rests_until_s <= now_s and t not in avoid}
        listed = [target for target, router in rested.items() if router.router_id and router.is_proven]
        return listed or [target for target, router in rested.items() if router.is_given]

    # --- who there is ----------------------------------------------------------------------------------------
    def questions(self, now_s: float) -> list[Question]:
        """What to ask now, each once."""
        due = []
        if now_s >= self._list_due_s and not self._is_listing:
            self._is_listing, self._listed_s = True, now_s
            due.append(Question(self._best(now_s), for_list=True))
        for target, router in self._routers.items():
            wants_proof = router.router_id and not router.is_proven and router.rests_until_s <= now_s
            if wants_proof and not router.num_questions and not (due and due[0].target == target):
                due.append(Question(target, for_list=False))
        for question in due:
            self._routers[question.target].num_questions += 1
        return due

    def heard(self, question: Question, routers: Iterable[RouterAddress], now_s: float, chance: float) -> None:
        """The answer to a question: those of the service's routers that this client may talk to."""
        asked = self._routers[question.target]
        asked.num_questions -= 1
        told = {router.grpc_address: router.router_id for router in routers if router.ready}
        if question.for_list:
            self._is_listing, self._list_due_s = False, now_s + (LIST_EVERY_S if len(told) > 1 else LIST_ALONE_S)
            self._list(told)
        if asked.router_id and told.get(question.target) == asked.router_id:
            self.answered(question.target, now_s)
        elif asked.router_id:  # it stops, or is another than was expected there
            self.failed(question.target, now_s, chance)

    def unheard(self, question: Question, error: RayMoEError, now_s: float, chance: float) -> None:
        """A question was not answered."""
        self._routers[question.target].num_questions -= 1
        is_refusal = not isinstance(error, Unavailable | DeadlineExceeded | Overloaded | Cancelled)
        if question.for_list:
            self._is_listing = False
            self._list_due_s = now_s + (REFUSED_S if is_refusal else LIST_AGAIN_S)
            if is_refusal:
                self._list({})
        if not (question.for_list and is_refusal):
            self.failed(question.target, now_s, chance, error.retry_after_s)

    def gone(self) -> list[str]:
        """Forgets the routers that are neither given nor listed any more, once their last call has ended."""
        gone = [
            target
            for target, router in self._routers.items()
            if not (router.is_given or router.router_id or router.num_calls or router.num_questions)
        ]
        for target in gone:
            del self._routers[target]
        return gone

    def _list(self, told: dict[str, str]) -> None:
        for target in told:
            self._routers.setdefault(target, _Router())
        for target, router in self._routers.items():
            router_id = told.get(target, "")
            if router_id != router.router_id:
                router.router_id, router.is_proven = router_id, False
