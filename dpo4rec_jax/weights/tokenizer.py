"""Tokenizers: loading, fitting them to a checkpoint, and the ids that end a reply."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dpo4rec_jax.config import InputError

SPARE_ROWS = 2048  # embeddings are padded by a few hundred rows; more means another tokenizer


def load_tokenizer(directory: str | Path) -> Any:
    """The fast tokenizer of a directory; never runs code from it. InputError where it fails."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=False
        )
    except Exception as error:  # OSError, ValueError, and tokenizers' bare Exception
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{directory}: no usable tokenizer: {reason}") from None
    if not tokenizer.is_fast:
        raise InputError(f"{directory}: expected a tokenizer.json (fast tokenizer), got none")
    return tokenizer


def check_fit(tokenizer: Any, vocab_size: int, source: str) -> None:
    """Raises InputError for a tokenizer that cannot belong to an embedding of so many rows."""
    num_ids = max(tokenizer.get_vocab().values(), default=-1) + 1
    if num_ids > vocab_size:
        raise InputError(
            f"{source}: the tokenizer has ids up to {num_ids - 1}, the embedding {vocab_size} rows;"
            " this is the tokenizer of another model"
        )
    if vocab_size - num_ids > max(SPARE_ROWS, vocab_size // 10):
        raise InputError(
            f"{source}: the tokenizer has {num_ids} ids, the embedding {vocab_size} rows; this is "
            "the tokenizer of another model"
        )


def stop_ids(tokenizer: Any, *configs: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end a reply: `eos_token_id` of each config (one or several), the tokenizer's own,
    and what its chat template puts behind an assistant's message."""
    found: list[int] = []
    for config in configs:
        eos = config.get("eos_token_id")
        if eos is not None:
            found += eos if isinstance(eos, list) else [eos]
    if not all(isinstance(token, int) for token in found):
        raise InputError(f"eos_token_id: expected token ids, got {found!r:.80}")
    if tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    found += _chat_end(tokenizer)
    return tuple(dict.fromkeys(found))


def _chat_end(tokenizer: Any) -> Iterable[int]:
    if not tokenizer.chat_template:
        return []
    reply = "dpo4rec"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": reply}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template of another shape; it says nothing about its end
        return []
    behind = text.rpartition(reply)[2].strip()
    first = tokenizer.encode(behind, add_special_tokens=False)[:1] if behind else []
    return [token for token in first if token in tokenizer.all_special_ids]
