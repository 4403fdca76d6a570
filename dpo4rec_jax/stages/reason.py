"""Stage reason, once a round: what the LLM says about users and, in round 0, about items.

A training user gets `reason.samples` texts, a validation or test user one of the same kind, an
item one fact text. They come from the round's policy; in round 0 a file (`reason.texts`) or an
endpoint may write them instead, and items may be described by their metadata. Finished texts go to
part files at once, so a killed run continues with the rest, to the same texts.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from dpo4rec_jax.config import InputError, ReasonConfig
from dpo4rec_jax.data.prepared import TRAIN, Prepared
from dpo4rec_jax.data.prompts import Prompt
from dpo4rec_jax.data.texts import Kind, TextRecord, read_records, read_texts, write_records
from dpo4rec_jax.runtime.mesh import sampling_mesh
from dpo4rec_jax.runtime.processes import this
from dpo4rec_jax.sampling import Completion, Figures, common_head, plan_layout, stream
from dpo4rec_jax.sampling.endpoint import Endpoint, Request
from dpo4rec_jax.sampling.parts import Parts
from dpo4rec_jax.sampling.prompts import fit_prompt
from dpo4rec_jax.weights import Policy, load_policy
from dpo4rec_jax.workspace import Stage

Key = tuple[Kind, str, int]  # kind, raw id, sample


@dataclass(frozen=True)
class Job:
    """Prompts of one kind, and how many texts each of them gets. `ids` name the prompts to the
    random numbers: users by their index, items behind the users."""

    kind: Kind
    prompts: list[Prompt]
    samples: list[int]
    ids: list[int]
    max_new_tokens: int

    @property
    def name(self) -> str:
        return f"{self.kind}s"

    def texts(self) -> list[Key]:
        """Which texts it is made of."""
        pairs = zip(self.prompts, self.samples, strict=True)
        return [(self.kind, prompt.id, n) for prompt, count in pairs for n in range(count)]


# What is to be written, where to, and what is there already.
Writer = Callable[[Job, Parts, Sequence[TextRecord]], None]


def run(stage: Stage) -> None:
    config, prepared = stage.config.reason, Prepared.load(stage.workspace.stage_dir("prepare"))
    first = stage.round == 0
    writer = _endpoint_writer(stage) if first and config.endpoint else _policy_writer(stage)
    if first and config.texts is not None:
        users = _given_users(stage, prepared, config.texts)
    elif config.user_texts != "policy":
        users = _no_reasoning(stage, prepared, config.user_texts)
    else:
        users = _write(stage, _user_job(stage, prepared), writer)
    _log_quality(stage, users)

    if not first:
        items_path = stage.workspace.stage_dir("reason", 0) / "items.jsonl"
        if this().main:
            shutil.copyfile(items_path, stage.directory / "items.jsonl")
        return
    if not _given_items(stage, prepared):
        _write(stage, _item_job(stage, prepared), writer)


def _user_job(stage: Stage, prepared: Prepared) -> Job:
    """All users in one job, so that those with one text fill rows between those with many."""
    config = stage.config.reason
    samples = [config.samples if split == TRAIN else 1 for split in prepared.split_U]
    ids = list(range(len(samples)))
    return Job("user", prepared.user_prompts, samples, ids, config.max_new_tokens)


def _item_job(stage: Stage, prepared: Prepared) -> Job:
    first, number = len(prepared.user_id), len(prepared.item_prompts)
    ids = list(range(first, first + number))
    most = stage.config.reason.item_max_new_tokens
    return Job("item", prepared.item_prompts, [1] * number, ids, most)


def _write(stage: Stage, job: Job, writer: Writer) -> list[TextRecord]:
    """Lets the writer finish the job, then puts `{name}.jsonl` in order; returns its texts."""
    path = stage.directory / f"{job.name}.jsonl"
    if this().from_main(lambda: _is_whole(path, job)):  # an interrupted run got further than this
        return read_records(path)
    parts = Parts(stage.directory, job.name, this().index)
    this().barrier(f"parts of {job.name} opened")
    held = parts.records()
    this().barrier(f"parts of {job.name} read")
    if job.prompts:
        writer(job, parts, held)
    this().barrier(f"{job.name} written")
    if this().main:
        parts.assemble(job.texts())
    this().barrier(f"{job.name} assembled")
    return read_records(path)


def _is_whole(path: Path, job: Job) -> bool:
    with contextlib.suppress(InputError):
        if path.exists():
            records = read_records(path)
            return [(record.kind, record.id, record.sample) for record in records] == job.texts()
    return False


def _policy_writer(stage: Stage) -> Writer:
    """Samples from the round's policy, loaded when the first job needs it. Each process takes its
    share of the prompts and decodes it on its own devices."""
    config = stage.config.reason

    @functools.cache
    def loaded() -> tuple[Policy, jax.sharding.Mesh]:
        settings = stage.config.policy
        mesh = sampling_mesh(stage.config.runtime.mesh, jax.local_devices())
        path, adapters = stage.workspace.policy_source(stage.config, stage.round or 0)
        policy = load_policy(
            path,
            dtype=settings.dtype,
            param_dtype=settings.param_dtype,
            tokenizer=settings.tokenizer,
            adapters=adapters,
            mesh=mesh if mesh.size > 1 else None,
            cache_dir=stage.config.runtime.cache_dir,
        )
        return policy, mesh

    def write(job: Job, parts: Parts, held: Sequence[TextRecord]) -> None:
        policy, mesh = loaded()
        fitted = fit_prompts(stage, policy, job)
        layout = plan_layout(  # of the whole job, so that a rerun of its rest computes alike
            policy.config,
            [len(ids) for ids in fitted],
            job.samples,
            job.max_new_tokens,
            common=common_head(fitted),
            slots=config.slots,
            memory_gib=config.memory_gib,
            mesh=mesh,
        )
        share = _share(job, held)
        figures, began = Figures(), time.monotonic()
        completed = stream(
            policy,
            [fitted[index] for index in share],
            layout,
            mesh=mesh,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            seed=stage.config.seed,
            round=stage.round or 0,
            samples=[job.samples[index] for index in share],
            prompt_ids=[job.ids[index] for index in share],
            logps=config.logps,
            figures=figures,
        )
        total = sum(job.samples[index] for index in share)
        with stage.progress.track(f"reason: {job.name}", total, "texts") as task:
            for place, completions in completed:
                index = share[place]
                parts.append(_records(job, index, fitted[index], completions))
                rate = figures.tokens / (time.monotonic() - began)
                task.advance(len(completions), tokens_per_second=rate)
        if figures.tokens:
            rate = figures.tokens / (time.monotonic() - began)
            stage.log.write(0, {f"{job.name}/tokens_per_second": rate})

    return write


def _share(job: Job, held: Sequence[TextRecord]) -> list[int]:
    """Which prompts this process has yet to answer."""
    texts = Counter(record.id for record in held)
    return [
        index
        for index in range(this().index, len(job.prompts), this().count)
        if texts[job.prompts[index].id] < job.samples[index]
    ]


def _records(
    job: Job, index: int, prompt_tokens: Sequence[int], completions: Sequence[Completion]
) -> list[TextRecord]:
    return [
        TextRecord(
            kind=job.kind,
            id=job.prompts[index].id,
            text=completion.text,
            sample=sample,
            prompt_tokens=tuple(prompt_tokens),
            completion_tokens=tuple(completion.tokens),
            finish=completion.finish,
            logps=None if completion.logps is None else tuple(completion.logps),
        )
        for sample, completion in enumerate(completions)
    ]


def fit_prompts(stage: Stage, policy: Policy, job: Job) -> list[list[int]]:
    """Token ids of every prompt; the oldest history goes where a prompt is too long.

    How many were shortened is said and logged. Raises InputError for one that does not fit with
    a single entry of history left.
    """
    room = policy.config.max_position - job.max_new_tokens
    limit = min(stage.config.policy.max_prompt_tokens, room)
    fitted, shortened, dropped = [], 0, 0
    for prompt in job.prompts:
        ids, kept = fit_prompt(policy, prompt, limit)
        fitted.append(ids)
        shortened += kept < len(prompt.history)
        dropped += len(prompt.history) - kept
    if shortened:
        stage.progress.say(
            f"  {job.name}: {shortened} of {len(fitted)} prompts shortened to {limit} tokens, "
            f"{dropped} of their oldest history entries left out"
        )
    numbers = {
        "prompts_shortened": shortened,
        "history_entries_dropped": dropped,
        "prompt_tokens_mean": np.mean([len(ids) for ids in fitted]),
    }
    stage.log.write(0, {f"{job.name}/{name}": float(n) for name, n in numbers.items()})
    return fitted


def _endpoint_writer(stage: Stage) -> Writer:
    config = stage.config.reason
    assert config.endpoint is not None
    endpoint = Endpoint(config.endpoint, temperature=config.temperature, top_p=config.top_p)

    def write(job: Job, parts: Parts, held: Sequence[TextRecord]) -> None:
        answered = {(record.id, record.sample) for record in held}
        requests = [
            Request((prompt.id, sample), prompt.messages, job.max_new_tokens)
            for prompt, count in ((job.prompts[i], job.samples[i]) for i in _share(job, held))
            for sample in range(count)
            if (prompt.id, sample) not in answered
        ]
        with stage.progress.track(f"reason: {job.name}", len(requests), "texts") as task:
            for reply in endpoint.replies(requests):
                id, index = reply.name
                record = TextRecord(job.kind, id, reply.text, index, finish=reply.finish)
                parts.append([record])
                task.advance()

    return write


def _given_users(stage: Stage, prepared: Prepared, path: str) -> list[TextRecord]:
    """users.jsonl from a file: up to `samples` texts of a training user, the first of another."""
    texts = read_texts(path, "user", prepared.user_id)
    if not texts:
        raise InputError(f"reason.texts: {path}: no text of any user of this data set")
    records = []
    for id, split in zip(prepared.user_id, prepared.split_U, strict=True):
        most = stage.config.reason.samples if split == TRAIN else 1
        own = texts.get(id, [])[:most]
        records += [TextRecord("user", id, text, index) for index, text in enumerate(own)]
    missing = len(prepared.user_id) - len(texts)
    if missing:
        stage.progress.say(f"  {path}: {missing} of {len(prepared.user_id)} users have no text")
    stage.log.write(0, {"users_without_text": float(missing)})
    write_records(stage.directory / "users.jsonl", records)
    return records


def _no_reasoning(stage: Stage, prepared: Prepared, kind: str) -> list[TextRecord]:
    """users.jsonl without an LLM: empty texts, so that the encoder sees the history alone, or what
    is known of the items that the user liked."""
    if stage.config.rounds:
        raise InputError(
            f"reason.user_texts: {kind} leaves nothing to prefer, but rounds is "
            f"{stage.config.rounds}; set rounds: 0, or user_texts: policy"
        )
    texts = [""] * len(prepared.user_id)
    if kind == "likes":
        told = {item["item"]: item["text"] for item in prepared.items}
        likes = [[told[item] for item in user["likes"]] for user in prepared.users]
        texts = ["The user likes: " + "\n".join(known) if known else "" for known in likes]
    records = [
        TextRecord("user", id, text) for id, text in zip(prepared.user_id, texts, strict=True)
    ]
    write_records(stage.directory / "users.jsonl", records)
    return records


def _given_items(stage: Stage, prepared: Prepared) -> bool:
    """Writes items.jsonl from a file of texts or from metadata; False where neither is asked for.

    An item that the file leaves out is described by its metadata.
    """
    config = stage.config.reason
    texts = read_texts(config.texts, "item", prepared.item_id) if config.texts else {}
    if not texts and config.item_texts != "metadata":
        return False
    records = []
    for item in prepared.items:
        text = texts.get(item["item"], [item["text"]])[0]
        records.append(TextRecord("item", item["item"], text))
    stage.log.write(0, {"items_from_metadata": float(len(records) - len(texts))})
    write_records(stage.directory / "items.jsonl", records)
    return True


def _log_quality(stage: Stage, records: Sequence[TextRecord]) -> None:
    """Mean length, share that stopped by itself, and share of distinct texts a user."""
    by_user = defaultdict(list)
    for record in records:
        by_user[record.id].append(record.text)
    lengths = [len(record.completion_tokens) or len(record.text.split()) for record in records]
    several = [texts for texts in by_user.values() if len(texts) > 1]
    numbers = {
        "texts": len(records),
        "length_mean": np.mean(lengths),
        "stopped_share": np.mean([record.finish == "stop" for record in records]),
        "empty_texts": sum(not record.text.strip() for record in records),
    }
    if several:
        shares = [len(set(texts)) / len(texts) for texts in several]
        numbers["distinct_share"] = np.mean(shares)
    stage.log.write(0, {name: float(number) for name, number in numbers.items()})
    for doubt in doubts(numbers, stage.config.reason):
        stage.progress.say(f"  {doubt}")


def doubts(numbers: Mapping[str, float | int], config: ReasonConfig) -> Iterator[str]:
    """What a look at the texts says against them, each with the knob to turn."""
    cut = 1.0 - numbers["stopped_share"]
    if cut > 0.5:
        much = "all" if cut == 1 else f"{cut:.0%}"
        yield (
            f"{much} of the texts are cut off at reason.max_new_tokens = {config.max_new_tokens}; "
            "raise it"
        )
    if numbers.get("distinct_share", 1.0) < 0.5:
        yield (
            f"only {numbers['distinct_share']:.0%} of a user's texts are distinct, and equal texts "
            f"make no pairs; raise reason.temperature (now {config.temperature:g}) or reason.top_p "
            f"(now {config.top_p:g})"
        )
