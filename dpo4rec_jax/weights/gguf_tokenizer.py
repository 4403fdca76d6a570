"""The tokenizer inside a GGUF file, rebuilt with the tokenizers library.

Two kinds: byte-level BPE ("gpt2", with the pre-tokenizer named by `tokenizer.ggml.pre`) and
SentencePiece BPE ("llama": Llama 2, TinyLlama, Mistral), whose merges follow from its scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from dpo4rec_jax.config import InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {  # as in the tokenizer.json of each family
    "llama-bpe": _CONTRACTIONS + _REST % r"\p{N}{1,3}",
    "qwen2": _CONTRACTIONS + _REST % r"\p{N}",
}


def build(metadata: Mapping[str, Any], path: Path) -> Any:
    """A transformers fast tokenizer with the file's special tokens and chat template.

    Raises InputError for a kind of tokenizer that we cannot rebuild exactly, and whatever the
    tokenizers library raises for metadata that make no tokenizer.
    """
    import transformers

    ggml = {
        name.removeprefix("tokenizer.ggml."): value
        for name, value in metadata.items()
        if name.startswith("tokenizer.ggml.")
    }
    kind, tokens = ggml.get("model"), ggml.get("tokens")
    if kind not in ("gpt2", "llama") or tokens is None:
        raise InputError(
            f"{path}: tokenizer.ggml.model: expected gpt2 or llama, got {kind!r}; name a tokenizer "
            "directory in policy.tokenizer"
        )
    types = ggml.get("token_type") or [NORMAL] * len(tokens)
    backend = _byte_level(ggml, path) if kind == "gpt2" else _sentencepiece(ggml, types)
    added = [
        tokenizers.AddedToken(token, special=token_type == CONTROL, normalized=False)
        for token, token_type in zip(tokens, types, strict=True)
        if token_type in (CONTROL, USER_DEFINED)
    ]
    backend.add_tokens(added)
    specials = {
        f"{ours}_token": tokens[ggml[f"{theirs}_token_id"]]
        for ours, theirs in (
            *(("bos", "bos"), ("eos", "eos")),
            *(("unk", "unknown"), ("pad", "padding")),
        )
        if f"{theirs}_token_id" in ggml
    }
    bos = specials.get("bos_token")
    if bos and ggml.get("add_bos_token", kind == "llama"):
        pieces = [(bos, ggml["bos_token_id"])]
        backend.post_processor = processors.TemplateProcessing(f"{bos} $A", None, pieces)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **specials,
    )


def _byte_level(ggml: Mapping[str, Any], path: Path) -> tokenizers.Tokenizer:
    vocab = {token: index for index, token in enumerate(ggml["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in ggml["merges"]]
    pre = ggml.get("pre", "default")
    # Llama 3 keeps a pre-token that is a token whole, whatever its merges say.
    model = models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe")
    backend = tokenizers.Tokenizer(model)
    if pre in _SPLITS:
        pattern = tokenizers.Regex(_SPLITS[pre])
        first = pre_tokenizers.Split(pattern, "isolated")
        second = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    elif pre in ("smollm", "gpt-2", "gpt2"):
        digits = [pre_tokenizers.Digits(individual_digits=True)] * (pre == "smollm")
        first = pre_tokenizers.Sequence(digits)
        second = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        raise InputError(
            f"{path}: tokenizer.ggml.pre: expected smollm, gpt-2, {', '.join(_SPLITS)}, got "
            f"{pre!r}; name a tokenizer directory in policy.tokenizer"
        )
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([first, second])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(ggml: Mapping[str, Any], types: list[int]) -> tokenizers.Tokenizer:
    tokens, scores = ggml["tokens"], ggml["scores"]
    vocab = {token: index for index, token in enumerate(tokens)}
    # SentencePiece merges the pair whose union scores highest: those unions, best first.
    merges = []
    for token, score, token_type in zip(tokens, scores, types, strict=True):
        if token_type not in (NORMAL, UNUSED):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                merges.append((-score, vocab[left], vocab[right], (left, right)))
    merges.sort(key=lambda merge: merge[:3])
    unknown = tokens[ggml.get("unknown_token_id", 0)]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab,
            [merge[3] for merge in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = [normalizers.Prepend("▁")] * bool(ggml.get("add_space_prefix", True))
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] * bool(prefix)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend
