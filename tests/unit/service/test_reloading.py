"""Files that are read again when they change."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ray_moe.errors import InvalidConfig
from ray_moe.service.reloading import Reloading


class Clock:
    """Goes only when it is told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Number:
    """A file that holds a number, and how often it was read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_reads = 0
        self.clock = Clock()
        self.reloading = Reloading([path], self.read, clock=self.clock)

    def read(self) -> int:
        self.num_reads += 1
        try:
            return int(self.path.read_text())
        except (OSError, ValueError) as error:
            raise InvalidConfig(f"{self.path} is no number: {error}") from error

    def later(self) -> int:
        self.clock.now_s += 1.0
        return self.reloading.current()


@pytest.fixture
def number(tmp_path: Path) -> Number:
    path = tmp_path / "number"
    path.write_text("1")
    return Number(path)


def test_a_file_that_stays_is_read_once(number: Number) -> None:
    assert [number.reloading.load(), *(number.later() for _ in range(5))] == [1] * 6
    assert number.num_reads == 1


def test_a_change_counts_after_a_second_and_not_before(number: Number) -> None:
    assert number.reloading.current() == 1
    number.path.write_text("2")
    number.clock.now_s += 0.9
    assert number.reloading.current() == 1
    number.clock.now_s += 0.1
    assert number.reloading.current() == 2


def test_a_file_that_is_replaced_by_one_of_the_same_size_and_date(number: Number) -> None:
    assert number.reloading.load() == 1
    other = number.path.with_name("other")
    other.write_text("2")
    other.replace(number.path)
    assert number.later() == 2


def test_what_cannot_be_read_is_logged_once_and_changes_nothing(
    number: Number, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    assert number.reloading.load() == 1
    number.path.write_text("none")
    assert [number.later() for _ in range(3)] == [1, 1, 1]
    (said,) = caplog.messages
    assert "stays in force" in said
    assert "is no number" in said
    number.path.unlink()
    assert number.later() == 1
    assert "No such file" in caplog.messages[1]
    number.path.write_text("3")
    assert number.later() == 3


def test_without_a_first_value_there_is_an_error_until_there_is_one(number: Number) -> None:
    number.path.write_text("none")
    for _ in range(2):
        with pytest.raises(InvalidConfig, match="is no number"):
            number.reloading.current()
    number.path.write_text("4")
    assert number.reloading.current() == 4


def test_a_file_that_never_rests_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "restless"

    def read() -> int:
        path.write_text("x" * (path.stat().st_size + 1 if path.exists() else 1))
        return 1

    with pytest.raises(InvalidConfig, match="changed while being read"):
        Reloading([path], read).load()


def test_a_change_while_it_is_read_is_not_missed(number: Number) -> None:
    def read() -> int:
        value = Number.read(number)
        if value == 1:
            number.path.write_text("22")
        return value

    assert Reloading([number.path], read).load() == 22
