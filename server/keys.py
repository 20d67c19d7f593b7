"""API keys: what each may be used for, the name it goes by, and how one that a request brings is recognized.

A key is written `KEY [ID [SCOPE ...]]`, a line of a file or an entry of `--api-key`. Ids stand for keys wherever people look
(logs, metrics, cache salts); several keys may have one id, as when one takes the place of another.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from engine.errors import ConfigError

API, METRICS, ADMIN = "api", "metrics", "admin"
SCOPES = (API, METRICS, ADMIN)

_ID = r"[A-Za-z0-9._-]{1,64}"
MAX_KEY_FILE_BYTES = 2**20


@dataclass(frozen=True)
class ApiKey:
    """What is known of a key. scopes: api for all endpoints but /metrics (metrics, or admin) and /admin/ (admin)."""

    id: str
    scopes: frozenset[str]

    def may(self, scope: str) -> bool:
        return scope in self.scopes or (scope == METRICS and ADMIN in self.scopes)


class KeyRing:
    """All keys of a server. notes: what its owner should hear of, such as a file that others may read."""

    def __init__(self, keys: Iterable[tuple[bytes, ApiKey]] = (), notes: Sequence[str] = ()) -> None:
        # Digests under a secret of this process: they have one length, and tell nothing of the keys where memory leaks.
        self._secret = secrets.token_bytes(32)
        self._keys = [(self._digest(key), known) for key, known in keys]
        self._tenants = {known.id for _, known in self._keys if known.may(API)}
        self.notes = list(notes)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def replace(self, others: KeyRing) -> None:
        """From now on the keys are those of `others`."""
        self._secret, self._keys, self.notes = others._secret, others._keys, others.notes
        self._tenants |= others._tenants

    def find(self, given: bytes) -> ApiKey | None:
        """The key that was given. Every key is compared, each in constant time: how long it takes tells nothing."""
        digest = self._digest(given)
        found = None
        for expected, known in self._keys:
            if hmac.compare_digest(digest, expected):
                found = known
        return found

    def has_scope(self, scope: str) -> bool:
        """Whether any key is good for this."""
        return any(known.may(scope) for _, known in self._keys)

    @property
    def ids(self) -> frozenset[str]:
        """Of all keys."""
        return frozenset(known.id for _, known in self._keys)

    @property
    def num_tenants(self) -> int:
        """How many ids may ask the model something, or once might: what was computed for them may still be found."""
        return len(self._tenants)

    def _digest(self, key: bytes) -> bytes:
        return hashlib.blake2b(key, key=self._secret).digest()


def read_keys(given: Sequence[str], file: str | None, *, again: bool = False) -> KeyRing:
    """The keys of `--api-key` and of `--api-key-file`. Raises ConfigError that names the place, never the key.

    again: of a server that runs. Its keys need ids in the file then, for one by a line's number would pass to another key
    with all that belongs to it when a line goes.
    """
    entries = [(f"api_key, entry {number}", "api_key", entry) for number, entry in enumerate(given, 1)]
    notes: list[str] = []
    if file is not None:
        path = Path(file).expanduser()
        before = len(entries)
        entries += [(f"{path} line {number}", "api_key_file", line) for number, line in _lines(path)]
        if len(entries) == before:
            raise ConfigError(f"{path} holds no key: write one a line, `KEY [ID [SCOPE ...]]`", param="api_key_file")
        notes += _access_notes(path)
    keys: dict[str, tuple[str, ApiKey]] = {}
    for number, (place, param, entry) in enumerate(entries, 1):
        if again and param == "api_key_file" and len(entry.split()) == 1:
            _refuse(
                place, param, "a key needs an id behind it before the file can be read again, since ids by number would shift"
            )
        key, known = _parse(entry, f"key{number}", place, param)
        if key in keys:
            _refuse(place, param, f"this is the key of {keys[key][0]} again")
        keys[key] = (place, known)
    return KeyRing(((key.encode(), known) for key, (_, known) in keys.items()), notes)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of the lines that hold a key. A # begins a comment at a line's start, or after white space."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_KEY_FILE_BYTES + 1)
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no UTF-8 text: write one key a line", param="api_key_file") from None
    except OSError as error:
        raise ConfigError(f"the key file {path} cannot be read: {error.strerror}", param="api_key_file") from None
    if len(content) > MAX_KEY_FILE_BYTES:
        raise ConfigError(f"{path} has more than {MAX_KEY_FILE_BYTES:,} bytes: is it a key file?", param="api_key_file")
    for number, line in enumerate(text.splitlines(), 1):
        stripped = re.sub(r"(^|\s)#.*", "", line).strip()
        if stripped:
            yield number, stripped


def _access_notes(path: Path) -> list[str]:
    mode = path.stat().st_mode
    if not mode & (stat.S_IRWXG | stat.S_IRWXO):
        return []
    return [f"{path} may be opened by other users of this machine (mode {stat.S_IMODE(mode):04o}): chmod 600 {path}"]


def _parse(entry: str, default_id: str, place: str, param: str) -> tuple[str, ApiKey]:
    """The key, and what is known of it. Raises ConfigError."""
    key, *rest = entry.split()
    if not key.isprintable():
        _refuse(place, param, "the key holds a character that cannot be printed")
    key_id = rest[0] if rest else default_id
    if key_id in SCOPES:
        _refuse(place, param, f"{key_id} is a scope, and stands where the key's id belongs: KEY ID {key_id}")
    if not re.fullmatch(_ID, key_id):
        _refuse(place, param, "the id behind the key must be 1 to 64 letters, digits, dots, - or _")
    scopes = [scope for word in rest[1:] for scope in word.split(",") if scope]
    if set(scopes) - set(SCOPES):
        _refuse(place, param, f"a scope must be {', '.join(SCOPES[:-1])} or {SCOPES[-1]}")
    return key, ApiKey(key_id, frozenset(scopes or (API,)))


def _refuse(place: str, param: str, reason: str) -> NoReturn:
    raise ConfigError(f"{place}: {reason}", param=param)
