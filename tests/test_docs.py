"""The documents: every link and anchor leads somewhere, every setting and every sentence that users may meet is explained."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from server.config import ServerConfig
from server.config_sources import shipped_defaults
from server.errors import _HTTP_MESSAGES, _TABLE
from server.flags import GROUPS, default_of, flag_name, group_of
from server.limits import _REFUSALS
from server.sse import PING_INTERVAL_S
from tests.user_messages import logged_troubles, startup_errors

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
TROUBLES = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
FIELDS = ServerConfig.model_fields


def prose(path: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings: lower case, no punctuation, hyphens for spaces; a number behind repeated ones."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        number = next(n for n in range(100) if (f"{anchor}-{n}" if n else anchor) not in found)
        found.add(f"{anchor}-{number}" if number else anchor)
    return found | set(re.findall(r'<a id="([^"]+)"', path.read_text(encoding="utf-8")))


def links(path: Path) -> Iterator[tuple[str, str]]:
    """(file, anchor) of each link that stays within the repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if not re.match(r"[a-z]+:", target):
            name, _, anchor = target.partition("#")
            yield name, anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for name, anchor in links(page):
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: there is no {name}"
        if anchor:
            assert target.suffix != ".md" or anchor in anchors(target), f"{page.name}: {target.name} has no heading #{anchor}"


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {(ROOT / name).resolve() for name, _ in links(ROOT / "README.md")}
    assert [page.name for page in DOCS if page not in linked] == []


def test_the_map_names_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| in `(\w+)/` \| what \|\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert [folder for folder, _ in tables] == ["engine", "server", "scripts"]
    for folder, rows in tables:
        for name in re.findall(r"`([\w/.*]+)`", " ".join(row.split("|")[1] for row in rows.splitlines())):
            patterns = (name, f"{name}.py", f"**/{name}.py")
            assert any(any((ROOT / folder).glob(pattern.rstrip("/"))) for pattern in patterns), f"there is no {folder}/{name}"


def test_the_table_of_settings_is_that_of_the_program() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", text, re.MULTILINE))
    shipped = shipped_defaults()
    for group, title in GROUPS.items():
        rows = re.findall(r"^\| (.*?) \| (.*?) \|", sections[title], re.MULTILINE)
        given = {re.findall(r"`(--[a-z-]+)`", first)[-1]: default for first, default in rows if "`--" in first}
        expected = {
            flag_name(key): default_of(key, field, shipped) for key, field in FIELDS.items() if group_of(field) == group
        }
        assert given == expected


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_that_are_named_exist(page: Path) -> None:
    """In the pages that speak of `octavo serve` alone."""
    if page.name not in ("configuration.md", "tuning.md", "troubleshooting.md"):
        return
    others = {"--config", "--memory", "--help", "--gpus", "--pid", "--cpunodebind", "--membind", "--no-strict", "--model"}
    others |= {
        "--json",
        "--concurrency",
        "--num-requests",
        "--input-len",
        "--output-len",
        "--no-cpu-kernels",
        "--no-cuda-graphs",
    }
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text(encoding="utf-8")))
    assert {name for name in named - others if name[2:].replace("-", "_") not in FIELDS} == set()


def test_how_long_a_stream_may_be_silent() -> None:
    """One that was heard just after a look is found quiet by the look after the next."""
    pages = {path.stem: path.read_text(encoding="utf-8") for path in DOCS}
    most_s = 2 * PING_INTERVAL_S
    assert f"After {PING_INTERVAL_S} to {most_s} quiet seconds, and every {PING_INTERVAL_S} s then" in pages["api"]
    assert re.search(r"never\s+silent for more than ten seconds", pages["deploy"]) and most_s == 10
    assert f"read timeout above {most_s} s" in pages["troubleshooting"]


def test_metrics_that_show_a_symptom_exist() -> None:
    known = set(re.findall(r"^\| `(\w+)", (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8"), re.MULTILINE))
    known |= {"process_cpu_seconds_total"}
    known |= {f"{name}_total" for name in known}
    text = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\*\*Shown by\*\*(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    assert len(shown) == text.count("**Shown by**") > 8
    named = {name for part in shown for name in re.findall(r"`([a-z]+_[a-z_]+)(?:\{.*?\})?`", part)}
    assert len(named) > 12 and named <= known, named - known


def quotes() -> list[list[str]]:
    """Each sentence that the page quotes, as its fixed parts."""
    found = re.findall(r"``(.+?)``|`([^`\n]+)`", TROUBLES)
    return [[part.strip() for part in (double.strip() or single).split("…") if part.strip()] for double, single in found]


def is_explained(sentence: str) -> bool:
    """Whether a quote of some length has its parts in the sentence, in their order."""
    for parts in quotes():
        position = 0
        for part in parts:
            position = sentence.find(part, position)
            if position < 0:
                break
            position += len(part)
        else:
            if sum(map(len, parts)) >= min(8, len(sentence.replace("…", "").strip())):
                return True
    return False


def letters(sentence: str) -> int:
    return len(re.sub(r"[^a-z]", "", sentence.lower()))


@pytest.mark.parametrize(("sentence", "place"), startup_errors().items(), ids=lambda each: None)
def test_every_error_of_a_start_is_explained(sentence: str, place: str) -> None:
    if letters(sentence) < 8:
        pytest.skip("all of the sentence is made elsewhere")
    assert is_explained(sentence), f"docs/troubleshooting.md does not quote {sentence!r} ({place})"


@pytest.mark.parametrize(("sentence", "place"), logged_troubles().items(), ids=lambda each: None)
def test_every_warning_of_the_log_is_explained(sentence: str, place: str) -> None:
    sentence = re.sub(r"%[.\d]*[sdgf]", "…", sentence)
    if letters(sentence) < 8:
        pytest.skip("all of the sentence is made elsewhere")
    assert is_explained(sentence), f"docs/troubleshooting.md does not quote {sentence!r} ({place})"


def test_every_error_code_has_its_section() -> None:
    api = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    table = re.search(r"^\| code \| status \| meaning \|\n\|[-|]+\n((?:\|.*\n)+)", api, re.MULTILINE)
    assert table
    codes = {code for row in table[1].splitlines() for code in re.findall(r"`(\w+)`", row.split("|")[1])}
    codes |= {cls.default_code for cls, _, _ in _TABLE if cls.default_code} | {code for _, code in _REFUSALS.values()}
    codes |= {code for _, code in _HTTP_MESSAGES.values()}
    section = TROUBLES[TROUBLES.index("## Errors of requests") :]
    assert {code for code in codes if not re.search(rf"\b{code}\b", section)} == set()


def test_every_alert_leads_to_its_section() -> None:
    rules = yaml.safe_load((ROOT / "configs" / "alerts.yml").read_text(encoding="utf-8"))
    alerts = [rule for group in rules["groups"] for rule in group["rules"] if "alert" in rule]
    for alert in alerts:
        page, _, anchor = alert["annotations"]["runbook"].partition("#")
        assert anchor in anchors(ROOT / page), f"{alert['alert']}: {page} has no heading #{anchor}"
        assert alert["alert"] in TROUBLES, f"{alert['alert']} is not named in its section"
