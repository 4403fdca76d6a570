"""Stage report: what the run found, as report.json, report.md and report.html at the workspace."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from dpo4rec_jax.config import InputError
from dpo4rec_jax.stages import report_evidence, report_page
from dpo4rec_jax.stages.plan import plan
from dpo4rec_jax.stages.report_scores import Resampled, compared, load_scores
from dpo4rec_jax.workspace import Stage, write_json, write_text


def run(stage: Stage) -> None:
    workspace, rounds = stage.workspace, stage.config.rounds
    evidence = report_evidence.gather(workspace, rounds)
    document = build(stage, evidence)
    write_json(workspace.path / "report.json", document)
    write_text(workspace.path / "report.md", report_page.render_markdown(document))
    page = report_page.render_html(document, evidence, stage.config)
    write_text(workspace.path / "report.html", page)


def build(stage: Stage, evidence: report_evidence.Evidence) -> dict[str, Any]:
    """report.json: the table's rows, comparisons paired by test user, alignment, data, times."""
    config, workspace = stage.config, stage.workspace
    evaluated = [workspace.stage_dir("evaluate", round) for round in range(config.rounds + 1)]
    scores = load_scores([directory / "metrics.npz" for directory in evaluated])
    resampling = {"resamples": config.evaluate.resamples, "seed": config.seed}
    resampled = Resampled(scores, **resampling)
    return {
        "dataset": config.data.name,
        "backbone": config.rank.backbone,
        "seeds": config.rank.seeds,
        "rows": [
            {"method": arm, "metrics": {name: resampled.metric(arm, name) for name in metrics}}
            for arm, metrics in scores.value_SL.items()
        ],
        "comparisons": resampled.comparisons(compared(list(scores.value_SL))),
        "alignment": [
            _read_json(directory / "alignment.json", "evaluate") | change.test(**resampling)
            for directory, change in zip(evaluated[1:], evidence.rewards, strict=True)
        ],
        "data": _read_json(workspace.stage_dir("prepare") / "counts.json", "prepare")
        | {
            "texts": {f"round{c.round}": dataclasses.asdict(c) for c in evidence.texts},
            "pairs": {f"round{p.round}": len(p.score_gap_x) for p in evidence.pairs},
        },
        "seconds": report_evidence.seconds_by_step(workspace, plan(config)),
        "versions": report_evidence.versions(),
    }


def _read_json(path: Any, stage: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); run stage {stage} again") from None
