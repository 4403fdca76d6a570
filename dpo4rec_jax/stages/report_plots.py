"""The report's plots, as SVG that takes its colours and type from the page around it.

matplotlib draws each colour as a placeholder that is then replaced by a CSS variable, so that one
drawing serves light and dark. Plots are drawn at the width of a phone: on a wide screen they stand
in columns, and their type is never scaled to nothing.
"""

from __future__ import annotations

import functools
import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

# Placeholder -> CSS variable of the page.
VARIABLES = {
    "#000001": "--ink",
    "#000002": "--muted",
    "#000003": "--rule",
    "#000004": "--ours",
    "#000005": "--kar",
    "#000006": "--base",
    "#000007": "--external",
    "#000008": "--good",
    "#000009": "--bad",
}
INK, MUTED, RULE, OURS, KAR, BASE, EXTERNAL, GOOD, BAD = VARIABLES
ARM_COLOURS = {"backbone": BASE, "kar": KAR, "kar-external": EXTERNAL}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10.5,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.formatter.useoffset": False,
}
SIZE = (5.5, 3.3)  # inches of 72 units: 396 wide, a phone's column
# The least that an axis spans: what moves by less has not moved, and must not look as if it had.
LEAST_SPAN = {"loss": 0.05, "margin": 0.05, "accuracy": 0.2, "reward": 0.05}
Curve = tuple[Sequence[int], Sequence[float]]
Point = tuple[float | int, float | int]


def styled(plot: Callable[..., str | None]) -> Callable[..., str | None]:
    @functools.wraps(plot)
    def in_style(*arguments: Any, **named: Any) -> str | None:
        with rc_context(STYLE):
            return plot(*arguments, **named)

    return in_style


@styled
def quality(rows: Sequence[Mapping[str, Any]], metric: str) -> str | None:
    """Each arm's mean with its 95 % interval over users, single seeds beside it; a line joins the
    rounds."""
    shown = [row for row in rows if row["metrics"].get(metric, {}).get("ci95") is not None]
    if not shown:
        return None
    figure, axes = _figure()
    rounds = [
        (x, row["metrics"][metric]["mean"])
        for x, row in enumerate(shown)
        if row["method"] == "kar" or row["method"].startswith("dpo4rec-")
    ]
    axes.plot(*zip(*rounds, strict=True), color=OURS, linewidth=1.2, alpha=0.6, zorder=1)
    for x, row in enumerate(shown):
        values, colour = row["metrics"][metric], ARM_COLOURS.get(row["method"], OURS)
        seeds, (low, high) = values["by_seed"], values["ci95"]
        jitter = np.linspace(0.12, 0.24, len(seeds)) if len(seeds) > 1 else []
        axes.scatter(x + np.asarray(jitter), seeds[: len(jitter)], s=9, color=colour, alpha=0.45)
        axes.plot([x, x], [low, high], color=colour, linewidth=2.2, solid_capstyle="butt")
        axes.plot(x, values["mean"], "o", color=colour, markersize=7, zorder=3)
        _note(axes, f"{values['mean']:.4f}", (x, high), (0, 4), "center", "bottom")
    names = [label(row["method"]).replace(" (", "\n(") for row in shown]
    axes.set_xticks(range(len(shown)), names)
    axes.tick_params(axis="x", length=0, labelcolor=INK)
    axes.grid(visible=False, axis="x")
    axes.set_xlim(-0.5, len(shown) - 0.5)
    axes.margins(y=0.12)
    return _svg(figure, f"quality-{metric}", f"{metric.upper()} of each method")


@styled
def curves(by_round: Mapping[int, Mapping[str, Curve]], name: str, title: str) -> str | None:
    """A training curve, a line a round of alignment; held-out pairs before and after it."""
    lines = {round: named[name] for round, named in by_round.items() if name in named}
    if not lines:
        return None
    figure, axes = _figure(height=2.7)
    for place, (round, (steps, values)) in enumerate(sorted(lines.items())):
        line = ("-", "--", ":", "-.")[place % 4]
        marker = "." if len(steps) < 12 else ""
        of = f"alignment {round + 1}" if len(lines) > 1 else "training"
        axes.plot(steps, values, marker + line, color=OURS, label=of)
        held_out = by_round[round].get(f"heldout/{name}")
        if held_out is not None:
            first = "held-out pairs" if place == 0 else None
            axes.plot(*held_out, "o", color=INK, fillstyle="none", markersize=7, label=first)
    if len(axes.get_lines()) > 1:
        axes.legend(fontsize=9.5, labelcolor=INK)
    axes.set_ylim(_widened(axes.get_ylim(), LEAST_SPAN[name]))
    if name == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimizer step")
    return _svg(figure, f"curve-{name}", title)


@styled
def rewards(alignment: Sequence[Mapping[str, Any]]) -> str | None:
    """Mean reward of fresh texts before and after each alignment, by the same judge."""
    if not alignment:
        return None
    figure, axes = _figure(height=1.3 + 0.7 * len(alignment))
    for place, entry in enumerate(alignment):
        before, after = entry["reward_mean_before"], entry["reward_mean_after"]
        axes.plot([before, after], [place, place], color=OURS, linewidth=2.2, alpha=0.5)
        outward = -1 if before <= after else 1
        for name, value, colour, side in (
            ("before", before, KAR, outward),
            ("after", after, OURS, -outward),
        ):
            text = f"{name} {value:.4f}" if side < 0 else f"{value:.4f} {name}"
            axes.plot(value, place, "o", color=colour, markersize=8)
            _note(axes, text, (value, place), (9 * side, 0), "right" if side < 0 else "left")
    names = [f"alignment {entry['round']}" for entry in alignment]
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(visible=False, axis="y")
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.margins(x=0.55)
    axes.set_xlim(_widened(axes.get_xlim(), LEAST_SPAN["reward"]))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel("mean reward of a text")
    return _svg(figure, "rewards", "Mean reward before and after each alignment")


@styled
def gaps(values: np.ndarray, name: str, xlabel: str, title: str) -> str | None:
    """Distribution of what chosen texts have more than rejected ones; the mean is marked."""
    if not len(values):
        return None
    figure, axes = _figure(height=2.7)
    axes.hist(values, bins=_bins(values), color=OURS, alpha=0.75)
    mean = float(np.mean(values))
    axes.axvline(mean, color=INK, linewidth=1.2)
    axes.text(
        mean,
        1.02,
        f"mean {mean:.3g}".replace("-", "\u2212"),
        transform=axes.get_xaxis_transform(),
        ha="center",
        va="bottom",
        fontsize=9.5,
    )
    if np.min(values) < 0 < np.max(values):
        axes.axvline(0.0, color=MUTED, linewidth=1.0, linestyle=":")
    axes.grid(visible=False, axis="x")
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_ylabel("pairs")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=np.issubdtype(values.dtype, np.integer)))
    axes.set_xlabel(xlabel)
    return _svg(figure, f"gap-{name}", title)


def label(method: str) -> str:
    """A method's name as the page writes it."""
    if method.startswith("dpo4rec-"):
        return f"DPO4Rec-{method.rpartition('-')[2]}"
    return {"backbone": "Backbone", "kar": "KAR", "kar-external": "KAR (external)"}.get(
        method, method
    )


def _widened(limits: tuple[float, float], least: float) -> tuple[float, float]:
    """The same limits, or so far apart around their middle."""
    low, high = limits
    half, middle = max(high - low, least) / 2, (low + high) / 2
    return float(middle - half), float(middle + half)


def _bins(values: np.ndarray) -> list[float] | int:
    """About 40 bins; whole numbers stand in the middle of theirs."""
    if not np.issubdtype(values.dtype, np.integer):
        return min(40, max(5, len(np.unique(values))))
    low, high = int(values.min()), int(values.max())
    step = (high - low) // 40 + 1
    return (np.arange(low, high + step + 1, step) - 0.5).tolist()


def _figure(height: float = SIZE[1]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(SIZE[0], height), layout="constrained")
    return figure, figure.subplots()


def _note(
    axes: Axes,
    text: str,
    at: Point,
    shift: Point,
    ha: Literal["left", "center", "right"],
    va: Literal["bottom", "center"] = "center",
) -> None:
    """A number beside a point, `shift` points away from it."""
    axes.annotate(text, at, xytext=shift, textcoords="offset points", ha=ha, va=va, fontsize=9.5)


def _svg(figure: Figure, name: str, title: str) -> str:
    """Markup to stand in a page: ids of its own, no fixed size, the page's font and colours."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    width, height = figure.get_size_inches() * 72
    opening = (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{html.escape(title)}">'
    )
    svg = re.sub(r"^<svg[^>]*>", opening, svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(?:xlink:)?href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for placeholder, variable in VARIABLES.items():
        svg = svg.replace(placeholder, f"var({variable})")
    return svg.strip()
