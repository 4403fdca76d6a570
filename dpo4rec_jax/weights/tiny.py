"""The tiny policy: a small Llama with a vocabulary of words, made and warmed up within a run.

It is a Hugging Face checkpoint like any other once saved; nothing else in the project knows it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import jax
import tokenizers
from jaxtyping import Array
from tokenizers import decoders, models, pre_tokenizers

from dpo4rec_jax.config import PolicyConfig
from dpo4rec_jax.models import llama
from dpo4rec_jax.weights import hf_config
from dpo4rec_jax.weights.policy import Policy, resolve_dtypes
from dpo4rec_jax.weights.tokenizer import stop_ids

PAD, UNKNOWN, END = "<|pad|>", "<|unknown|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# A word, a punctuation mark or a white-space character, each with the space before it if any; so
# the pieces of a text concatenate to the text.
PIECE = r" ?[\w'-]+| ?[^\w\s]|\s"


def words_of(texts: Iterable[str]) -> list[str]:
    """The vocabulary that covers the texts: their words and marks, sorted, each once."""
    return sorted({piece.removeprefix(" ") or " " for text in texts for piece in _split(text)})


def _split(text: str) -> list[str]:
    return re.findall(PIECE, text)


def make_tokenizer(words: Iterable[str]) -> Any:
    """A word-level tokenizer with chat template. Known words decode to exactly what was encoded."""
    import transformers

    specials = [PAD, UNKNOWN, END, *ROLES]
    pieces = dict.fromkeys(specials)
    for word in words:
        pieces[word] = None
        if not word.isspace():
            pieces[f" {word}"] = None
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(PIECE), "isolated")
    backend.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=TEMPLATE,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        clean_up_tokenization_spaces=False,
    )


def make_tiny(config: PolicyConfig, words: Iterable[str], key: Array) -> Policy:
    """A randomly initialised policy of the config's tiny sizes that knows the given words."""
    tokenizer = make_tokenizer(words)
    width, heads = config.tiny_width, config.tiny_heads
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": config.tiny_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": max(2, width // heads // 2 * 2),
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    dtype, param_dtype = resolve_dtypes(config.dtype, config.param_dtype)
    architecture = hf_config.parse_config(values, "tiny", dtype=dtype, param_dtype=param_dtype)
    generation = {key_: values[key_] for key_ in ("eos_token_id", "pad_token_id")}
    params = _by_fan_in(llama.init(architecture, key), width)
    return Policy(
        architecture, params, tokenizer, stop_ids(tokenizer, generation), values, generation
    )


def _by_fan_in(params: llama.Params, width: int) -> Any:
    """Matrices scaled from the deviation that suits large models to 1 / sqrt(width).

    Copying is a product of several matrices; from 0.02 at such widths it takes thousands of steps
    to appear, from here tens.
    """
    factor = width**-0.5 / llama.INIT_DEVIATION

    def scaled(path: tuple[Any, ...], leaf: Array) -> Array:
        is_norm = "norm" in str(getattr(path[-1], "key", ""))
        return leaf if is_norm else leaf * factor

    return jax.tree_util.tree_map_with_path(scaled, params)
