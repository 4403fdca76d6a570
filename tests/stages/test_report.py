"""Stage report on planted results: the numbers, what the words claim, and the page itself."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path

import numpy as np
import pytest
import report_workspace as fixture

from dpo4rec_jax.config import InputError
from dpo4rec_jax.stages import report, report_page
from dpo4rec_jax.stages.report_scores import HIGHER, LOWER, UNDECIDED, compared, verdict

KEYS = {
    *("dataset", "backbone", "seeds", "rows", "comparisons", "alignment", "data", "seconds"),
    "versions",
}
VOID = {"meta", "link", "br", "hr", "img", "input"}


@pytest.fixture(scope="module")
def two_rounds(tmp_path_factory) -> Path:
    """KAR with someone else's texts too; the first alignment changes nothing, the second helps."""
    path = tmp_path_factory.mktemp("two")
    gains = {"backbone": 0.0, "kar": 0.02, "kar-external": 0.04}
    gains |= {"dpo4rec-1": 0.02, "dpo4rec-2": 0.06}
    stage = fixture.make_stage(path, rounds=2, gains=gains, data={"name": "amazon-beauty"})
    report.run(stage)
    return path


@pytest.fixture(scope="module")
def document(two_rounds) -> dict:
    return json.loads((two_rounds / "report.json").read_text())


@pytest.fixture(scope="module")
def page(two_rounds) -> str:
    return (two_rounds / "report.html").read_text(encoding="utf-8")


def comparison(document: dict, a: str, b: str, metric: str = "ndcg@5") -> dict:
    wanted = (a, b, metric)
    return next(c for c in document["comparisons"] if (c["a"], c["b"], c["metric"]) == wanted)


def test_the_document_has_the_designed_keys(document) -> None:
    assert set(document) == KEYS
    methods = [row["method"] for row in document["rows"]]
    assert methods == ["backbone", "kar", "kar-external", "dpo4rec-1", "dpo4rec-2"]
    assert set(document["rows"][0]["metrics"]) == set(fixture.METRICS)
    for values in document["comparisons"]:
        assert values["ci95"][0] <= values["relative_gain"] <= values["ci95"][1]
        assert 0 < values["p_value"] <= values["p_holm"] <= 1
        assert values["n_users"] == 120
    assert [entry["round"] for entry in document["alignment"]] == [1, 2]
    assert document["data"]["interactions"] == 52800
    assert document["seconds"]["round1/align"] == 41.0
    assert document["versions"]["dpo4rec_jax"]


def test_means_are_over_lists_and_the_spread_over_seeds(two_rounds, document) -> None:
    for kind in ("ndcg@5", "map@5_std"):
        with np.load(two_rounds / "round0" / "evaluate" / "metrics.npz") as file:
            by_seed = np.nanmean(file[f"kar/{kind}"].astype(np.float64), axis=1)
        values = document["rows"][1]["metrics"][kind]
        np.testing.assert_allclose(values["by_seed"], by_seed, rtol=1e-6)
        assert values["mean"] == pytest.approx(by_seed.mean())
        assert values["std"] == pytest.approx(by_seed.std(ddof=1))
        assert values["ci95"][0] < values["mean"] < values["ci95"][1]


def test_gains_are_relative_to_what_they_are_compared_with(document) -> None:
    mean = {row["method"]: row["metrics"]["map@5"]["mean"] for row in document["rows"]}
    got = comparison(document, "dpo4rec-2", "dpo4rec-1", "map@5")["relative_gain"]
    assert got == pytest.approx(mean["dpo4rec-2"] / mean["dpo4rec-1"] - 1)


def test_planted_effects_are_found_and_absent_ones_are_not(document) -> None:
    assert comparison(document, "dpo4rec-2", "kar")["verdict"] == HIGHER
    assert comparison(document, "kar", "backbone")["p_value"] < 0.01
    assert comparison(document, "dpo4rec-1", "kar")["verdict"] == UNDECIDED
    assert comparison(document, "dpo4rec-1", "kar-external")["verdict"] == LOWER


def test_the_change_of_the_reward_is_tested_over_users(two_rounds, document) -> None:
    with np.load(two_rounds / "round1" / "evaluate" / "rewards.npz") as file:
        before_U, after_U = (file[f"reward_{side}_UC"][:-1].mean(1) for side in ("before", "after"))
    entry = document["alignment"][0]
    assert entry["reward_relative_gain"] == pytest.approx(after_U.mean() / before_U.mean() - 1)
    assert 0.08 < entry["reward_ci95"][0] < entry["reward_relative_gain"] < entry["reward_ci95"][1]
    assert entry["reward_p_value"] == pytest.approx(1 / 2001)  # none of 2,000 draws reached it


def test_every_alignment_is_held_against_kar_the_round_before_and_the_backbone() -> None:
    assert compared(["backbone", "kar", "dpo4rec-1", "dpo4rec-2"]) == [
        ("dpo4rec-1", "kar"),
        ("dpo4rec-1", "backbone"),
        ("dpo4rec-2", "kar"),
        ("dpo4rec-2", "dpo4rec-1"),
        ("dpo4rec-2", "backbone"),
        ("kar", "backbone"),
    ]


@pytest.mark.parametrize(
    ("p_holm", "users", "seeds", "expected"),
    [
        (0.01, [0.01, 0.05], [0.002, 0.06], HIGHER),
        (0.01, [-0.05, -0.01], [-0.06, -0.002], LOWER),
        (0.06, [0.01, 0.05], [0.002, 0.06], UNDECIDED),  # too many comparisons
        (0.01, [0.01, 0.05], [-0.001, 0.06], UNDECIDED),  # seeds spread as far
        (0.01, [0.01, 0.05], None, UNDECIDED),
    ],
)
def test_a_verdict_needs_the_test_and_both_intervals(p_holm, users, seeds, expected) -> None:
    assert verdict(p_holm, users, seeds) == expected


def test_seeds_that_disagree_widen_the_interval_and_take_the_verdict_back(tmp_path) -> None:
    """Every user gains from one lucky seed of five: certain over users, not over seeds."""
    stage = fixture.make_stage(tmp_path, gains={"backbone": 0.0, "kar": 0.0, "dpo4rec-1": 0.0})
    path = tmp_path / "round1" / "evaluate" / "metrics.npz"
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    with np.load(tmp_path / "round0" / "evaluate" / "metrics.npz") as file:
        for metric in fixture.METRICS:
            arrays[f"dpo4rec-1/{metric}"] = file[f"kar/{metric}"].copy()
            arrays[f"dpo4rec-1/{metric}"][0] += 0.1
    np.savez(path, **arrays)
    report.run(stage)
    document = json.loads((tmp_path / "report.json").read_text())
    lucky = comparison(document, "dpo4rec-1", "kar")
    assert lucky["p_value"] < 0.001 and lucky["ci95"][0] > 0.03
    assert lucky["ci95_users_and_seeds"][0] <= 0.0 + 1e-9
    assert lucky["verdict"] == UNDECIDED
    assert "within the spread of the re-ranker seeds" in (tmp_path / "report.md").read_text()


def test_words_claim_what_was_shown_and_no_more(two_rounds, tmp_path) -> None:
    text = (two_rounds / "report.md").read_text(encoding="utf-8")
    assert re.search(r"DPO4Rec-2 ranks 7\.\d.% higher than KAR, by NDCG@5 on 120 test users", text)
    none = {"backbone": 0.0, "kar": 0.0, "dpo4rec-1": 0.0}
    report.run(fixture.make_stage(tmp_path, gains=none))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "No difference between DPO4Rec-1 and KAR was shown" in text
    assert "higher than" not in text


def test_a_run_without_alignment_compares_kar_with_the_backbone(tmp_path) -> None:
    stage = fixture.make_stage(tmp_path, rounds=0, gains={"backbone": 0.0, "kar": 0.05})
    report.run(stage)
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["alignment"] == []
    assert "KAR ranks" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "higher than Backbone" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_an_arm_that_never_scores_gives_no_gain_instead_of_a_division_by_zero(tmp_path) -> None:
    stage = fixture.make_stage(tmp_path, gains={"backbone": -9.0, "kar": 0.0, "dpo4rec-1": 0.1})
    report.run(stage)
    row = comparison(json.loads((tmp_path / "report.json").read_text()), "kar", "backbone")
    assert row["relative_gain"] is None and row["ci95"] is None
    assert row["verdict"] == UNDECIDED


def test_the_same_run_gives_the_same_page_to_the_byte(two_rounds, page, document) -> None:
    stage = fixture.make_stage(
        two_rounds.parent / "again",
        rounds=2,
        gains={"backbone": 0.0, "kar": 0.02, "kar-external": 0.04, "dpo4rec-1": 0.02}
        | {"dpo4rec-2": 0.06},
        data={"name": "amazon-beauty"},
    )
    report.run(stage)
    assert (stage.workspace.path / "report.html").read_text(encoding="utf-8") == page


class Checker(html.parser.HTMLParser):
    """Tags that close in order, ids that are given once, references to ids that exist."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self._attributes(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._attributes(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def _attributes(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            value = value or ""
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href", "action"):
                self.outside += [] if value.startswith(("#", "data:")) else [value]
            self.references += re.findall(r"^#(.+)$", value) if name.endswith("href") else []
            self.references += re.findall(r"url\(#([^)]+)\)", value)


def test_the_page_is_well_formed_and_stands_alone(page) -> None:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.outside == []
    assert len(checker.ids) == len(set(checker.ids))
    assert set(checker.references) <= set(checker.ids)
    assert "http" not in page and "<script" not in page and "@import" not in page


def test_texts_are_escaped(page) -> None:
    assert fixture.AWKWARD not in page
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt; &amp; &lt;b&gt;90s" in page
    assert "{{ action }}" in page


def test_the_page_shows_everything_that_was_promised(page) -> None:
    for heading in (
        "Ranking quality on test users",
        "What beats what",
        "What alignment changed",
        "The preference pairs",
        "Chosen and rejected, round 1",
        "Before and after",
        "Time and cost",
        "Settings and versions",
    ):
        assert heading in page
    # Two quality plots, rewards, three curves, and two gaps of each of two rounds.
    assert page.count("<figure>") == 2 + 1 + 3 + 4
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r"#00000[1-9]", page), "a placeholder colour was left in a plot"


def test_the_papers_figures_stand_beside_ours_only_on_its_data(page, tmp_path) -> None:
    said = "The paper (Sun et al. 2024) reports"
    assert said in page
    stage = fixture.make_stage(tmp_path)
    report.run(stage)
    assert said not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_what_makes_a_run_doubtful_is_said_with_its_knob(tmp_path) -> None:
    stage = fixture.make_stage(tmp_path, users=30, rank={"seeds": 3}, prefer={"folds": 1})
    (tmp_path / "round0" / "prefer" / "pairs.jsonl").write_text("")
    path = tmp_path / "round1" / "evaluate" / "alignment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"margin": 1e-5}))
    report.run(stage)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    knobs = ("rank.seeds", "data.max_users", "prefer.folds is 1", "reason.samples")
    for knob in (*knobs, "align.learning_rate"):
        assert knob in page


def test_what_each_step_did_stands_beside_its_time(page) -> None:
    """Texts of 20 to 28 tokens, 240 a round in 34.2 s; 60 pairs in 41 s."""
    tokens = 4 * sum(20 + user % 9 for user in range(fixture.TRAIN_USERS))
    assert f"{tokens:,} tokens of user texts <span>{tokens / 34.2:.0f}/s</span>" in page
    assert "60 pairs, epochs counted <span>1.5/s</span>" in page
    assert "20 re-rankers" in page  # three arms of five seeds, and five folds that judge
    assert pytest.approx(271.3) == 2.4 + 3 * (34.2 + 2.4 + 21.7 + 2.4) + 2 * (2.4 + 41.0)
    assert "4\u202fmin 31\u202fs" in page


@pytest.mark.parametrize(
    ("seconds", "shown"), [(1.26, "1.3 s"), (125.2, "2 min 5 s"), (7980.0, "2 h 13 min")]
)
def test_times_are_written_as_people_say_them(seconds, shown) -> None:
    assert report_page.in_time(seconds).replace("\u202f", " ") == shown


def test_the_prompt_of_a_text_before_and_after_is_shown_where_it_is_known(tmp_path) -> None:
    stage = fixture.make_stage(tmp_path)
    path = tmp_path / "prepare" / "prompts.jsonl"
    lines = [
        {"kind": kind, "id": f"u{user}", "messages": [{"role": "user", "content": f"of {kind}"}]}
        for user in range(fixture.TRAIN_USERS)
        for kind in ("item", "user")
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report.run(stage)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count('<p class="text">of user</p>') == 3 and "of item" not in page


def test_a_last_round_of_few_texts_is_the_alignments_doing(tmp_path) -> None:
    """Texts of the last round make no pairs, so sampling is not what to turn."""
    stage = fixture.make_stage(tmp_path)
    path = tmp_path / "round1" / "reason" / "users.jsonl"
    same = [json.loads(line) | {"text": "All alike."} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in same))
    report.run(stage)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "After the last alignment only 1 of 240 texts are distinct" in page
    assert "align.beta" in page and "reason.temperature" not in page.split("<main>")[0]


def test_damaged_results_are_named(tmp_path) -> None:
    stage = fixture.make_stage(tmp_path)
    (tmp_path / "round0" / "prefer" / "pairs.jsonl").write_text('{"prompt": [')
    with pytest.raises(InputError, match=r"pairs.jsonl:1: damaged"):
        report.run(stage)
    (tmp_path / "round0" / "prefer" / "pairs.jsonl").write_text("")
    (tmp_path / "round1" / "evaluate" / "metrics.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"metrics.npz: damaged"):
        report.run(stage)
