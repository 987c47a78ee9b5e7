"""What holds for every test: one compute thread, nothing from a network, and no Ray in the unit tests."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: several tests' processes share two cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
for _name in [name for name in os.environ if name.startswith(("RAY_MOE__", "RAY_ADDRESS"))]:
    del os.environ[_name]  # the user's own settings are no part of a test

hypothesis.settings.register_profile("shared machine", deadline=None)  # no test fails on a timing
hypothesis.settings.load_profile("shared machine")

_UNIT = Path(__file__).parent / "unit"


@pytest.fixture(autouse=True)
def _the_same_numbers_each_time() -> None:
    torch = sys.modules.get("torch")  # not imported for those that need none
    if torch is not None:
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A command may have set it up, to write where only its own test reads."""
    before = logging.getLogger().handlers[:]
    yield
    logging.getLogger().handlers[:] = before


@pytest.fixture(autouse=True)
def _unit_tests_start_no_ray(request: pytest.FixtureRequest) -> object:
    yield
    ray = sys.modules.get("ray")
    if ray is not None and _UNIT in request.path.parents and ray.is_initialized():
        ray.shutdown()
        pytest.fail("a unit test started Ray; it belongs to tests/ray")
