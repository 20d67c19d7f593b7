"""What --help prints: every flag once, its default and choices, titles, and nothing wider than the terminal."""

from __future__ import annotations

import re

import pytest

from engine.attention.choose import BACKENDS
from engine.config import ATTENTION_BACKENDS
from engine.errors import ConfigError
from server.cli import run
from server.config import ServerConfig, load_config
from server.flags import GROUPS, choices_of, flag_name, group_of

COMMANDS = ("serve", "plan", "doctor", "bench", "chat", "completion")
FIELDS = ServerConfig.model_fields


@pytest.fixture(autouse=True)
def columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    try:
        code = run(argv)
    except SystemExit as end:
        code = int(end.code or 0)
    assert code == 0
    return capsys.readouterr().out


def entry(text: str, key: str) -> str:
    """What is said of one setting, in one line."""
    name = f"--[no-]{flag_name(key)[2:]}" if FIELDS[key].annotation is bool else flag_name(key)
    found = re.search(rf"^  {re.escape(name)}(?= |$)(.*\n(?:    .*\n)*)", text, re.MULTILINE)
    assert found, name
    return " ".join(found[1].split())


def test_every_setting_with_its_default_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "serve", "--help")
    for key, field in FIELDS.items():
        said = entry(text, key)
        assert re.search(r"\[[^]]+\]$", said), f"{key} has no default behind it: {said}"
        assert all(choice in said for choice in choices_of(field))
    assert entry(text, "port").endswith("[8000]")
    assert entry(text, "max_num_seqs").endswith("[32 on a CPU, 256 on a GPU]")
    assert entry(text, "cuda_graphs").endswith("[on]") and entry(text, "strict").endswith("[off]")
    assert "this machine only" in entry(text, "host")
    assert text.count("OCTAVO_MAX_MODEL_LEN") == 1  # how variables are named is said once


def test_every_group_has_a_title() -> None:
    assert {group_of(field) for field in FIELDS.values()} <= set(GROUPS)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("columns", [60, 80, 120, 300])
def test_nothing_is_wider_than_the_terminal(
    command: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = printed(capsys, command, "--help").splitlines()
    # What stands indented in descriptions are examples and tables, which are made for 80 columns.
    assert max(map(len, lines)) <= min(120, max(80, columns))


def test_octavo_s_own_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--help")
    assert max(map(len, text.splitlines())) <= 80
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", text, re.MULTILINE)
    assert printed(capsys, "help", "serve") == printed(capsys, "serve", "--help")


def test_a_word_picks_flags_and_groups(capsys: pytest.CaptureFixture[str]) -> None:
    limits = printed(capsys, "serve", "--help", "limits")
    assert all(entry(limits, key) for key, field in FIELDS.items() if group_of(field) == "limits")
    assert "--cuda-graphs" not in limits
    for word in ("kv-cache-dtype", "--kv-cache-dtype", "kv_cache_dtype", "KV cache dtype"):
        assert entry(printed(capsys, "serve", "--help", word), "kv_cache_dtype")
    with pytest.raises(ConfigError, match=r"'sourdough'.*Limits and times"):
        load_config(["--help", "sourdough"], {})


def test_the_backends_named_are_those_there_are() -> None:
    assert set(ATTENTION_BACKENDS) == set(BACKENDS)
