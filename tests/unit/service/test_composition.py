"""The composition root, as far as it goes without a cluster."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayTaskError

from ray_moe.config import Config
from ray_moe.errors import InvalidCheckpoint, RayMoEError
from ray_moe.service import composition
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


def test_a_controller_that_stays_away_is_told_of_once_and_when_it_is_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(composition, "WATCH_EVERY_S", 0.01)
    monkeypatch.setattr(composition, "SILENT_S", 0.1)
    service = Service(Config())
    controller: Any = Unanswered(monkeypatch, ActorDiedError())
    service._controller = controller
    threading.Timer(0.5, lambda: setattr(controller, "error", task_error(RayMoEError("not whole")))).start()
    threading.Timer(0.8, service._stopped.set).start()
    service.wait()
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [level for level, _ in said] == ["ERROR", "WARNING"]
    assert "start the service again" in said[0][1]
    assert said[1][1] == "the controller answers again"


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
