"""What `--dry-run` prints: stages and their state, sizes, estimated tokens and memory.

Tokens of prompts are counted on a sample of them. How long the texts will be nobody knows before
they are written: texts that the workspace already holds tell, else those that the policy is warmed
up on, else the limit, which an LLM that was not taught to be brief will reach.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo4rec_jax.config import Config, InputError
from dpo4rec_jax.data import TRAIN, Prepared, Prompt, build, synthetic
from dpo4rec_jax.data.texts import iterate_records
from dpo4rec_jax.models.llama import LlamaConfig
from dpo4rec_jax.runtime.mesh import make_mesh
from dpo4rec_jax.sampling.layout import bytes_token, plan_layout
from dpo4rec_jax.stages.placement import table
from dpo4rec_jax.stages.plan import Step, has_policy, has_warmup
from dpo4rec_jax.weights import outline
from dpo4rec_jax.weights.policy import chat_ids, shapes
from dpo4rec_jax.weights.tiny import make_tiny
from dpo4rec_jax.workspace import Workspace, iterate_lines

TOKENISED = 256  # prompts or texts of a kind; their mean stands for all
LONGEST = 16  # and so many of the longest prompts: caches are sized by the longest
GIB = 2**30
FLOAT32_STATE = 16  # bytes a value in training: weight, gradient, two moments


@dataclass(frozen=True)
class Prompts:
    """Tokens of the prompts of one kind: how many prompts, the mean and the longest."""

    count: int
    mean: float
    longest: int

    @property
    def total(self) -> int:
        return round(self.mean * self.count)


@dataclass(frozen=True)
class Estimate:
    """Of one round, tokens; of one device without sharding, bytes. `basis` says what the length of
    the texts is taken from."""

    users: Prompts
    items: Prompts
    texts: int
    text_mean: float
    basis: str
    pairs: int
    align_tokens: int
    parameters: int
    param_dtype: str
    bytes_weights: int
    bytes_cache: int
    bytes_training: int  # weights included
    rows: int

    @property
    def text_tokens(self) -> int:
        return round(self.texts * self.text_mean)


def describe(config: Config, workspace: Workspace, steps: Sequence[Step]) -> str:
    """The whole text; nothing is written. Data are read (or fetched) unless already prepared.

    Raises InputError for whatever would stop stage prepare or the loading of the policy's outline.
    """
    prepared = _prepared(config, workspace)
    lines = [f"{config.name}: {len(steps)} steps in {workspace.path}", "", "stages"]
    lines += [f"  {step!s:<22}{_state(workspace, step)}" for step in steps]
    lines += ["", "data"]
    lines += [f"  {name:<34}{_shown(value)}" for name, value in prepared.counts.items()]
    if not has_policy(config):
        return "\n".join([*lines, "", "tokens and memory: none, no LLM takes part"])
    found = estimate(config, workspace, prepared)
    lines += ["", "tokens", *_token_lines(config, found)]
    devices = jax.devices()
    lines += ["", f"memory, before it is split over {len(devices)} x {devices[0].device_kind}"]
    lines += _memory_lines(config, found)
    return "\n".join([*lines, *_sharding_lines(config, workspace)])


def estimate(config: Config, workspace: Workspace, prepared: Prepared) -> Estimate:
    """Tokens and memory of a round. Raises InputError for a policy whose outline cannot be read."""
    llama, tokenizer = _outline(config, workspace)
    users, items = (
        _prompts(config, tokenizer, prompts)
        for prompts in (prepared.user_prompts, prepared.item_prompts)
    )
    training = int((prepared.split_U == TRAIN).sum())
    text_mean, basis = _text_length(config, workspace, tokenizer)
    pairs = training * config.prefer.pairs_per_user
    pairs = min(pairs, config.prefer.max_pairs or pairs)
    trained = pairs * (1 - config.align.heldout_fraction)
    leaves = jax.tree.leaves(shapes(llama))
    parameters = sum(math.prod(leaf.shape) for leaf in leaves)
    weights = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    full = config.align.method == "full"
    moving = parameters if full else _adapter_parameters(config, llama)
    layout = plan_layout(
        llama,
        [users.longest] * users.count,
        [config.reason.samples] * training + [1] * (users.count - training),
        config.reason.max_new_tokens,
        slots=config.reason.slots,
        memory_gib=config.reason.memory_gib,
    )
    return Estimate(
        users=users,
        items=items,
        texts=training * config.reason.samples + users.count - training,
        text_mean=text_mean,
        basis=basis,
        pairs=pairs,
        align_tokens=round(trained * (users.mean + 2 * text_mean) * config.align.epochs),
        parameters=parameters,
        param_dtype=llama.param_dtype,
        bytes_weights=weights,
        bytes_cache=layout.bytes_of_shard(bytes_token(llama)),
        bytes_training=moving * FLOAT32_STATE + (0 if full else weights),
        rows=layout.rows,
    )


def _prepared(config: Config, workspace: Workspace) -> Prepared:
    if workspace.manifest("prepare") is not None:
        return Prepared.load(workspace.stage_dir("prepare"))
    return build(config.data, config.seed, config.runtime.cache_dir)


def _state(workspace: Workspace, step: Step) -> str:
    manifest = workspace.manifest(step.stage, step.round)
    return "to run" if manifest is None else f"complete, took {manifest['seconds']:.0f} s"


def _warmed(config: Config, workspace: Workspace) -> bool:
    return has_warmup(config) and workspace.manifest("warmup") is not None


def _outline(config: Config, workspace: Workspace) -> tuple[LlamaConfig, Any]:
    settings, warmed = config.policy, _warmed(config, workspace)
    if settings.path == "tiny" and not warmed:
        policy = make_tiny(settings, synthetic.vocabulary(config.data), jax.random.key(0))
        return policy.config, policy.tokenizer
    path = workspace.policy_source(config, 0)[0] if warmed else settings.path
    return outline(
        path,
        dtype=settings.dtype,
        param_dtype=settings.param_dtype,
        tokenizer=settings.tokenizer,
        cache_dir=config.runtime.cache_dir,
    )


def _prompts(config: Config, tokenizer: Any, prompts: Sequence[Prompt]) -> Prompts:
    limit = config.policy.max_prompt_tokens

    def lengths(chosen: Iterable[Prompt]) -> list[int]:
        return [min(limit, len(chat_ids(tokenizer, prompt.messages))) for prompt in chosen]

    sampled = lengths(prompts[:: max(1, len(prompts) // TOKENISED)])
    by_size = sorted(prompts, key=lambda p: sum(len(m["content"]) for m in p.messages))
    longest = max([*sampled, *lengths(by_size[-LONGEST:])], default=0)
    return Prompts(len(prompts), float(np.mean(sampled)) if sampled else 0.0, longest)


def _text_length(config: Config, workspace: Workspace, tokenizer: Any) -> tuple[float, str]:
    """Mean tokens of a user's text, its stop included, and where that was learned."""
    limit = config.reason.max_new_tokens
    for round in reversed(range(config.rounds + 1)):
        path = workspace.stage_dir("reason", round) / "users.jsonl"
        if workspace.manifest("reason", round) is not None:
            written = [len(record.completion_tokens) for record in iterate_records(path)]
            if any(written):
                return float(np.mean(written)), f"as in round {round}"
    if has_warmup(config):
        texts = _warmup_texts(config)
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        if ids:
            return float(np.mean([min(limit, len(one) + 1) for one in ids])), "as warmed up on"
    return float(limit), "all at the limit"


def _warmup_texts(config: Config) -> list[str]:
    if config.warmup.texts in (None, "synthetic"):
        shown = synthetic.warmup_texts(config.data, config.seed, viewers=TOKENISED // 4, samples=2)
        return [text for _, texts in shown for text in texts]
    path = Path(config.warmup.texts).expanduser()
    return [record["text"] for record in _records(path)][:TOKENISED]


def _records(path: Path) -> list[dict[str, Any]]:
    """Lines of a texts file; what is wrong with it is stage warmup's to say."""
    if not path.is_file() or path.suffix == ".gz":
        return []
    try:
        lines = [json.loads(line) for line in iterate_lines(path)]
        return [line for line in lines if isinstance(line.get("text"), str)]
    except (ValueError, AttributeError):
        return []


def _token_lines(config: Config, found: Estimate) -> list[str]:
    reason, users, items = config.reason, found.users, found.items
    lines = [
        f"  a round's user prompts  {users.total:,} ({users.mean:.0f} each), read once each",
        f"  a round's user texts    {found.text_tokens:,} in {found.texts:,} texts "
        f"({found.text_mean:.0f} each, {found.basis}; the limit is {reason.max_new_tokens})",
    ]
    if reason.item_texts == "policy":
        most = items.count * reason.item_max_new_tokens
        lines.append(f"  item prompts (once)     {items.total:,} ({items.mean:.0f} each)")
        lines.append(f"  item texts (once)       {items.count:,}, at most {most:,} tokens")
    if config.rounds:
        lines.append(
            f"  a round's alignment     {found.align_tokens:,} of at most {found.pairs:,} pairs, "
            f"epochs counted"
        )
    return lines


def _memory_lines(config: Config, found: Estimate) -> list[str]:
    moves = "every weight" if config.align.method == "full" else "adapters"
    lines = [
        f"  weights                 {_size(found.bytes_weights)} "
        f"({found.parameters:,} in {found.param_dtype})",
        f"  sampling cache          {_size(found.bytes_cache)} ({found.rows} rows at once)",
    ]
    if config.rounds:
        lines.append(
            f"  alignment               {_size(found.bytes_training)} (weights, and gradient and "
            f"moments of {moves})"
        )
    return [*lines, "  activations beside these: python -m dpo4rec_jax.rehearse"]


def _sharding_lines(config: Config, workspace: Workspace) -> list[str]:
    """Nothing where a single device holds everything."""
    try:
        mesh = make_mesh(config.runtime.mesh)
    except InputError as error:  # a pod's config looked at from a laptop
        return ["", f"sharding: not on the devices here ({error})"]
    if mesh.size == 1:
        return []
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return ["", f"sharding on {sizes}", *table(_outline(config, workspace)[0], config.align, mesh)]


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 100 else f"{count / 2**20:.2f} MiB"


def _adapter_parameters(config: Config, llama: LlamaConfig) -> int:
    attention, keys = llama.heads * llama.head_dim, llama.kv_heads * llama.head_dim
    sides = {
        "q": llama.width + attention,
        "k": llama.width + keys,
        "v": llama.width + keys,
        "o": attention + llama.width,
        "gate": llama.width + llama.hidden,
        "up": llama.width + llama.hidden,
        "down": llama.hidden + llama.width,
    }
    settings = config.align.lora
    return llama.layers * settings.rank * sum(sides[target] for target in settings.targets)


def _shown(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, dict)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(f"{name} {number:,}" for name, number in value.items())
