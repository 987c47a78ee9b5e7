"""API keys: the file, who a key says one is, and what they may do."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_moe.errors import InvalidConfig, Overloaded, PermissionDenied, Unauthenticated
from ray_moe.service import keys as keys_module
from ray_moe.service.auth import KeyRing, presented_key
from ray_moe.service.keys import (
    KEY_PREFIX,
    MAX_NUMBER,
    ROLES,
    ApiKey,
    Role,
    digest_of,
    editing,
    new_key,
    read_keys,
)
from ray_moe.service.limits import Limits
from tests.unit.service.test_reloading import Clock

DIGEST = "0" * 64
ENTRY = {"name": "alice", "sha256": DIGEST, "roles": ["infer"]}


def add(path: Path, name: str = "alice", roles: tuple[Role, ...] = ("infer",), **more: Any) -> str:
    """Puts a new key into the file; returns it."""
    secret = new_key()
    with editing(path) as entries:
        entries.append(ApiKey(name, digest_of(secret), frozenset(roles), **more))
    return secret


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


# --- the file ------------------------------------------------------------------------------------------------
def test_keys_are_random_long_and_recognisable() -> None:
    made = {new_key() for _ in range(100)}
    assert len(made) == 100
    assert all(key.startswith(KEY_PREFIX) and len(key) >= 43 + len(KEY_PREFIX) for key in made)


def test_the_file_holds_no_key_and_only_its_owner_may_read_it(path: Path) -> None:
    old_mask = os.umask(0)
    try:
        secret = add(path)
    finally:
        os.umask(old_mask)
    assert path.stat().st_mode & 0o777 == 0o600
    assert secret not in path.read_text()
    assert secret.removeprefix(KEY_PREFIX) not in path.read_text()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


counts = st.none() | st.integers(1, MAX_NUMBER)
api_keys = st.builds(
    ApiKey,
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", fullmatch=True),
    st.binary(min_size=32, max_size=32),
    st.frozensets(st.sampled_from(ROLES), min_size=1),
    st.integers(0, MAX_NUMBER),
    st.none() | st.integers(0, MAX_NUMBER),
    st.builds(Limits, counts, counts, counts),
)


@settings(max_examples=30)  # each is synced to the disk
@given(entries=st.lists(api_keys, max_size=4, unique_by=lambda key: key.digest))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, entries: list[ApiKey]) -> None:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    with editing(path) as written:
        written.extend(entries)
    assert read_keys(path) == tuple(entries)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is nested too deeply"),
        (b"[]", "should be"),
        (b'{"keys": []}', "should be"),
        (b'{"version": 2, "keys": []}', "has version 2; this ray_moe reads version 1"),
        (b'{"version": 1, "keys": {}}', "should be"),
        (["x"], "key 1 has 'x'"),
        ([{"name": "alice"}], "key 1 has 'name'; expected name, sha256, roles"),
        ([{**ENTRY, "expire_at": 1}], "'expire_at'"),
        ([ENTRY, {**ENTRY, "name": "a b"}], "key 2: name is 'a b'"),
        ([{**ENTRY, "name": 1}], "name is 1"),
        ([{**ENTRY, "sha256": "A" * 64}], "sha256 should be 64 digits"),
        ([{**ENTRY, "sha256": None}], "sha256 should be 64 digits"),
        ([{**ENTRY, "roles": "infer"}], "roles are 'infer'; expected one or more of infer, train, admin"),
        ([{**ENTRY, "roles": []}], r"roles are \[\]"),
        ([{**ENTRY, "roles": ["root"]}], "'root'"),
        ([{**ENTRY, "roles": [["infer"]]}], "roles are"),
        ([{**ENTRY, "expires_at": "tomorrow"}], "expires_at is 'tomorrow'; expected a whole number"),
        ([{**ENTRY, "expires_at": None}], "expires_at is None"),
        ([{**ENTRY, "expires_at": 1.5}], "expires_at is 1.5"),
        ([{**ENTRY, "expires_at": float("nan")}], "expires_at is nan"),
        ([{**ENTRY, "requests_per_minute": 0}], "requests_per_minute is 0"),
        ([{**ENTRY, "tokens_per_minute": True}], "tokens_per_minute is True"),
        ([{**ENTRY, "max_concurrent": 10**300}], "max_concurrent is 1000"),
        ([ENTRY, ENTRY], "the same sha256 twice"),
    ],
)
def test_a_wrong_file_is_refused_in_words(path: Path, content: Any, said: str) -> None:
    path.write_bytes(content if isinstance(content, bytes) else json.dumps({"version": 1, "keys": content}).encode())
    path.chmod(0o600)
    with pytest.raises(InvalidConfig, match=said):
        KeyRing(path).load()


@given(
    data=st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([1, "keys", "version"]),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["version", "keys", *ENTRY]), inner)
        ),
    ).map(lambda tree: json.dumps(tree).encode())
)
def test_bad_content_raises_nothing_else(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    path.write_bytes(data)
    path.chmod(0o600)
    try:
        assert read_keys(path) == ()
    except InvalidConfig as error:
        assert str(path) in error.message


def test_a_file_that_is_not_there_or_that_everybody_may_write(path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"No such file or directory; `ray-moe keys create --file"):
        KeyRing(path).load()
    add(path)
    path.chmod(0o602)
    with pytest.raises(InvalidConfig, match=f"run: chmod 600 {path}"):
        KeyRing(path).load()


def test_a_change_that_fails_leaves_the_file_as_it_was(path: Path) -> None:
    add(path)
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError), editing(path) as entries:
        entries.clear()
        _ = 1 / 0
    with pytest.raises(InvalidConfig, match="max_concurrent is 0"), editing(path) as entries:
        entries.append(ApiKey("bob", b"0" * 32, frozenset({"infer"}), limits=Limits(max_concurrent=0)))
    path.write_bytes(before[:-10])
    with pytest.raises(InvalidConfig, match="is not JSON"), editing(path):
        pytest.fail("a broken file is not changed")
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_changes_at_the_same_time_are_all_kept(path: Path) -> None:
    threads = [threading.Thread(target=add, args=(path, f"caller-{number}")) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.name for key in read_keys(path)} == {f"caller-{number}" for number in range(8)}


def test_a_change_that_was_cut_off_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "LOCK_TIMEOUT_S", 0.0)
    left = path.with_name("keys.json.lock")
    left.touch()
    with pytest.raises(InvalidConfig, match=r"keys\.json\.lock is there: .* delete that file"):
        add(path)
    left.unlink()
    assert add(path)


def test_a_link_to_the_file_stays_a_link(path: Path) -> None:
    link = path.with_name("link.json")
    link.symlink_to(path)
    add(link)
    assert link.is_symlink()
    assert len(read_keys(path)) == 1


# --- who calls -----------------------------------------------------------------------------------------------
def test_a_key_is_its_callers(path: Path) -> None:
    alice = add(path, "alice", ("infer", "train"), limits=Limits(max_concurrent=3))
    bob = add(path, "bob", ("admin",))
    ring = KeyRing(path)
    ring.load()
    assert ring.required
    caller = ring.identify(alice)
    assert (caller.name, caller.limits) == ("alice", Limits(max_concurrent=3))
    assert caller.roles == {"infer", "train"}
    assert ring.identify(bob).name == "bob"


def test_a_key_for_metrics_alone_may_ask_for_nothing_else(path: Path) -> None:
    scraper, both = add(path, "scraper", ("metrics",)), add(path, "both", ("metrics", "infer"))
    ring = KeyRing(path)
    ring.load()
    ring.identify(scraper).require("metrics")
    with pytest.raises(PermissionDenied, match="needs a role besides metrics, and this API key has metrics"):
        ring.identify(scraper).require(None)
    ring.identify(both).require(None)


def test_without_a_file_everybody_may_do_everything() -> None:
    ring = KeyRing(None)
    ring.load()
    assert not ring.required
    for presented in (None, "", "anything"):
        caller = ring.identify(presented)
        assert caller.name == "anonymous"
        for role in ROLES:
            caller.require(role)


@pytest.mark.parametrize("presented", [None, ""])
def test_no_key_is_told_how_to_send_one(path: Path, presented: str | None) -> None:
    add(path)
    with pytest.raises(Unauthenticated, match="needs an API key: send one as `authorization: Bearer KEY`"):
        KeyRing(path).identify(presented)


def test_a_wrong_key_is_not_known_and_the_refusal_repeats_nothing(path: Path) -> None:
    secret = add(path)
    ring = KeyRing(path)
    digest = digest_of(secret).hex()
    for wrong in (secret[:-1], secret + "x", secret.upper(), digest, "\udc80", "ü" * 10_000, "alice", new_key()):
        with pytest.raises(Unauthenticated, match="is not known here") as refusal:
            ring.identify(wrong)
        assert wrong not in refusal.value.message.split()
        assert not any(said in refusal.value.message for said in ("alice", digest[:8], KEY_PREFIX))


def test_a_key_ends_at_its_second(path: Path) -> None:
    now = Clock()
    secret = add(path, expires_at=int(now.now_s) + 5)
    ring = KeyRing(path, unix_time=now)
    now.now_s += 4.999
    assert ring.identify(secret).name == "alice"
    now.now_s += 0.001
    with pytest.raises(Unauthenticated, match="has expired"):
        ring.identify(secret)


def test_new_and_revoked_keys_count_after_a_second(path: Path) -> None:
    clock = Clock()
    alice = add(path)
    ring = KeyRing(path, clock=clock)
    assert ring.identify(alice).name == "alice"
    bob = add(path, "bob")
    with editing(path) as entries:
        entries[:] = [entry for entry in entries if entry.name == "bob"]
    assert ring.identify(alice).name == "alice"
    clock.now_s += 1.0
    assert ring.identify(bob).name == "bob"
    with pytest.raises(Unauthenticated):
        ring.identify(alice)


def test_a_broken_file_revokes_nobody_and_lets_nobody_else_in(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    alice = add(path)
    ring = KeyRing(path, clock=clock)
    ring.load()
    path.write_text('{"version": 1, "keys": [')
    clock.now_s += 1.0
    assert ring.identify(alice).name == "alice"
    with pytest.raises(Unauthenticated):
        ring.identify(new_key())
    assert "is not JSON" in caplog.text
    assert alice not in caplog.text


def test_a_ring_that_never_read_its_file_lets_nobody_in(path: Path) -> None:
    with pytest.raises(InvalidConfig, match="cannot read the API keys"):
        KeyRing(path).identify(new_key())


def test_a_role_is_needed_and_none_includes_another(path: Path) -> None:
    for has in ROLES:
        caller = KeyRing(path).identify(add(path, has, (has,)))
        for wanted in ROLES:
            if wanted == has:
                caller.require(wanted)
            else:
                with pytest.raises(PermissionDenied, match=f"needs the role {wanted}, and this API key has {has}"):
                    caller.require(wanted)


def test_keys_of_one_name_draw_on_one_account_which_outlives_changes_of_the_file(path: Path) -> None:
    clock = Clock()
    limits = Limits(requests_per_minute=2, tokens_per_minute=10)
    first, second = add(path, limits=limits), add(path, limits=limits)
    other = add(path, "bob", limits=limits)
    ring = KeyRing(path, clock=clock)
    for secret in (first, second):
        with ring.identify(secret).request():
            ring.identify(secret).spend(1)
    add(path, "carol")
    clock.now_s += 1.0
    for secret in (first, second):
        with pytest.raises(Overloaded) as refusal, ring.identify(secret).request():
            pytest.fail("the account is empty")
        assert refusal.value.retry_after_s == 29.0
    with ring.identify(other).request():
        ring.identify(other).spend(10, begun=True)
    with pytest.raises(Overloaded, match="10 tokens a minute"):
        ring.identify(other).spend(1)


# --- headers -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("authorization", "x_api_key", "expected"),
    [
        (None, None, None),
        ("Bearer k", None, "k"),
        ("bearer k", "other", "k"),
        ("BEARER   k  ", None, "k"),
        (None, " k ", "k"),
        ("Basic dXNlcg==", "k", "k"),
        ("Basic dXNlcg==", None, None),
        ("Bearer", "k", "k"),
        ("Bearer ", None, None),
        ("", "", None),
        ("k", None, None),
    ],
)
def test_where_a_key_is_looked_for(authorization: str | None, x_api_key: str | None, expected: str | None) -> None:
    assert presented_key(authorization, x_api_key) == expected
