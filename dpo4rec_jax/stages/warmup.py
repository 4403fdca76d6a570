"""Stage warmup: supervised imitation of given texts, before round 0.

The tiny policy learns here to write at all: fluent texts that name attributes of the history at
random. Any other policy may imitate the texts of a JSONL file (ChatGPT's, say) for the users they
are of. Only completions are learned, and several texts of a prompt share one row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
from jaxtyping import Array

from dpo4rec_jax.config import InputError
from dpo4rec_jax.data import synthetic
from dpo4rec_jax.data.prepared import TRAIN, Prepared
from dpo4rec_jax.data.texts import read_texts
from dpo4rec_jax.runtime import state as training
from dpo4rec_jax.runtime.checkpoint import Checkpoints, discard
from dpo4rec_jax.runtime.loader import Feed, Microbatch, Rows, shuffled
from dpo4rec_jax.runtime.loop import Trainer
from dpo4rec_jax.runtime.optimizer import adamw, learning_rate_schedule
from dpo4rec_jax.runtime.state import Batch, Loss, Sums, Tree
from dpo4rec_jax.sampling.prompts import fit_prompt
from dpo4rec_jax.stages.tuning import Tuning, load, seed_of, tuning_of, weighted_sum
from dpo4rec_jax.weights import Policy
from dpo4rec_jax.weights.export import save_policy
from dpo4rec_jax.weights.tiny import make_tiny
from dpo4rec_jax.workspace import Stage

LEARNING_RATE_TINY, LEARNING_RATE = 5e-3, 2e-5
MAX_GRAD_NORM, ADAM_B2 = 1.0, 0.98
MAX_SHAPES = 4

ORDER_STREAM, INIT_STREAM, DROPOUT_STREAM = range(10, 13)


def run(stage: Stage) -> None:
    """Leaves policy/, a Hugging Face directory. Raises InputError for texts that cannot be used."""
    config, warmup = stage.config, stage.config.warmup
    tiny = config.policy.path == "tiny"
    lora_config = config.align.lora if warmup.method == "lora" and not tiny else None
    if tiny:
        words = synthetic.vocabulary(config.data)
        key = jax.random.key(seed_of(config, INIT_STREAM))
        policy = make_tiny(config.policy.model_copy(update={"param_dtype": "float32"}), words, key)
    else:
        policy = load(config, config.policy.path, (), lora_config)
    tuning = tuning_of(config, policy, lora_config, remat="none" if tiny else config.align.remat)
    if warmup.texts in (None, "synthetic"):
        rows = synthetic_rows(stage, policy)
    else:
        rows = imitation_rows(stage, policy, str(warmup.texts))
    trainable = _trained(stage, tuning, rows, LEARNING_RATE_TINY if tiny else LEARNING_RATE)
    save_policy(tuning.trained(trainable, config), stage.directory / "policy")
    discard(stage.directory / "checkpoints")


def synthetic_rows(stage: Stage, policy: Policy) -> Rows:
    """A new viewer for every row of the run, each with several texts."""
    config, warmup = stage.config, stage.config.warmup
    examples = synthetic.warmup_texts(
        config.data, config.seed, viewers=warmup.steps * warmup.batch, samples=warmup.samples
    )
    prompts = [policy.chat_ids(messages) for messages, _ in examples]
    completions = [[reply_ids(policy, messages, t) for t in texts] for messages, texts in examples]
    return Rows(prompts, completions)


def imitation_rows(stage: Stage, policy: Policy, path: str) -> Rows:
    """The texts of training users in a JSONL file, behind the prompts that those users get."""
    prepared = Prepared.load(stage.workspace.stage_dir("prepare"))
    index_of = {id: u for u, id in enumerate(prepared.user_id) if prepared.split_U[u] == TRAIN}
    texts = read_texts(path, "user", index_of)
    if not texts:
        raise InputError(f"{path}: no text of a training user; expected lines {{'user', 'text'}}")
    most = max(map(len, texts.values()))
    prompts, completions = [], []
    for user, of_user in texts.items():
        prompt = prepared.user_prompts[index_of[user]]
        replies = [reply_ids(policy, prompt.messages, text) for text in of_user]
        room = policy.config.max_position - max(map(len, replies))
        ids, _ = fit_prompt(policy, prompt, min(stage.config.policy.max_prompt_tokens, room))
        prompts.append(ids)
        completions.append([*replies, *[[]] * (most - len(replies))])
    return Rows(prompts, completions)


def reply_ids(policy: Policy, messages: Sequence[Mapping[str, str]], text: str) -> list[int]:
    """The ids of a text as the policy's reply, its first stop id included.

    Raises InputError where the chat template writes a finished turn otherwise than it opens one.
    """
    tokenizer = policy.tokenizer
    turn = [*messages, {"role": "assistant", "content": text}]
    opened = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=True
    )
    finished = tokenizer.apply_chat_template(turn, tokenize=False)
    if not finished.startswith(opened):
        raise InputError(
            "warmup.texts: the policy's chat template rewrites the prompt once it is answered, so "
            "texts cannot be imitated with it; name another policy.tokenizer"
        )
    ids = tokenizer.encode(finished[len(opened) :], add_special_tokens=False)
    ends = [place for place, id in enumerate(ids) if id in policy.stop_ids]
    return ids[: ends[0] + 1] if ends else [*ids, policy.stop_ids[0]]


def imitation_loss(tuning: Tuning) -> Loss:
    """Cross-entropy of the completions, nats a token: summed, with the tokens as weight."""

    def loss(trainable: Tree, frozen: Tree, batch: Batch, key: Array | None) -> Sums:
        logp_B = tuning.token_logps(trainable, frozen, batch, key).sum(axis=(1, 2))
        tokens_B = batch["completion_length_BC"].sum(axis=1)
        mask_B = batch["mask_B"]
        return Sums(-weighted_sum(logp_B, mask_B), weighted_sum(tokens_B, mask_B), {})

    return loss


def _trained(stage: Stage, tuning: Tuning, rows: Rows, default_rate: float) -> Tree:
    config, warmup = stage.config, stage.config.warmup
    size = math.ceil(warmup.batch / tuning.row_multiple) * tuning.row_multiple
    microbatches = _first_steps(
        rows, warmup.steps, warmup.batch, size, seed_of(config, ORDER_STREAM)
    )
    schedule = learning_rate_schedule(
        default_rate if warmup.learning_rate is None else warmup.learning_rate,
        len(microbatches),
        warmup_fraction=warmup.warmup_fraction,
    )
    optimizer = adamw(schedule, max_grad_norm=MAX_GRAD_NORM, b2=ADAM_B2)
    trainer = Trainer(
        loss=imitation_loss(tuning),
        optimizer=optimizer,
        schedule=schedule,
        log=stage.log,
        progress=stage.progress,
        description="warm-up",
        unit="prompts",
        advice="lower warmup.learning_rate",
        max_skipped=config.runtime.max_skipped,
        diagnosis=stage.directory / "diagnosis.json",
        log_every=warmup.log_every,
        save_every=warmup.save_every,
        place=tuning.place,
    )
    trainable, frozen = tuning.start(seed_of(config, INIT_STREAM))
    state = training.create(trainable, optimizer, seed_of(config, DROPOUT_STREAM))
    feed = Feed(rows, microbatches, size)
    with Checkpoints(stage.directory / "checkpoints") as checkpoints:
        return trainer.fit(tuning.place_state(state), frozen, feed, checkpoints).trainable


def _first_steps(rows: Rows, steps: int, batch: int, size: int, seed: int) -> list[Microbatch]:
    """So many steps of the shuffled rows, over as many epochs as they take."""
    epochs = math.ceil(steps / math.ceil(len(rows) / batch))
    plan = shuffled(
        rows,
        seed=seed,
        epochs=epochs,
        step_rows=batch,
        microbatch_rows=size,
        max_shapes=MAX_SHAPES,
    )
    return plan[:steps]
