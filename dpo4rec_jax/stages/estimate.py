"""What `--dry-run` prints: stages and their state, sizes, estimated tokens and memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from dpo4rec_jax.config import Config
from dpo4rec_jax.data import TRAIN, Prepared, Prompt, build
from dpo4rec_jax.models.llama import LlamaConfig
from dpo4rec_jax.sampling.layout import bytes_token, plan_layout
from dpo4rec_jax.stages.plan import Step, has_warmup
from dpo4rec_jax.weights import outline
from dpo4rec_jax.weights.policy import chat_ids, shapes
from dpo4rec_jax.workspace import Workspace

PROMPTS_TOKENISED = 256  # of each kind; their mean stands for all
GIB = 2**30


@dataclass(frozen=True)
class PromptTokens:
    """Lengths in tokens of a sample of prompts, and how many prompts there are."""

    count: int
    lengths: list[int]

    @property
    def mean(self) -> float:
        return float(np.mean(self.lengths)) if self.lengths else 0.0

    @property
    def total(self) -> int:
        return round(self.mean * self.count)


def describe(config: Config, workspace: Workspace, steps: Sequence[Step]) -> str:
    """The whole text; nothing is written. Data are read (or fetched) unless already prepared.

    Raises InputError for whatever would stop stage prepare or the loading of the policy's outline.
    """
    prepared = _prepared(config, workspace)
    lines = [f"{config.name}: {len(steps)} steps in {workspace.path}", "", "stages"]
    lines += [f"  {step!s:<22}{_state(workspace, step)}" for step in steps]
    counts = prepared.counts
    lines += ["", "data"]
    lines += [f"  {name:<34}{_shown(value)}" for name, value in counts.items()]
    if config.policy.path == "tiny" and not _warmed(config, workspace):
        lines += ["", "tokens and memory: known once the tiny policy is made (stage warmup)"]
        return "\n".join(lines)
    llama, tokenizer = _outline(config, workspace)
    users, items = (
        _tokens(config, tokenizer, prompts)
        for prompts in (prepared.user_prompts, prepared.item_prompts)
    )
    training = int((prepared.split_U == TRAIN).sum())
    lines += ["", "tokens", *_token_lines(config, users, items, training)]
    lines += ["", f"memory of {len(jax.devices())} x {jax.devices()[0].device_kind}"]
    lines += _memory_lines(config, llama, users)
    return "\n".join(lines)


def _prepared(config: Config, workspace: Workspace) -> Prepared:
    if workspace.manifest("prepare") is not None:
        return Prepared.load(workspace.stage_dir("prepare"))
    return build(config.data, config.seed, config.runtime.cache_dir)


def _state(workspace: Workspace, step: Step) -> str:
    manifest = workspace.manifest(step.stage, step.round)
    return "to run" if manifest is None else f"complete, took {manifest['seconds']:.0f} s"


def _warmed(config: Config, workspace: Workspace) -> bool:
    return has_warmup(config) and workspace.manifest("warmup") is not None


def _outline(config: Config, workspace: Workspace) -> tuple[LlamaConfig, object]:
    settings = config.policy
    warmed = _warmed(config, workspace)
    path = workspace.policy_source(config, 0)[0] if warmed else settings.path
    return outline(
        path,
        dtype=settings.dtype,
        param_dtype=settings.param_dtype,
        tokenizer=settings.tokenizer,
        cache_dir=config.runtime.cache_dir,
    )


def _tokens(config: Config, tokenizer, prompts: Sequence[Prompt]) -> PromptTokens:
    stride = max(1, len(prompts) // PROMPTS_TOKENISED)
    limit = config.policy.max_prompt_tokens
    lengths = [
        min(limit, len(chat_ids(tokenizer, prompt.messages))) for prompt in prompts[::stride]
    ]
    return PromptTokens(len(prompts), lengths)


def _token_lines(
    config: Config, users: PromptTokens, items: PromptTokens, training: int
) -> list[str]:
    reason, align = config.reason, config.align
    texts = training * reason.samples + users.count - training
    lines = [
        f"  a round's user prompts  {users.total:,} ({users.mean:.0f} each), read once each",
        f"  a round's user texts    {texts:,}, at most {texts * reason.max_new_tokens:,} tokens",
    ]
    if reason.item_texts == "policy":
        most = items.count * reason.item_max_new_tokens
        lines.append(f"  item prompts (once)     {items.total:,} ({items.mean:.0f} each)")
        lines.append(f"  item texts (once)       {items.count:,}, at most {most:,} tokens")
    pair = users.mean + 2 * reason.max_new_tokens
    most = round(training * pair * align.epochs)
    lines.append(f"  a round's alignment     at most {training:,} pairs, {most:,} tokens")
    return lines


def _memory_lines(config: Config, llama: LlamaConfig, users: PromptTokens) -> list[str]:
    leaves = jax.tree.leaves(shapes(llama))
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    weights = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    layout = plan_layout(
        llama,
        users.lengths,
        config.reason.samples,
        config.reason.max_new_tokens,
        slots=config.reason.slots,
        memory_gib=config.reason.memory_gib,
    )
    cache = layout.bytes_of_shard(bytes_token(llama))
    if config.align.method == "full":
        moving = f"{count * 16 / GIB:.2f} GiB (float32 weights, gradient, two moments)"
    else:
        adapters = _adapter_parameters(config, llama)
        moving = f"{adapters * 16 / GIB:.3f} GiB beside the frozen weights ({adapters:,} values)"
    return [
        f"  weights                 {weights / GIB:.2f} GiB ({count:,} in {llama.param_dtype})",
        f"  sampling cache          {cache / GIB:.2f} GiB ({layout.rows} rows, {layout.prompts} "
        f"prompts of {layout.prompt_tokens} tokens)",
        f"  alignment state         {moving}",
    ]


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
