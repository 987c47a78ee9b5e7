"""How far another version of an expert is from the current one: rows of both for the same tokens, compared beside.

What is compared is computed in a thread of its own, and left out when that is behind, so that no request waits for it
or fails by it. Watches what a dispatcher is asked for. Made by the router.

Shape legend: T tokens, N slots, D model width, t tokens that are compared.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from ray_moe.errors import RayMoEError
from ray_moe.ops.dispatch import Ints
from ray_moe.policy.versions import Canary, Drift
from ray_moe.types import LayerPath

logger = logging.getLogger(__name__)

MAX_PENDING = 8
"""Batches that may wait to be compared."""

Rows = Callable[[LayerPath, int, torch.Tensor, int], torch.Tensor]
"""Rows [t, D] of an expert of a layer for tokens [t, D], by a version of the weights."""


class DriftMeter:
    """Of one canary. Thread-safe."""

    def __init__(self, rows: Rows, canary: Canary, base: int, seed: int | None = None) -> None:
        """Args: base: the version that the canary is compared with."""
        self.canary = canary
        self._rows = rows
        self._base = base
        request = canary.request
        is_shadow = request.mode == "shadow"
        self._watched, self._share = (base, request.share) if is_shadow else (canary.number, 1.0)
        self._random = np.random.default_rng(seed)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="drift")
        self._lock = threading.Lock()
        self._num_pending = 0
        self._drift = Drift(canary.number)

    @property
    def drift(self) -> Drift:
        """So far."""
        with self._lock:
            return self._drift

    def see(self, layer: LayerPath, hidden: torch.Tensor, slots: Ints, version: int) -> None:
        """Tokens [T, D] go to the experts `slots` [N] of a layer, computed by `version`."""
        request = self.canary.request
        if layer != request.layer or version != self._watched:
            return
        tokens = np.flatnonzero(slots == request.expert) // (len(slots) // max(1, len(hidden)) or 1)
        if self._share < 1:
            tokens = tokens[self._random.random(len(tokens)) < self._share]
        with self._lock:
            if not len(tokens) or self._num_pending >= MAX_PENDING:
                return
            self._num_pending += 1
        try:
            self._thread.submit(self._compare, hidden.detach()[torch.from_numpy(tokens).to(hidden.device)])
        except RuntimeError:  # closed
            return

    def _compare(self, hidden: torch.Tensor) -> None:
        request = self.canary.request
        try:
            with torch.inference_mode():
                old, new = (
                    self._rows(request.layer, request.expert, hidden, version).double()
                    for version in (self._base, self.canary.number)
                )
                difference, size = float((new - old).square().sum()), float(old.square().sum())
        except RayMoEError as error:
            logger.warning("rows of version %d could not be compared: %s", self.canary.number, error)
            return
        finally:
            with self._lock:
                self._num_pending -= 1
        with self._lock:
            self._drift = self._drift.plus(Drift(self.canary.number, len(hidden), difference, size))

    def close(self) -> None:
        """Compare nothing more."""
        self._thread.shutdown(wait=False, cancel_futures=True)
