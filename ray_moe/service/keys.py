"""The file of API keys: what is in it, reading, and changing it safely.

It is JSON, and holds the SHA-256 of each key, never the key. A key is 32 random bytes, so there is nothing to guess,
and the slow hashes made for passwords would only slow down each request. Its prefix lets people and scanners recognise
a key that got into a repository or a log. Read by `service/auth.py`, changed by `ray-moe keys`.

    {"version": 1, "keys": [{"name": "alice", "sha256": "<64 hex digits>", "roles": ["infer"], "created_at": 1767225600,
                             "expires_at": 1798761600, "requests_per_minute": 600}]}
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from ray_moe.errors import InvalidConfig
from ray_moe.service.limits import UNLIMITED, Limits

Role = Literal["infer", "train", "admin", "metrics"]
"""infer: Forward and Generate. train: steps that change the weights. admin: the cluster. metrics: `GET /metrics`. None
includes another."""
ROLES: tuple[Role, ...] = get_args(Role)

KEY_PREFIX = "rm_"
VERSION = 1
MAX_FILE_BYTES = 64 * 2**20
MAX_NUMBER = 253_402_300_799
"""Of dates (the end of the year 9999) and of limits."""
LOCK_TIMEOUT_S = 5.0
_LOCK_POLL_S = 0.05
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_LIMITS = tuple(field.name for field in fields(Limits))
_FIELDS = {"name", "sha256", "roles", "created_at", "expires_at", *_LIMITS}


@dataclass(frozen=True, slots=True)
class ApiKey:
    """All that is kept of a key."""

    name: str
    """The caller; several keys may have the same one, as while one is exchanged for another."""
    digest: bytes
    """SHA-256 of the key."""
    roles: frozenset[Role]
    created_at: int = 0
    """Unix time."""
    expires_at: int | None = None
    """Unix time from which the key is no longer valid; None: never."""
    limits: Limits = UNLIMITED

    @property
    def key_id(self) -> str:
        """A short name for this one key, which says nothing about it."""
        return self.digest.hex()[:8]


def new_key() -> str:
    """A key nobody has."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def digest_of(key: str) -> bytes:
    """What is kept of `key`."""
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys in the file at `path`, in its order.

    Raises:
        InvalidConfig: it cannot be read, or is wrong in any way: a misspelled `expires_at` must not make a key eternal.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o002:
                raise InvalidConfig(f"everybody may write {path}, and so give themselves a key; run: chmod 600 {path}")
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidConfig(
            f"cannot read the API keys in {path}: {error.strerror}; "
            f"`ray-moe keys create --file {path}` makes such a file"
        ) from error
    if len(data) > MAX_FILE_BYTES:
        raise InvalidConfig(f"{path} has more than {MAX_FILE_BYTES:,} bytes; expected a file of API keys")
    try:
        tree = json.loads(data)
    except ValueError as error:  # also what is no UTF-8
        raise InvalidConfig(f"{path} is not JSON ({error}); repair it, or make it anew with `ray-moe keys`") from error
    except RecursionError as error:
        raise InvalidConfig(f"{path} is nested too deeply; expected a file of API keys") from error
    if not isinstance(tree, dict) or set(tree) != {"version", "keys"} or not isinstance(tree["keys"], list):
        raise InvalidConfig(f'{path} should be {{"version": {VERSION}, "keys": [...]}}')
    if tree["version"] != VERSION:
        raise InvalidConfig(f"{path} has version {tree['version']!r}; this ray_moe reads version {VERSION}")
    return _parse_all(tree["keys"], path)


@contextmanager
def editing(path: Path) -> Iterator[list[ApiKey]]:
    """The keys in the file at `path`, to be changed in place; written when the block ends well. Starts empty if absent.

    The file is replaced in one step, and only its owner may read it. The new content is first written to a file beside
    it, whose presence also keeps others from changing the keys at the same time.

    Raises:
        InvalidConfig: the file, or a key in it, is wrong, it cannot be written, or another process has been changing it
            for 5 s.
    """
    path = path.resolve()  # a link stays a link
    beside = path.with_name(path.name + ".lock")
    with _told(path):
        descriptor = _create(beside)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            keys = list(read_keys(path)) if path.exists() else []
            yield keys
            entries = [_entry(key) for key in keys]
            _parse_all(entries, path)  # nothing is written that could not be read
            with _told(path):
                json.dump({"version": VERSION, "keys": entries}, file, indent=1)
                file.write("\n")
                file.flush()
                _keep_owner(path, file.fileno())
                os.fsync(file.fileno())
                beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)  # not after the replacement: it might be another's by then
        raise


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InvalidConfig(f"cannot write the API keys to {path}: {error.strerror}") from error


def _create(beside: Path) -> int:
    end_s = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            return os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError as error:
            if time.monotonic() > end_s:
                raise InvalidConfig(
                    f"{beside} is there: another process is changing the keys, or was ended while it did; "
                    "if there is none, delete that file"
                ) from error
        time.sleep(_LOCK_POLL_S)


def _keep_owner(path: Path, descriptor: int) -> None:
    """Root may change the keys of a service that runs as somebody else, which must still be able to read them."""
    with suppress(OSError):
        before = path.stat()
        os.fchown(descriptor, before.st_uid, before.st_gid)


def _parse_all(entries: Sequence[object], path: Path) -> tuple[ApiKey, ...]:
    keys = tuple(_parse(entry, f"{path}: key {number}") for number, entry in enumerate(entries, 1))
    if len({key.digest for key in keys}) < len(keys):
        raise InvalidConfig(f"{path} has the same sha256 twice; remove one of the two")
    return keys


def _entry(key: ApiKey) -> dict[str, Any]:
    given = {"expires_at": key.expires_at, **asdict(key.limits)}
    return {
        "name": key.name,
        "sha256": key.digest.hex(),
        "roles": [role for role in ROLES if role in key.roles],
        "created_at": key.created_at,
        **{name: value for name, value in given.items() if value is not None},
    }


def _parse(entry: object, where: str) -> ApiKey:
    if not isinstance(entry, dict) or not _FIELDS >= set(entry) >= {"name", "sha256", "roles"}:
        has = ", ".join(sorted(map(repr, entry))) if isinstance(entry, dict) else repr(entry)[:40]
        raise InvalidConfig(f"{where} has {has}; expected name, sha256, roles, and perhaps of {sorted(_FIELDS)}")
    digest = entry["sha256"]
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise InvalidConfig(f"{where}: sha256 should be 64 digits of 0-9 and a-f")
    return ApiKey(
        check_name(entry["name"], where),
        bytes.fromhex(digest),
        check_roles(entry["roles"], where),
        _whole(entry, "created_at", 0, where) or 0,
        _whole(entry, "expires_at", 0, where),
        Limits(**{name: _whole(entry, name, 1, where) for name in _LIMITS}),
    )


def check_name(name: object, where: str) -> str:
    """`name`, as one that may stand in logs and metrics.

    Raises: `InvalidConfig`, whose message begins with `where`.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidConfig(f"{where}: name is {name!r}; expected up to 64 letters, digits and '.', '_', '@', '-'")
    return name


def check_roles(roles: object, where: str) -> frozenset[Role]:
    """`roles`, as a set that is not empty.

    Raises: `InvalidConfig`, whose message begins with `where`.
    """
    if not isinstance(roles, Sequence) or isinstance(roles, str) or not roles or not all(r in ROLES for r in roles):
        raise InvalidConfig(f"{where}: roles are {roles!r}; expected one or more of {', '.join(ROLES)}")
    return frozenset(roles)


def _whole(entry: dict[str, Any], name: str, minimum: int, where: str) -> int | None:
    value = entry.get(name)
    if value is None and name not in entry:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= MAX_NUMBER:
        raise InvalidConfig(f"{where}: {name} is {value!r}; expected a whole number of {minimum} to {MAX_NUMBER}")
    return value
