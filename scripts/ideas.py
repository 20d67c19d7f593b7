"""The frame of the scripts that measure one idea each (`ideas_*.py`): their flags, progress, tables, plots and pages.

Such a script makes an `Idea` and gives it to `run`. `measure` returns figures that JSON can hold; tables, the sentence and the
plots are made from those figures alone, so that what was measured on one machine (`--json FILE`) can be drawn on another
(`--from-json FILE`). With `--out FOLDER`, by default docs/ideas, the plots go there, and the idea's part of FOLDER.md, between
two comment lines, is written anew for the device that was measured.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ROOT = Path(__file__).resolve().parent.parent
Results = dict[str, Any]
Item = TypeVar("Item")

# Okabe and Ito's palette, whose colours stay apart for every kind of colour vision (https://jfly.uni-koeln.de/color/).
BLUE, ORANGE, GREEN, PURPLE, RED, SKY, YELLOW = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY, YELLOW)
GREY, INK = "#9AA0A6", "#222222"

_STYLE: Any = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E8EB",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 2.0,
    "lines.markersize": 6,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@dataclass(frozen=True, slots=True)
class Table:
    """Cells are text already. title: a line above it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [f"| {' | '.join(self.columns)} |", "|" + "---|" * len(self.columns)]
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        return "\n".join([f"{self.title}:", "", *lines])

    def text(self) -> str:
        """For a terminal: the first column to the left, the others to the right."""
        widths = [max(len(row[i]) for row in (self.columns, *self.rows)) for i in range(len(self.columns))]
        lines = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in (self.columns, ["-" * width for width in widths], *self.rows)
        ]
        return "\n".join([self.title, "", *(line.rstrip() for line in lines)])


@dataclass(frozen=True, slots=True)
class Plot:
    """draw fills an empty figure of the given size in inches. alt: what it shows, for those who do not see it."""

    draw: Callable[[Results, Figure], None]
    alt: str
    width: float = 10.0
    height: float = 4.4


@dataclass(frozen=True, slots=True)
class Idea:
    """name: of the script, its plots and its part of the page ("kv-cache" for ideas_kv_cache.py). description: the script's
    docstring. plots: by what is added to the name in the file's name, "" for the first. summary: one or two sentences of what
    the figures say. arguments: adds flags of its own."""

    name: str
    description: str
    measure: Callable[[argparse.Namespace], Results]
    tables: Callable[[Results], list[Table]]
    summary: Callable[[Results], str]
    plots: Mapping[str, Plot]
    arguments: Callable[[argparse.ArgumentParser], None] | None = None

    @property
    def script(self) -> str:
        return f"scripts/ideas_{self.name.replace('-', '_')}.py"


def run(idea: Idea, argv: Sequence[str] | None = None) -> int:
    """Measure (or read figures), print the tables, draw the plots and write the page; the exit status."""
    from engine.errors import OctavoError

    args = make_parser(idea).parse_args(argv)
    out = args.out or (None if args.smallest else ROOT / "docs" / "ideas")
    if not has_matplotlib() and out is not None:
        if args.json is None or args.out is not None:
            print(
                "the plots need matplotlib, which is not installed: `scripts/install --dev` or `pip install 'octavo[plots]'` "
                "brings it; or keep the figures with --json FILE and draw them elsewhere with --from-json FILE",
                file=sys.stderr,
            )
            return 2
        out = None
    try:
        record = read_figures(idea, args.from_json) if args.from_json else measure(idea, args)
    except (OSError, ValueError, OctavoError) as error:
        print(f"{idea.script}: {error}", file=sys.stderr)
        return 2
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for table in idea.tables(record["results"]):
        print(f"\n{table.text()}", flush=True)
    print(f"\n{idea.summary(record['results'])}\n{record['machine']}")
    if out is not None:
        write_page(idea, record, out)
    return 0


def measure(idea: Idea, args: argparse.Namespace) -> Results:
    """What `--json` keeps: the figures, where they were measured, and by what."""
    args.device = resolve_device(args.device)
    record = {"idea": idea.name, "device": args.device, "machine": machine(args.device), "command": command(idea, args)}
    # As they come back from a file: what is drawn never depends on the way.
    return record | {"results": json.loads(json.dumps(idea.measure(args)))}


def read_figures(idea: Idea, path: Path) -> Results:
    """What `--json` has kept. Raises OSError, or ValueError where the file is no such thing."""
    record: Results = json.loads(path.read_text(encoding="utf-8"))
    if record.get("idea") != idea.name:
        raise ValueError(f"{path} holds figures of {record.get('idea')!r}, not of {idea.name!r}")
    return record


def make_parser(idea: Idea) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=idea.description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one")
    parser.add_argument("--smallest", action="store_true", help="the smallest size that still shows it, in seconds")
    parser.add_argument("--seed", type=int, default=0, help="of the made-up load")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for the plots; default docs/ideas, and with --smallest none are drawn"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="measure nothing: take the figures from there")
    if idea.arguments:
        idea.arguments(parser)
    return parser


def model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a script that loads a model with `ideas_engine.load`."""
    parser.add_argument("--model", help="demo, a folder, a Hub id, or a shape of scripts/dummy_model.py")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")


def model_name(model: str) -> str:
    """What a reader knows it by."""
    return "SmolLM2-135M-Instruct" if model == "demo" else model


def positive(text: str) -> int:
    """A flag's number of tokens."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


def resolve_device(device: str) -> str:
    """ "cpu" or "cuda". Ends the program where a GPU is asked for that torch does not find."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch finds no usable CUDA device; use --device cpu or auto")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def command(idea: Idea, args: argparse.Namespace) -> str:
    """What to type to measure it again: the flags that differ from their defaults, but where the results go."""
    parser, words = make_parser(idea), [".venv/bin/python", idea.script]
    for action in parser._actions:
        value = getattr(args, action.dest, action.default)
        if action.dest in ("out", "json", "from_json", "help") or value == action.default:
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [action.option_strings[0], *map(str, values)]
    return " ".join(words)


# -- the machine ------------------------------------------------------------------------------------------------------


def machine(device: str) -> str:
    """One line: processor or card, cores, versions, and whether others were at work."""
    import psutil
    import torch

    from engine.host_cores import usable_cores

    cores = usable_cores()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, {cores} cores, {versions}"
    at_work = psutil.cpu_percent(interval=0.5) / 100 * (psutil.cpu_count() or 1)  # this process waits meanwhile
    busy = f", other work on it ({at_work:.1f} cores)" if at_work > 0.3 else ""
    return f"{cpu_name()}, {cores} core{'s' * (cores != 1)}, {versions}{busy}"


def cpu_name(path: Path = Path("/proc/cpuinfo")) -> str:
    """As the system calls it, with the widest vector instructions that our kernels ask about."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = set((re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE) or ["", ""])[1].split())
    widest = next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "")
    return " ".join(filter(None, [found[1].strip() if found else platform.machine(), f"({widest})" if widest else ""]))


# -- progress and numbers ---------------------------------------------------------------------------------------------


def progress(items: Iterable[Item], label: str, *, total: int | None = None, unit: str = "case") -> tqdm[Item]:
    """The items, with a bar on stderr; `set_postfix_str` says which one is under way."""
    return tqdm(items, desc=label, total=total, unit=unit, file=sys.stderr, dynamic_ncols=True)


def number(value: float | None) -> str:
    """Three digits that matter, thousands set apart; a dash for None."""
    if value is None:
        return "–"
    if value and abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}%" if share < 0.9995 or share > 1 else "100%"


def size(num_bytes: float | None) -> str:
    """Bytes in the largest binary unit that leaves a number of at least 1."""
    if num_bytes is None:
        return "–"
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while abs(num_bytes) >= 1024 and power < len(units) - 1:
        num_bytes, power = num_bytes / 1024, power + 1
    return f"{num_bytes:,.0f} {units[power]}" if num_bytes >= 100 or power == 0 else f"{num_bytes:.3g} {units[power]}"


# -- plots and the page -----------------------------------------------------------------------------------------------


def has_matplotlib() -> bool:
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def length_axis(axes: Axes, lengths: Sequence[int], label: str = "sequence length, tokens") -> None:
    """A logarithmic x axis with the measured lengths as its ticks."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(lengths), [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel(label)


def log_axis(axes: Axes, label: str) -> None:
    """A logarithmic y axis, around what is drawn already, whose ticks are plain numbers: more of them where it is short."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axes.yaxis.set_major_formatter(lambda value, position: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(label)


def draw(plot: Plot, results: Results, footer: str, path: Path) -> None:
    """One PNG with the machine at its foot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import ScalarFormatter

    with matplotlib.rc_context(_STYLE):
        figure = pyplot.figure(figsize=(plot.width, plot.height), layout="constrained")
        figure.get_layout_engine().set(rect=(0.0, 0.3 / plot.height, 1.0, 1.0 - 0.35 / plot.height))  # type: ignore[union-attr,call-arg]
        plot.draw(results, figure)
        for axis in [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]:
            if isinstance(axis.get_major_formatter(), ScalarFormatter):
                axis.set_major_formatter(lambda value, position: f"{value:,.10g}")  # thousands apart, as in the tables
        figure.text(0.01, 0.06 / plot.height, footer, fontsize=7.5, color="#5F6368", va="bottom")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, metadata={"Software": None})
        pyplot.close(figure)


def write_page(idea: Idea, record: Results, out: Path) -> None:
    """The plots into `out`, and the idea's part for this device of the page beside it, where the page has one."""
    results, device = record["results"], record["device"]
    parts = []
    for suffix, plot in idea.plots.items():
        path = out / f"{'-'.join(filter(None, [idea.name, suffix, device]))}.png"
        draw(plot, results, record["machine"], path)
        print(f"wrote {path}")
        parts.append(f"![{plot.alt}]({out.name}/{path.name})")
    parts += [table.markdown() for table in idea.tables(results)]
    text = "\n\n".join([idea.summary(results), *parts, f"Measured on {record['machine']}, by", f"    {record['command']}"])
    page = out.with_suffix(".md")
    if page.is_file():
        old = page.read_text(encoding="utf-8")
        new = replace_part(old, f"{idea.name} {device}", text)
        if new is not None:
            page.write_text(new, encoding="utf-8")
            print(f"wrote the part of {idea.name} on {device} in {page}")


def replace_part(page: str, name: str, text: str) -> str | None:
    """The page with `text` between `<!-- figures: NAME -->` and the next `<!-- end -->`; None where it has no such lines."""
    pattern = re.compile(rf"(<!-- figures: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(page):
        return None
    return pattern.sub(lambda found: f"{found[1]}\n{text}\n\n{found[2]}", page, count=1)
