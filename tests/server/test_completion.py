"""`octavo completion`: the scripts in real shells, with what Tab would offer there."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from server.cli import _COMMANDS, run
from server.completion import SHELLS, SUMMARIES, command_parsers, completion_script
from server.config import ServerConfig
from server.flags import choices_of, flag_name

# (command line up to the cursor, what is offered, what is not)
OFFERS: list[tuple[str, set[str], set[str]]] = [
    ("octavo ", set(_COMMANDS), {"--dtype", "demo"}),
    ("octavo se", {"serve"}, {"plan"}),
    ("octavo serve --max-num-", {"--max-num-seqs", "--max-num-batched-tokens", "--max-num-mixed-tokens"}, {"--port"}),
    ("octavo serve --no-cuda", {"--no-cuda-graphs"}, {"--cuda-graphs"}),
    ("octavo serve --dtype ", {"auto", "float32", "bfloat16", "float16"}, {"demo", "fp8"}),
    ("octavo serve --attention-backend fl", {"flash_attention", "flashinfer"}, {"triton"}),
    ("octavo serve --log-level w", {"warning"}, {"info"}),
    ("octavo serve ", {"demo", "Qwen/Qwen3-0.6B", "own.gguf"}, {"serve"}),
    ("octavo serve Qw", {"Qwen/Qwen3-0.6B"}, {"demo", "own.gguf"}),
    ("octavo serve demo --api-key-file o", {"own.gguf"}, {"demo"}),
    ("octavo plan --mem", {"--memory"}, {"--model"}),
    ("octavo doctor --js", {"--json"}, {"--model"}),
    ("octavo bench --endpoint ", {"completions", "chat"}, {"demo"}),
    ("octavo chat --sys", {"--system"}, {"--url"}),
    ("octavo completion ", set(SHELLS), {"demo"}),
]

_BASH = r"""
source "$1"
read -r -a COMP_WORDS <<< "$2"
[[ "$2" == *" " ]] && COMP_WORDS+=("")
COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
_shtab_octavo
printf '%s\n' "${COMPREPLY[@]}"
"""


def of_bash(script: Path, line: str, environ: dict[str, str], folder: Path) -> set[str]:
    command = ["bash", "--norc", "-c", _BASH, "bash", str(script), line]
    return set(subprocess.run(command, cwd=folder, env=environ, check=True, capture_output=True, text=True).stdout.split("\n"))


def of_fish(script: Path, line: str, environ: dict[str, str], folder: Path) -> set[str]:
    command = ["fish", "--no-config", "-c", "source $argv[1]; complete -C $argv[2]", str(script), line]
    done = subprocess.run(command, cwd=folder, env=environ, check=True, capture_output=True, text=True)
    return {entry.split("\t")[0] for entry in done.stdout.split("\n")}


def of_zsh(script: Path, line: str, environ: dict[str, str], folder: Path) -> set[str]:
    """zsh completes at a terminal only: a line is typed there, Ctrl-X d lists what there is, Ctrl-U takes the line away."""
    set_up = (
        f"PS1='READY> '; fpath=({script.parent} $fpath); autoload -U compinit; compinit -u -d {folder / '.d'}; LISTMAX=999; "
        "zstyle ':completion:*' force-list always; bindkey '^Xd' list-choices; print SET''UP\n"
    )
    child, terminal = pty.fork()
    if child == 0:  # pragma: no cover: the other process
        os.chdir(folder)
        os.execvpe("zsh", ["zsh", "-f", "-i"], environ)
    try:
        os.write(terminal, set_up.encode())
        _read_until(terminal, r"SETUP(?s:.*)READY>")
        os.write(terminal, f"{line}\x18d\x15print DO''NE\n".encode())
        text = _read_until(terminal, "DONE")
    finally:
        os.close(terminal)
        os.waitpid(child, 0)
    return set(re.split(r"[\s\x1b\x07]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", " ", text)))


def _read_until(terminal: int, wanted: str, limit_s: float = 60.0) -> str:
    text, end_s = "", time.monotonic() + limit_s
    while not re.search(wanted, text):
        ready, _, _ = select.select([terminal], [], [], max(0.0, end_s - time.monotonic()))
        assert ready, f"{wanted} did not come: {text!r}"
        text += os.read(terminal, 65536).decode(errors="replace")
    return text


ASK: dict[str, Callable[[Path, str, dict[str, str], Path], set[str]]] = {"bash": of_bash, "zsh": of_zsh, "fish": of_fish}


@pytest.fixture(scope="module", params=SHELLS)
def shell(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict[str, str], Path]:
    """(name, script, environment, folder with a file and a Hub's cache of one model)."""
    name = str(request.param)
    if shutil.which(name) is None:
        pytest.skip(f"there is no {name} here")
    folder = tmp_path_factory.mktemp(name)
    (folder / "own.gguf").touch()
    (folder / ".hub" / "models--Qwen--Qwen3-0.6B").mkdir(parents=True)
    script = folder / ".completions" / {"zsh": "_octavo"}.get(name, "octavo")
    script.parent.mkdir()
    script.write_text(completion_script(name))
    environ = {**os.environ, "HF_HUB_CACHE": str(folder / ".hub"), "HOME": str(folder), "TERM": "dumb", "COLUMNS": "200"}
    environ.pop("HF_HOME", None)
    return name, script, environ, folder


@pytest.mark.parametrize(("line", "offered", "not_offered"), OFFERS, ids=[offer[0].strip() for offer in OFFERS])
def test_what_a_shell_offers(
    shell: tuple[str, Path, dict[str, str], Path], line: str, offered: set[str], not_offered: set[str]
) -> None:
    name, script, environ, folder = shell
    found = ASK[name](script, line, environ, folder)
    assert offered <= found, sorted(found)
    assert not not_offered & (found - set(line.split())), sorted(found)


def test_the_models_of_a_cache_that_lies_elsewhere(shell: tuple[str, Path, dict[str, str], Path]) -> None:
    name, script, environ, folder = shell
    (folder / ".xdg" / "huggingface" / "hub" / "models--else--where").mkdir(parents=True)
    environ = {**environ, "XDG_CACHE_HOME": str(folder / ".xdg")}
    del environ["HF_HUB_CACHE"]
    assert "else/where" in ASK[name](script, "octavo serve ", environ, folder)


@pytest.mark.parametrize("name", SHELLS)
def test_every_flag_is_there_and_octavo_is_not_run_at_tab(name: str) -> None:
    text = completion_script(name)
    assert not re.search(r"[(`]octavo", text)
    for key, field in ServerConfig.model_fields.items():
        flag = flag_name(key)[2:]
        assert re.search(rf"\b{flag}\b", text), flag
        assert all(choice in text for choice in choices_of(field))


def test_every_command_is_completed() -> None:
    assert set(command_parsers()) == set(SUMMARIES) == set(_COMMANDS)


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", "bash"]) == 0
    assert capsys.readouterr().out == completion_script("bash")
    with pytest.raises(SystemExit) as caught:
        run(["completion", "csh"])
    assert caught.value.code == 2
    assert "bash" in capsys.readouterr().err
