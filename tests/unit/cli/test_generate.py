"""`ray-moe generate`: what goes out and what comes back."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from ray_moe.cli.commands import commands
from ray_moe.cli.generate import parse_token_ids
from ray_moe.errors import InvalidRequest
from tests.unit.cli.fakes import FakeClient, client_that

run = CliRunner().invoke


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_moe.cli.generate.Client", FakeClient)


def test_text_is_written_as_it_comes() -> None:
    result = run(commands, ["generate", "ab ", "--max-new-tokens", "7"])
    assert (result.exit_code, result.stdout) == (0, "ab ab a\n")


def test_a_prompt_from_standard_input() -> None:
    result = run(commands, ["generate", "-", "--max-new-tokens", "2"], input="xy")
    assert result.stdout == "xy\n"


def test_token_numbers_in_and_out() -> None:
    result = run(commands, ["generate", "[65, 66]", "--token-ids", "--max-new-tokens", "3"])
    assert result.stdout.split() == ["65", "66", "65"]


def test_all_options_reach_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def stream(self: FakeClient, prompt: str, **options: object) -> list[object]:
        seen.update(options, prompt=prompt, target=self.target)
        return []

    monkeypatch.setattr("ray_moe.cli.generate.Client", client_that(stream=stream))
    words = "generate hi --server h:1 --max-new-tokens 3 --temperature 0.5 --top-p 0.9 --seed 4".split()
    words += "--top-k 40 --min-p 0.1 --stop . --stop END".split()
    assert run(commands, words).exit_code == 0
    options = {"max_new_tokens": 3, "temperature": 0.5, "top_p": 0.9, "seed": 4, "top_k": 40, "min_p": 0.1}
    assert seen == {"prompt": "hi", "target": "h:1", **options, "stop": [".", "END"]}


def test_a_stream_that_breaks_keeps_what_came_and_exits_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_moe.cli.generate.Client", client_that(fails_after=2))
    result = run(commands, ["generate", "abc"])
    assert (result.exit_code, result.stdout, result.stderr) == (1, "ab", "error: the service broke off\n")


@pytest.mark.parametrize("words", ["", "1 x", "-1", "1.5"])
def test_what_is_no_list_of_numbers_is_refused(words: str) -> None:
    with pytest.raises(InvalidRequest, match="numbers"):
        parse_token_ids(words)
