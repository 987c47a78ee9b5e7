"""What the tests of training stand on: workers in threads."""

from __future__ import annotations

import threading

import pytest

from tests.training_cluster import together


def test_a_worker_that_hangs_fails_the_test_and_one_that_raises_says_why() -> None:
    forever = threading.Event()

    def do(worker: str) -> str:
        if worker == "hangs":
            forever.wait()
        if worker == "raises":
            raise KeyError("on purpose")
        return worker

    assert together(["a", "b"], do) == ["a", "b"]
    with pytest.raises(TimeoutError, match=r"workers \[1\] of 2 have not ended after 0\.05 s"):
        together(["a", "hangs"], do, timeout_s=0.05)
    with pytest.raises(KeyError, match="on purpose"):
        together(["hangs", "raises"], do, timeout_s=0.05)
    forever.set()
