"""The frame of the ideas' scripts, with an idea that measures nothing."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import ideas
import ideas_flash_attention
import ideas_kv_cache
import pytest

from engine.errors import ModelLoadError


def idea(measured: list[argparse.Namespace] | None = None) -> ideas.Idea:
    def measure(args: argparse.Namespace) -> ideas.Results:
        if measured is not None:
            measured.append(args)
        return {"value": 3}

    return ideas.Idea(
        name="some-idea",
        description="What it is.",
        measure=measure,
        tables=lambda results: [ideas.Table("Values", ("name", "value"), [["a", str(results["value"])], ["longer", "10"]])],
        summary=lambda results: f"It is {results['value']}.",
        plots={"": ideas.Plot(lambda results, figure: None, "nothing")},
        arguments=lambda parser: parser.add_argument("--lengths", type=int, nargs="+") and None,
    )


def test_figures_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ideas, "has_matplotlib", lambda: False)
    measured: list[argparse.Namespace] = []
    assert ideas.run(idea(measured), ["--device", "cpu"]) == 2
    assert not measured, "refused before anything is measured"
    error = capsys.readouterr().err
    assert "matplotlib" in error and "octavo[plots]" in error and "--json FILE" in error
    kept = tmp_path / "new" / "figures.json"
    assert ideas.run(idea(), ["--device", "cpu", "--json", str(kept), "--lengths", "1", "2"]) == 0
    record = json.loads(kept.read_text())
    assert record["command"] == ".venv/bin/python scripts/ideas_some_idea.py --device cpu --lengths 1 2"
    assert (record["idea"], record["device"], record["results"]) == ("some-idea", "cpu", {"value": 3})
    assert "torch" in record["machine"]


@pytest.mark.parametrize("text", ['{"idea": "another"}', "no JSON"])
def test_figures_that_are_none_of_this_idea(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "figures.json"
    kept.write_text(text)
    assert ideas.run(idea(), ["--from-json", str(kept), "--json", str(tmp_path / "copy.json")]) == 2
    assert "scripts/ideas_some_idea.py" in capsys.readouterr().err


def test_smallest_draws_nothing_unless_told_where(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ideas, "has_matplotlib", lambda: False)
    assert ideas.run(idea(), ["--device", "cpu", "--smallest"]) == 0
    assert "It is 3." in capsys.readouterr().out


def test_tables() -> None:
    table = idea().tables({"value": 3})[0]
    assert table.markdown() == "Values:\n\n| name | value |\n|---|---|\n| a | 3 |\n| longer | 10 |"
    assert table.text() == "Values\n\nname    value\n------  -----\na           3\nlonger     10"


def test_numbers() -> None:
    assert [ideas.number(x) for x in (None, 0, 0.5, 12.345, 1234.5, 1e-5)] == ["–", "0", "0.5", "12.3", "1,234", "1.0e-05"]
    assert [ideas.size(x) for x in (None, 64, 2048, 150 * 2**20, 3 * 2**30)] == ["–", "64 B", "2 KiB", "150 MiB", "3 GiB"]
    assert [ideas.percent(x) for x in (None, 0.5, 0.9991, 0.99999, 1.0)] == ["–", "50.0%", "99.9%", "100%", "100%"]


def test_only_the_named_part_of_a_page_is_replaced() -> None:
    page = "<!-- figures: a cpu -->\n1\n<!-- end -->\n<!-- figures: a cuda -->\n2\n<!-- end -->\n"
    assert ideas.replace_part(page, "b cpu", "new") is None
    new = ideas.replace_part(page, "a cuda", r"new \1")
    assert new == "<!-- figures: a cpu -->\n1\n<!-- end -->\n<!-- figures: a cuda -->\n\nnew \\1\n\n<!-- end -->\n"


def test_what_the_engine_refuses_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def measure(args: argparse.Namespace) -> ideas.Results:
        raise ModelLoadError("there is no such model")

    assert ideas.run(replace(idea(), measure=measure), ["--device", "cpu", "--smallest"]) == 2
    assert capsys.readouterr().err == "scripts/ideas_some_idea.py: there is no such model\n"


@pytest.mark.parametrize("script", [ideas_kv_cache, ideas_flash_attention])
@pytest.mark.parametrize("length", ["0", "-1", "x"])
def test_lengths_are_positive(script: ModuleType, length: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ideas.run(script.IDEA, ["--smallest", "--lengths", length])
    assert f"must be a whole number from 1 on, got '{length}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "ticks"),
    [((0.16, 2.4), ["0.1", "0.2", "0.5", "1", "2"]), ((0.1, 20_000), ["0.1", "1", "10", "100", "1,000", "10,000"])],
)
def test_ticks_of_a_logarithmic_axis_are_plain_numbers(values: tuple[float, float], ticks: list[str]) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 2], values)
    ideas.log_axis(axes, "seconds")
    FigureCanvasAgg(figure).draw()
    low, high = axes.get_ylim()
    shown = [tick.label1.get_text() for tick in axes.yaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert set(shown) <= set(ticks) and len(shown) >= len(ticks) - 1
    assert not any(tick.label1.get_text() for tick in axes.yaxis.get_minor_ticks())
