"""A real trained Llama of 260K parameters in llama2.c's format, against llama2.c's arithmetic."""

from __future__ import annotations

import itertools
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from dpo4rec_jax.weights import Policy, gguf_tokenizer, load_policy

WRITTEN = 64


class Stories:
    """The file's own layout, and a forward pass in numpy after llama2.c's run.c."""

    def __init__(self, path: Path):
        raw = path.read_bytes()
        sizes = struct.unpack("7i", raw[:28])
        self.dim, self.hidden, self.layers, self.heads, self.kv_heads, self.vocab, self.seq = sizes
        self.d = self.dim // self.heads
        self.data, self.at = np.frombuffer(raw, np.float32, offset=28), 0
        L, D, kv = self.layers, self.dim, self.kv_heads * self.d
        self.embed = self.take(abs(self.vocab), D)
        self.attention_norm = self.take(L, D)
        self.q, self.k, self.v = self.take(L, D, D), self.take(L, kv, D), self.take(L, kv, D)
        self.o = self.take(L, D, D)
        self.mlp_norm = self.take(L, D)
        self.gate, self.down = self.take(L, self.hidden, D), self.take(L, D, self.hidden)
        self.up = self.take(L, self.hidden, D)
        self.final_norm = self.take(D)
        assert self.vocab > 0  # tied

    def take(self, *shape: int) -> np.ndarray:
        size = int(np.prod(shape))
        self.at += size
        return self.data[self.at - size : self.at].reshape(shape)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Logits of the last position, by run.c's steps."""

        def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
            return weight * x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5)

        def rotate(x: np.ndarray) -> np.ndarray:
            """Adjacent pairs, as a rotation of the complex plane."""
            frequency = 10000.0 ** (-np.arange(0, self.d, 2) / self.d)
            angle = np.arange(len(x))[:, None] * frequency
            pairs = x.reshape(len(x), -1, self.d // 2, 2)
            turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)[:, None]
            return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

        x, T = self.embed[tokens].astype(np.float64), len(tokens)
        for layer in range(self.layers):
            h = norm(x, self.attention_norm[layer])
            q, k = rotate(h @ self.q[layer].T), rotate(h @ self.k[layer].T)
            q = q.reshape(T, self.heads, self.d)
            k = k.reshape(T, self.kv_heads, self.d)
            v = (h @ self.v[layer].T).reshape(T, self.kv_heads, self.d)
            out = np.zeros_like(q)
            for head in range(self.heads):
                kv = head // (self.heads // self.kv_heads)
                score = q[:, head] @ k[:, kv].T / np.sqrt(self.d)
                score = np.where(np.tri(T, dtype=bool), score, -np.inf)
                weight = np.exp(score - score.max(axis=1, keepdims=True))
                out[:, head] = weight / weight.sum(axis=1, keepdims=True) @ v[:, kv]
            x = x + out.reshape(T, -1) @ self.o[layer].T
            h = norm(x, self.mlp_norm[layer])
            gate = h @ self.gate[layer].T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ self.up[layer].T)) @ self.down[layer].T
        return norm(x[-1], self.final_norm) @ self.embed.T

    def save(self, directory: Path) -> None:
        """As a Hugging Face directory: pairs of rotary rows become halves."""

        def halves(value: np.ndarray, heads: int) -> np.ndarray:
            return value.reshape(heads, self.d // 2, 2, -1).swapaxes(1, 2).reshape(value.shape)

        tensors = {"model.embed_tokens.weight": self.embed, "model.norm.weight": self.final_norm}
        for i in range(self.layers):
            of_layer = {
                "input_layernorm": self.attention_norm[i],
                "post_attention_layernorm": self.mlp_norm[i],
                "self_attn.q_proj": halves(self.q[i], self.heads),
                "self_attn.k_proj": halves(self.k[i], self.kv_heads),
                "self_attn.v_proj": self.v[i],
                "self_attn.o_proj": self.o[i],
                "mlp.gate_proj": self.gate[i],
                "mlp.up_proj": self.up[i],
                "mlp.down_proj": self.down[i],
            }
            tensors |= {f"model.layers.{i}.{key}.weight": x for key, x in of_layer.items()}
        tensors = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
        save_file(tensors, directory / "model.safetensors")
        config = {
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.dim,
            "intermediate_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        }
        (directory / "config.json").write_text(json.dumps(config))


def read_vocabulary(path: Path) -> tuple[list[str], list[float]]:
    raw, at = path.read_bytes(), 4
    tokens, scores = [], []
    while at < len(raw):
        score, length = struct.unpack_from("fi", raw, at)
        tokens.append(raw[at + 8 : at + 8 + length].decode("utf-8"))
        scores.append(score)
        at += 8 + length
    return ["<unk>", "<s>", "</s>", *(token.replace(" ", "\u2581") for token in tokens[3:])], scores


def llama2c_encode(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """run.c's encode: characters, then always the adjacent pair whose union scores best."""
    index = {token: position for position, token in enumerate(tokens)}
    ids = [index[character] for character in "\u2581" + text.replace(" ", "\u2581")]
    while True:
        unions = [index.get(tokens[a] + tokens[b], -1) for a, b in itertools.pairwise(ids)]
        known = [at for at, union in enumerate(unions) if union >= 0]
        if not known:
            return ids
        best = max(known, key=lambda at: (scores[unions[at]], -at))
        ids[best : best + 2] = [unions[best]]


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Stories:
    return Stories(shared_data / "stories260K" / "stories260K.bin")


@pytest.fixture(scope="module")
def vocabulary(shared_data: Path) -> tuple[list[str], list[float]]:
    return read_vocabulary(shared_data / "stories260K" / "tok512.bin")


@pytest.fixture(scope="module")
def tokenizer(vocabulary: tuple[list[str], list[float]]) -> Any:
    tokens, scores = vocabulary
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return gguf_tokenizer.build(metadata, Path("tok512.bin"))


@pytest.fixture(scope="module")
def policy(stories: Stories, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    directory = tmp_path_factory.mktemp("stories260K")
    stories.save(directory)
    tokenizer.save_pretrained(directory)
    return load_policy(directory)


def test_the_model_tells_the_story_that_llama2c_tells(stories: Stories, policy: Policy) -> None:
    expected = [1]
    while len(expected) < WRITTEN:
        expected.append(int(stories.logits(expected).argmax()))
    row = np.zeros((1, WRITTEN), int)
    row[0, 0] = 1
    for length in range(1, WRITTEN):
        logits = policy.logits(row, np.array([length]))
        row[0, length] = int(logits[0, length - 1].argmax())
    assert row[0].tolist() == expected
    text = policy.tokenizer.decode(row[0], skip_special_tokens=True)
    print(text)
    assert text.startswith("Once upon a time")


def test_logits_equal_llama2cs(stories: Stories, policy: Policy) -> None:
    tokens = [1, *np.random.default_rng(0).integers(3, 512, 40).tolist()]
    got = policy.logits(np.array([tokens]), np.array([len(tokens)]))[0, -1]
    np.testing.assert_allclose(got, stories.logits(tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "text",
    [
        "Once upon a time, there was a little girl named Lily.",
        "She loved to play outside in the park!",
        "The  big dog said: no no no",
    ],
)
def test_sentencepiece_tokenizer_merges_as_llama2c(
    text: str, tokenizer: Any, vocabulary: tuple[list[str], list[float]]
) -> None:
    ids = tokenizer.encode(text)
    assert ids == [1, *llama2c_encode(text, *vocabulary)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_sentencepiece_tokenizer_falls_back_to_bytes(tokenizer: Any) -> None:
    ids = tokenizer.encode("\u65e5")
    assert ids[-3:] == [3 + byte for byte in "\u65e5".encode()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "\u65e5"
