"""The report in words: report.md for a terminal, report.html to show to a colleague."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from dpo4rec_jax.config import Config, dump_config
from dpo4rec_jax.stages import report_plots as plots
from dpo4rec_jax.stages.report_costs import costs_of, device_hours
from dpo4rec_jax.stages.report_evidence import Evidence
from dpo4rec_jax.stages.report_scores import HIGHER, LEVEL, LOWER, UNDECIDED
from dpo4rec_jax.stages.report_warnings import warnings_of

TEMPLATES = Path(__file__).parent / "templates"
CUTOFFS = (1, 3, 5, 7)
KAR_METRICS = [f"{name}@{k}" for name in ("ndcg", "map") for k in CUTOFFS]
STANDARD_METRICS = [f"{metric}_std" for metric in KAR_METRICS]
MARKS = {"backbone": "†", "kar": "‡"}
SPACE = "\u202f"  # narrow, and never the end of a line
MINUS, DASH = "\u2212", "\u2013"


@dataclass(frozen=True)
class Published:
    """A figure of Sun et al. 2024 (arXiv 2410.05939) on the same data."""

    dataset: str
    b: str
    metric: str
    relative_gain: float
    setting: str


PUBLISHED = (
    Published("amazon-beauty", "kar-external", "ndcg@5", 0.0392, "PRM, KAR with ChatGPT-4o"),
    Published("ml-1m", "backbone", "map@5", 0.0145, "DLCM, Llama-3.1-8B"),
)


def render_html(document: Mapping[str, Any], evidence: Evidence, config: Config) -> str:
    """One self-contained page; every text is escaped by the template."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        gain=gain,
        interval=interval,
        p=p_value,
        number=number,
        label=plots.label,
        metric=metric,
        seconds=in_time,
    )
    return environment.get_template("report.html.j2").render(
        report=document,
        evidence=evidence,
        headline=headline(document),
        lede=lede(document),
        warnings=warnings_of(document, evidence, config),
        tables=(
            ("KAR's definition", KAR_METRICS),
            ("Standard definition", STANDARD_METRICS),
        ),
        cell=lambda row, name: _cell(document, row, name),
        marks=MARKS,
        scale=_Scale(document["comparisons"]),
        published=_published(document),
        plots=_plots(document, evidence),
        costs=costs_of(document, evidence, config),
        device_hours=device_hours(document),
        changed=changed_settings(config),
        config_yaml=dump_config(config),
        policy=config.policy.path,
        encoder=config.encode.encoder,
    )


def render_markdown(document: Mapping[str, Any]) -> str:
    """Headline, table and comparisons, for a terminal."""
    names = [name for name in KAR_METRICS if name in document["rows"][0]["metrics"]]
    lines = [
        f"# {document['dataset']}, {document['backbone']}",
        "",
        "{} ({}).".format(*headline(document)),
        "",
    ]
    lines += _markdown_table(
        ["method", *map(metric, names)],
        [
            [plots.label(row["method"]), *(_cell_text(document, row, name) for name in names)]
            for row in document["rows"]
        ],
    )
    lines += [
        "",
        f"Means over test lists and {document['seeds']} re-ranker seeds; best in bold; "
        "† above the backbone, ‡ above KAR (p < 0.05 after Holm's correction).",
        "",
    ]
    lines += _markdown_table(
        ["comparison", "metric", "gain", "95 % interval", "p", "p (Holm)", "verdict"],
        [
            [
                f"{plots.label(row['a'])} over {plots.label(row['b'])}",
                metric(row["metric"]),
                gain(row["relative_gain"]),
                interval(row["ci95"]),
                p_value(row["p_value"]),
                p_value(row["p_holm"]),
                row["verdict"],
            ]
            for row in document["comparisons"]
        ],
    )
    for entry in document["alignment"]:
        lines += ["", _reward_sentence(entry)]
    return "\n".join(lines) + "\n"


def headline(document: Mapping[str, Any]) -> tuple[str, str]:
    """What the run found, claiming no more than its interval supports; and that uncertainty."""
    row = _main_comparison(document["comparisons"])
    if row is None:
        return "Nothing to compare: the run has one method only.", ""
    a, b, name = plots.label(row["a"]), plots.label(row["b"]), metric(row["metric"])
    where = f"{name} on {row['n_users']} test users"
    if row["verdict"] in (HIGHER, LOWER):
        size = gain(abs(row["relative_gain"]), signed=False, digits=1)
        claim = f"{a} ranks {size} {row['verdict']} than {b}, by {where}"
    else:
        size = gain(row["relative_gain"], digits=1)
        claim = f"No difference between {a} and {b} was shown: {size} in {where}"
    doubt = f"95{SPACE}% interval {interval(row['ci95'])}, p{SPACE}={SPACE}{p_value(row['p_holm'])}"
    if row["p_holm"] < LEVEL and row["verdict"] == UNDECIDED:
        return claim, f"{doubt}, but within the spread of the re-ranker seeds"
    return claim, f"{doubt} after Holm's correction"


def lede(document: Mapping[str, Any]) -> str:
    """The second sentence: what the texts bring at all, and whether the reward moved."""
    parts = []
    for row in document["comparisons"]:
        if (row["a"], row["b"], row["metric"]) == ("kar", "backbone", "ndcg@5"):
            size = gain(row["relative_gain"], digits=1)
            doubt = ", no difference shown" if row["verdict"] == UNDECIDED else ""
            within = interval(row["ci95"])
            parts.append(f"Unaligned texts (KAR): {size} against the backbone ({within}{doubt}).")
    parts += [_reward_sentence(entry) for entry in document["alignment"]]
    return " ".join(parts)


def _reward_sentence(entry: Mapping[str, Any]) -> str:
    before, after = number(entry["reward_mean_before"]), number(entry["reward_mean_after"])
    size = gain(entry["reward_relative_gain"], digits=1)
    return (
        f"Alignment {entry['round']} moved the mean reward of fresh texts from {before} to {after}"
        f" ({size}, 95{SPACE}% interval {interval(entry['reward_ci95'])})."
    )


def _main_comparison(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The last alignment against KAR, else KAR against the backbone, in ndcg@5."""
    tested = [row for row in rows if row["metric"] == "ndcg@5"]
    aligned = [row for row in tested if row["a"].startswith("dpo4rec-") and row["b"] == "kar"]
    return aligned[-1] if aligned else (tested[0] if tested else None)


@dataclass(frozen=True)
class Cell:
    mean: float | None
    std: float | None
    best: bool
    marks: str


def _cell(document: Mapping[str, Any], row: Mapping[str, Any], name: str) -> Cell:
    values = row["metrics"].get(name, {"mean": None, "std": None})
    means = [other["metrics"].get(name, {}).get("mean") for other in document["rows"]]
    best = max((mean for mean in means if mean is not None), default=None)
    beaten = {
        other["b"]
        for other in document["comparisons"]
        if (other["a"], other["metric"], other["verdict"]) == (row["method"], name, HIGHER)
    }
    marks = "".join(mark for method, mark in MARKS.items() if method in beaten)
    is_best = values["mean"] is not None and values["mean"] == best and len(means) > 1
    return Cell(values["mean"], values["std"], is_best, marks)


def _cell_text(document: Mapping[str, Any], row: Mapping[str, Any], name: str) -> str:
    cell = _cell(document, row, name)
    text = number(cell.mean)
    return (f"**{text}**" if cell.best else text) + cell.marks


class _Scale:
    """Places on a common axis, in percent of its width, for the intervals of all comparisons."""

    def __init__(self, comparisons: Sequence[Mapping[str, Any]]):
        ends = [end for row in comparisons for end in row["ci95_users_and_seeds"] or ()]
        ends += [end for row in comparisons for end in row["ci95"] or ()]
        self._low, high = min([0.0, *ends]), max([0.0, *ends])
        self._width = (high - self._low) or 1.0

    def __call__(self, value: float) -> str:
        return f"{3 + 94 * (value - self._low) / self._width:.2f}%"


def _published(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The paper's figures on this data set, beside ours of the same comparison where there is."""
    found = []
    last = document["rows"][-1]["method"]
    for figure in PUBLISHED:
        if figure.dataset == document["dataset"]:
            ours = [
                row
                for row in document["comparisons"]
                if (row["a"], row["b"], row["metric"]) == (last, figure.b, figure.metric)
            ]
            found.append({"figure": figure, "ours": ours[0] if ours else None})
    return found


def _plots(document: Mapping[str, Any], evidence: Evidence) -> dict[str, list[dict[str, Any]]]:
    rows = document["rows"]
    quality = [(f"{metric(name)}", plots.quality(rows, name)) for name in ("ndcg@5", "map@5")]
    training = [
        ("Reward of fresh texts, same judge before and after", plots.rewards(document["alignment"]))
    ]
    for name, title in (
        ("loss", "DPO loss"),
        ("margin", "Reward margin"),
        ("accuracy", "Accuracy"),
    ):
        training.append((title, plots.curves(evidence.curves, name, title)))
    gaps = []
    for pairs in evidence.pairs:
        of = f", round {pairs.round}" if len(evidence.pairs) > 1 else ""
        for kind, values, unit in (
            ("Score", pairs.score_gap_x, "reward, chosen minus rejected"),
            ("Length", pairs.length_gap_x, "tokens, chosen minus rejected"),
        ):
            title = f"{kind} gap of the pairs{of}"
            gaps.append((title, plots.gaps(values, f"{kind}-{pairs.round}", unit, title)))
    return {
        name: [{"title": title, "svg": Markup(svg)} for title, svg in drawn if svg is not None]
        for name, drawn in (("quality", quality), ("training", training), ("gaps", gaps))
    }


def changed_settings(config: Config) -> list[tuple[str, Any, Any]]:
    """(key, value, default) of every setting that is not at its default."""
    ours, theirs = config.model_dump(mode="json"), Config().model_dump(mode="json")
    return list(_differences(ours, theirs, ""))


def _differences(ours: Any, theirs: Any, prefix: str):
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            yield from _differences(value, theirs.get(key), f"{prefix}.{key}" if prefix else key)
    elif ours != theirs:
        yield prefix, ours, theirs


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    ]


def metric(name: str) -> str:
    return name.removesuffix("_std").upper()


def number(value: float | None, digits: int = 4) -> str:
    return DASH if value is None else f"{value:.{digits}f}".replace("-", MINUS)


def gain(value: float | None, *, signed: bool = True, digits: int = 2) -> str:
    """A relative change in percent, with a true minus and a space that does not break."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{100 * value:{'+' if signed else ''}.{digits}f}{SPACE}%".replace("-", MINUS)


def interval(ends: Sequence[float] | None, digits: int = 1) -> str:
    if ends is None:
        return "not known"
    return f"{gain(ends[0], digits=digits)} to {gain(ends[1], digits=digits)}"


def p_value(value: float) -> str:
    return f"{value:.2g}" if value >= 0.1 else f"{value:.3f}" if value >= 0.001 else f"{value:.4f}"


def in_time(seconds: float) -> str:
    """`12.3 s`, from two minutes on `2 min 5 s`, from two hours on `2 h 13 min`."""
    if seconds < 120:
        return f"{seconds:.1f}{SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes}{SPACE}min {rest}{SPACE}s"
    return f"{minutes // 60}{SPACE}h {minutes % 60}{SPACE}min"
