"""The composition root, as far as it goes without a cluster."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayTaskError

from ray_moe.config import Config
from ray_moe.errors import InvalidCheckpoint, RayMoEError
from ray_moe.service.composition import Service


class Unanswered:
    """A controller whose `status` ends with `error`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        self.status = self
        self.error = error
        monkeypatch.setattr(ray, "get", self.get)

    def remote(self) -> None: ...

    def get(self, *_: Any, **__: Any) -> None:
        raise self.error


def ask(monkeypatch: pytest.MonkeyPatch, error: Exception) -> object:
    service = Service(Config())
    service._controller = Unanswered(monkeypatch, error)
    return service._ask()


def task_error(cause: Exception) -> Exception:
    """What `ray.get` raises when a method raised `cause`."""
    error: Any = RayTaskError("status", "Traceback ...", cause)
    raised: Exception = pickle.loads(pickle.dumps(error)).as_instanceof_cause()
    return raised


def test_an_error_of_the_controller_is_the_error_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidCheckpoint, match=r"^no shard 3$") as caught:
        ask(monkeypatch, task_error(InvalidCheckpoint("no shard 3")))
    assert type(caught.value) is InvalidCheckpoint
    with pytest.raises(RayMoEError, match=r"^the controller failed: ZeroDivisionError: one$"):
        ask(monkeypatch, task_error(ZeroDivisionError("one\ntwo")))


@pytest.mark.parametrize("error", [ActorUnavailableError("restarting", None), GetTimeoutError("busy")])
def test_a_controller_on_its_way_is_asked_again(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    assert ask(monkeypatch, error) is None
