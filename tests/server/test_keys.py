"""API keys: how they are written, what is wrong with them, and how one is recognized."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import ConfigError
from server.client_key import first_key
from server.config import load_config
from server.keys import KeyRing, read_keys

KEY_FILE = """\
# of the house
s3cret-one alice            # a comment behind it
s3cret-two alice api metrics

s3cret-t#ree ops admin,metrics
s3cret-four
"""


def ids(keys: KeyRing, *given: str) -> list[str | None]:
    found = [keys.find(key.encode()) for key in given]
    return [key.id if key else None for key in found]


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(KEY_FILE)
    path.chmod(0o600)
    return path


def test_a_file_of_keys(key_file: Path) -> None:
    keys = read_keys(["flag-key", "flag-two bob metrics"], str(key_file))
    assert ids(keys, "flag-key", "flag-two", "s3cret-one", "s3cret-two", "s3cret-t#ree") == [
        "key1",
        "bob",
        "alice",
        "alice",
        "ops",
    ]
    assert ids(keys, "s3cret-four") == ["key6"]
    assert ids(keys, "", "s3cret", "s3cret-one ", "S3CRET-ONE", "alice", "s3cret-one alice", "flag-key\0") == [None] * 7
    assert keys.notes == []
    assert keys.num_tenants == 3  # key1, alice, key6; the others may not ask the model


def test_scopes() -> None:
    keys = read_keys(["a", "b ops admin", "c prom metrics", "d all api,admin metrics"], None)

    def scopes(key: bytes) -> list[bool]:
        found = keys.find(key)
        assert found is not None
        return [found.may(scope) for scope in ("api", "metrics", "admin")]

    assert scopes(b"a") == [True, False, False]
    assert scopes(b"b") == [False, True, True]
    assert scopes(b"c") == [False, True, False]
    assert scopes(b"d") == [True, True, True]
    assert keys.has_scope("admin") and not read_keys(["a"], None).has_scope("metrics")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("s3cret admin", "line 2: admin is a scope"),
        ("s3cret ops root", "line 2: a scope must be api, metrics or admin"),
        ("s3cret a/b", "line 2: the id behind the key"),
        ("s3cret " + "x" * 65, "line 2: the id behind the key"),
        ("s3\u200bcret ops", "line 2: the key holds a character"),
        ("fine ops", "line 2: this is the key of"),
    ],
)
def test_what_is_wrong_is_told_with_its_line_and_without_the_key(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "keys"
    path.write_text(f"fine\n{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_keys([], str(path))
    assert reason in caught.value.message and "cret" not in caught.value.message
    assert caught.value.param == "api_key_file"


def test_files_that_are_none(tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.write_text("# nothing\n")
    binary.write_bytes(b"\xff\xfe\x00")
    for path, reason in (
        (empty, "holds no key"),
        (binary, "UTF-8"),
        (tmp_path / "none", "No such file"),
        (tmp_path, "directory"),
    ):
        with pytest.raises(ConfigError, match=reason):
            read_keys([], str(path))


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True)])
def test_a_file_that_others_may_read_is_warned_of(key_file: Path, mode: int, warned: bool) -> None:
    key_file.chmod(mode)
    notes = read_keys([], str(key_file)).notes
    assert bool(notes) is warned
    assert not warned or (f"{mode:04o}" in notes[0] and "chmod 600" in notes[0])


def test_through_the_configuration(key_file: Path) -> None:
    config = load_config(["--api-key-file", str(key_file)], {"OCTAVO_API_KEY": "one, two ops admin"})
    assert ids(config.read_keys(), "one", "two", "s3cret-one") == ["key1", "ops", "alice"]
    with pytest.raises(ConfigError) as caught:
        load_config([], {"OCTAVO_API_KEY": "one, tulip-bulb admin"})
    assert "OCTAVO_API_KEY in the environment: api_key, entry 2" in caught.value.message
    assert "tulip" not in caught.value.message


@pytest.mark.parametrize(("listed", "key"), [("", ""), ("a", "a"), (" a ops admin, b", "a"), (", b", "")])
def test_clients_take_the_key_out_of_the_first_entry(listed: str, key: str) -> None:
    assert first_key(listed) == key


def test_nothing_that_is_kept_holds_a_key() -> None:
    keys = read_keys(["tulip-bulb ops"], None)
    assert "tulip" not in repr(vars(keys)) and b"tulip" not in b"".join(digest for digest, _ in keys._keys)
    assert len({len(digest) for digest, _ in read_keys(["a", "b" * 500], None)._keys}) == 1


def test_keys_take_the_place_of_others(tmp_path: Path) -> None:
    keys = read_keys(["old ann"], None)
    assert keys.num_tenants == 1
    keys.replace(read_keys(["new bob", "more ops admin"], None))
    assert ids(keys, "old", "new", "more") == [None, "bob", "ops"] and len(keys) == 2 and keys.has_scope("admin")
    assert keys.num_tenants == 2, "what was computed for ann may still be found"


def test_a_file_that_is_read_again_needs_ids(key_file: Path) -> None:
    with pytest.raises(ConfigError, match="keys line 6: a key needs an id behind it"):
        read_keys([], str(key_file), again=True)
    key_file.write_text(KEY_FILE.replace("s3cret-four", "s3cret-four dora"))
    assert ids(read_keys(["flag-key"], str(key_file), again=True), "flag-key", "s3cret-four") == ["key1", "dora"]
