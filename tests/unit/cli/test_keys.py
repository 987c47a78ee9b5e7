"""`ray-moe keys`: what lands where, and that a service's key ring agrees."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from ray_moe.cli.keys import keys
from ray_moe.errors import Unauthenticated
from ray_moe.service.auth import KeyRing
from ray_moe.service.limits import Limits


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(keys, [str(argument) for argument in arguments])


def create(file: Path, name: str = "alice", *more: object) -> str:
    result = run("create", "--file", file, "--name", name, "--role", "infer", *more)
    assert result.exit_code == 0, result.stderr
    return result.stdout.strip()


def listed(file: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(run("list", "--file", file, "--json").stdout)
    return entries


def test_the_key_is_all_there_is_on_standard_output(file: Path) -> None:
    result = run("create", "--file", file, "--name", "alice", "--role", "infer", "--role", "admin")
    assert result.exit_code == 0
    (key,) = result.stdout.splitlines()
    assert KeyRing(file).identify(key).roles == {"infer", "admin"}
    assert "of alice, for infer, admin, valid for ever; it is not shown again" in result.stderr
    assert key not in result.stderr
    assert key not in file.read_text()


def test_what_a_key_is_given(file: Path) -> None:
    before = int(time.time())
    limits = ("--requests-per-minute", 60, "--tokens-per-minute", 10_000, "--max-concurrent", 2)
    key = create(file, "alice", "--expires-in", "30d", *limits)
    assert KeyRing(file).identify(key).limits == Limits(60, 10_000, 2)
    (entry,) = listed(file)
    assert before <= entry["created_at"] == entry["expires_at"] - 30 * 86_400 <= time.time()
    assert not entry["expired"]


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("15m", 900), ("2h", 7200), ("1d", 86_400), ("3w", 1_814_400)]
)
def test_units_of_time(file: Path, text: str, seconds: int) -> None:
    create(file, "alice", "--expires-in", text)
    (entry,) = listed(file)
    assert entry["expires_at"] - entry["created_at"] == seconds


def test_the_list_shows_all_but_the_keys(file: Path) -> None:
    made = [create(file), create(file, "bob", "--requests-per-minute", 1000, "--max-concurrent", 3)]
    tree = json.loads(file.read_text())
    tree["keys"][0]["expires_at"] = 0
    file.write_text(json.dumps(tree))
    result = run("list", "--file", file)
    words = " ".join(result.stdout.split())
    assert result.exit_code == 0
    for entry in listed(file):
        assert entry["id"] in words
        assert entry["name"] in words
    for said in ("is over", "never", "1,000 requests/min", "3 at a time"):
        assert said in words
    assert not any(key in result.output for key in made)
    assert [entry["expired"] for entry in listed(file)] == [True, False]


def test_keys_are_revoked_by_id_or_by_name(file: Path) -> None:
    old, new, other = create(file), create(file), create(file, "bob")
    first = listed(file)[0]["id"]
    assert run("revoke", first, "--file", file).stderr == f"revoked {first} of alice\n"
    with pytest.raises(Unauthenticated):
        KeyRing(file).identify(old)
    assert KeyRing(file).identify(new).name == "alice"
    assert run("revoke", "alice", "--file", file).exit_code == 0
    assert [entry["name"] for entry in listed(file)] == ["bob"]
    assert KeyRing(file).identify(other).name == "bob"
    assert run("revoke", "bob", "--file", file).exit_code == 0
    assert "nobody can use a service with this file" in " ".join(run("list", "--file", file).stdout.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("create", "--name", "a b", "--role", "infer"), "error: --name: name is 'a b'"),
        (
            ("create", "--name", "a", "--role", "root"),
            "error: --role: roles are ['root']; expected one or more of infer",
        ),
        (("create", "--name", "a", "--role", "infer", "--expires-in", "soon"), "error: --expires-in is 'soon'"),
        (("create", "--name", "a", "--role", "infer", "--expires-in", "0d"), "error: --expires-in is '0d'"),
        (("create", "--name", "a", "--role", "infer", "--max-concurrent", 10**18), "max_concurrent is 1000000"),
        (("revoke", "carol"), "error: there is no key 'carol' in"),
    ],
)
def test_wrong_input_is_one_line_and_changes_nothing(file: Path, arguments: tuple[object, ...], said: str) -> None:
    create(file)
    before = file.read_bytes()
    result = run(*arguments, "--file", file)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_files_that_are_not_there(file: Path) -> None:
    assert "cannot read the API keys" in run("list", "--file", file).stderr
    result = run("revoke", "alice", "--file", file)
    assert (result.exit_code, "expected an id or one of the names: none" in result.stderr) == (2, True)
    result = run("create", "--file", file / "below", "--name", "a", "--role", "infer")
    assert (result.exit_code, "cannot write the API keys to" in result.stderr) == (2, True)
    assert not file.exists()
