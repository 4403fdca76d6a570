"""Texts to vectors: what a user's history and each reasoning about it say, and each item's facts.

A user's text is the history sentence followed by the LLM's reasoning, as one string (KAR, Xi et al.
2023), or with `encode.lines` line by line; an item's text stands alone. The encoder is frozen, so
items are encoded once and reused in later rounds, unless the policy of the round is itself the
encoder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from dpo4rec_jax.config import Config, InputError
from dpo4rec_jax.data.knowledge import Knowledge
from dpo4rec_jax.data.prepared import Prepared
from dpo4rec_jax.data.texts import iterate_records, read_texts
from dpo4rec_jax.runtime.processes import this
from dpo4rec_jax.weights import Encoder, load_encoder, load_policy
from dpo4rec_jax.workspace import Stage, Workspace, write_json, write_npz

TextLists = dict[str, list[str]]


def run(stage: Stage) -> None:
    """Leaves vectors.npz, at round 0 external.npz where someone else's texts are given, and
    counts.json."""
    assert stage.round is not None
    prepared = Prepared.load(stage.workspace.stage_dir("prepare"), prompts=False)
    work = _Work(stage, encoder_of(stage.config, stage.workspace), prepared)
    user_texts = _texts_of(stage.workspace.stage_dir("reason", stage.round) / "users.jsonl")
    item_texts = _texts_of(stage.workspace.stage_dir("reason", 0) / "items.jsonl")
    if stage.round == 0:
        item_IF = work.items("items", item_texts)
    else:  # a frozen encoder makes the same vectors of the same texts
        item_IF = Knowledge.load(stage.workspace.stage_dir("encode", 0) / "vectors.npz").item_IF
    work.users("users", user_texts, item_IF).save(stage.directory / "vectors.npz")

    external = stage.config.evaluate.external_texts
    if external is not None and stage.round == 0:
        user_texts, other_item_texts = _external_texts(external, prepared)
        if other_item_texts:
            item_IF = work.items("external_items", item_texts | other_item_texts)
        knowledge = work.users("external_users", user_texts, item_IF)
        knowledge.save(stage.directory / "external.npz")
    work.report()


@dataclass(frozen=True)
class _Work:
    """Encodes texts by raw id into vectors by index, and counts what it did under a name."""

    stage: Stage
    encoder: Encoder
    prepared: Prepared
    counts: dict[str, Counter[str]] = field(default_factory=dict)

    def items(self, name: str, texts: TextLists) -> Float32[np.ndarray, "I F"]:
        ids = self.prepared.item_id
        having = [index for index, id in enumerate(ids) if texts.get(id)]
        item_IF = np.zeros((len(ids), self.encoder.features), np.float32)
        item_IF[having] = self._encode(name, [texts[ids[index]][0] for index in having], None)
        self.counts[name]["without_text"] = len(ids) - len(having)
        return item_IF

    def users(self, name: str, texts: TextLists, item_IF: Float32[np.ndarray, "I F"]) -> Knowledge:
        ids, users = self.prepared.user_id, self.prepared.users
        count_U = np.array([len(texts.get(id, ())) for id in ids], np.int32)
        mask_UC = np.arange(max(1, count_U.max(initial=0)))[None] < count_U[:, None]
        chosen = [text for id in ids for text in texts.get(id, ())]
        told = self.stage.config.encode.history
        histories = [users[user]["history"] if told else "" for user in np.nonzero(mask_UC)[0]]
        user_UCF = np.zeros((*mask_UC.shape, self.encoder.features), np.float32)
        user_UCF[mask_UC] = self._encode(name, chosen, histories)
        self.counts[name]["without_text"] = int((count_U == 0).sum())
        return Knowledge(user_UCF, count_U, item_IF, ids, self.prepared.item_id)

    def _encode(
        self, name: str, texts: Sequence[str], histories: Sequence[str] | None
    ) -> Float32[np.ndarray, "n F"]:
        config, counts = self.stage.config.encode, Counter()
        own = _own_share(texts, histories)
        with self.stage.progress.track(f"encode {name}", len(own), "texts") as task:
            vector_xF = self.encoder.encode(
                [texts[place] for place in own],
                None if histories is None else [histories[place] for place in own],
                max_tokens=config.max_tokens,
                batch_tokens=config.batch_tokens,
                lines=config.lines,
                counts=counts,
                advance=task.advance,
            )
        if this().count > 1:
            vector_xF, counts = self._joined(name, own, vector_xF, counts, len(texts))
        self.counts[name] = counts
        return vector_xF

    def _joined(
        self, name: str, own: list[int], vector_xF: np.ndarray, counts: Counter[str], total: int
    ) -> tuple[Float32[np.ndarray, "n F"], Counter[str]]:
        """What all processes encoded, which each leaves in a part file for the others."""
        parts = [self.stage.directory / f"{name}.part{i}.npz" for i in range(this().count)]
        tally = {f"count/{key}": np.array(number) for key, number in counts.items()}
        arrays = {"place_x": np.array(own, np.int64), "vector_xF": vector_xF} | tally
        write_npz(parts[this().index], arrays, own=True)
        this().barrier(f"{name} encoded")
        all_xF, sums = np.zeros((total, self.encoder.features), np.float32), Counter[str]()
        for part in parts:
            with np.load(part, allow_pickle=False) as file:
                all_xF[file["place_x"]] = file["vector_xF"]
                keys = [key for key in file.files if key.startswith("count/")]
                sums.update({key.removeprefix("count/"): int(file[key]) for key in keys})
        this().barrier(f"{name} joined")
        return all_xF, sums

    def report(self) -> None:
        """Counts into counts.json and the log; what a person should know is said. The part files
        have served."""
        if this().main:
            for part in self.stage.directory.glob("*.part*.npz"):
                part.unlink()
        write_json(self.stage.directory / "counts.json", self.counts)
        for name, counts in self.counts.items():
            self.stage.log.write(0, {f"{name}_{key}": float(n) for key, n in counts.items()})
            cut, missing = counts["cut_texts"], counts["without_text"]
            if cut or missing:
                limit = self.stage.config.encode.max_tokens
                self.stage.progress.say(
                    f"  {name}: {cut} texts cut to {limit} tokens (encode.max_tokens), "
                    f"{missing} without a text"
                )


def _own_share(texts: Sequence[str], histories: Sequence[str] | None) -> list[int]:
    """Which texts this process encodes: all copies of a text fall to one process."""
    number: dict[tuple[str, str], int] = {}
    pairs = enumerate(zip(histories or [""] * len(texts), texts, strict=True))
    owners = ((place, number.setdefault(pair, len(number))) for place, pair in pairs)
    return [place for place, distinct in owners if distinct % this().count == this().index]


def encoder_of(config: Config, workspace: Workspace) -> Encoder:
    """What all texts were encoded with, or will be: as the encoder, the policy stays that of round
    0. Vectors of an aligned one would be another space, told from the old one by no re-ranker."""
    policy, cache_dir = None, config.runtime.cache_dir
    if config.encode.encoder == "policy":
        path, adapters = workspace.policy_source(config, 0)
        policy = load_policy(
            path,
            dtype=config.policy.dtype,
            param_dtype=config.policy.param_dtype,
            tokenizer=config.policy.tokenizer,
            adapters=adapters,
            cache_dir=cache_dir,
        )
    return load_encoder(
        config.encode.encoder,
        cache_dir=cache_dir,
        features=config.encode.features,
        policy=policy,
    )


def _texts_of(path: Path) -> TextLists:
    """Texts by raw id, in the order of their samples."""
    found: dict[str, list[tuple[int, str]]] = {}
    for record in iterate_records(path):
        found.setdefault(record.id, []).append((record.sample, record.text.strip()))
    return {id: [text for _, text in sorted(texts)] for id, texts in found.items()}


def _external_texts(path: str, prepared: Prepared) -> tuple[TextLists, TextLists]:
    """Texts of the users and items that there are; a file may hold others as well."""
    users = read_texts(path, "user", prepared.user_id)
    if not users:
        raise InputError(
            f"evaluate.external_texts: {path}: expected texts of this data set's users, got none "
            f"for any of its {len(prepared.user_id)} (such as {prepared.user_id[0]!r})"
        )
    return users, read_texts(path, "item", prepared.item_id)
