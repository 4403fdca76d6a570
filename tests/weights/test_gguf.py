"""GGUF files written in the test, as llama.cpp's converter lays them out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import hf_models
import jax
import numpy as np
import pytest
from gguf_files import WORDS, write

from dpo4rec_jax.weights import huggingface, load_policy
from dpo4rec_jax.weights.gguf import _gguf_name

TOKENS_BT, LENGTH_B = np.array([[3, 4, 5, 6, 7]]), np.array([5])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        model = hf_models.make_model(name)
        return hf_models.save_model(model, tmp_path_factory.mktemp(name))

    return make


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows are whole quantisation blocks."""
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    hf_models.FAMILY["wide"] = ("llama", sizes)
    return hf_models.save_model(hf_models.make_model("wide"), tmp_path_factory.mktemp("wide"))


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("non-square", "llama"), ("qwen-2.5", "qwen2"), ("qwen-3", "qwen3")],
)
def test_unquantised_gguf_is_the_checkpoint_bitwise(
    name: str, architecture: str, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = checkpoints(name)
    expected = load_policy(directory)
    policy = load_policy(write(tmp_path / "m.gguf", directory, architecture=architecture))
    jax.tree.map(np.testing.assert_array_equal, policy.params, expected.params)
    np.testing.assert_array_equal(
        policy.logits(TOKENS_BT, LENGTH_B), expected.logits(TOKENS_BT, LENGTH_B)
    )


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_quantised_gguf_holds_the_nearest_values(kind: str, wide: Path, tmp_path: Path) -> None:
    kind_of = gguf.GGMLQuantizationType[kind]
    policy = load_policy(write(tmp_path / "m.gguf", wide, kind_of))
    exact = hf_models.as_hf(policy.config, load_policy(wide).params)
    got = hf_models.as_hf(policy.config, policy.params)
    step = {"F16": 2**-11, "BF16": 2**-8, "Q8_0": 2**-7, "Q4_0": 2**-3, "Q4_1": 2**-3}[kind]
    for name, value in exact.items():
        assert np.abs(got[name] - value).max() <= step * np.abs(value).max(), name


def q4_k(block: bytes) -> np.ndarray:
    """256 values by ggml's layout: f16 d and dmin, 12 bytes of 6-bit scales and minima, nibbles."""
    d, smallest = np.frombuffer(block[:4], np.float16).astype(np.float32)
    packed, nibbles = block[4:16], np.frombuffer(block[16:], np.uint8)
    out = []
    for part in range(8):
        if part < 4:
            scale, minimum = packed[part] & 63, packed[part + 4] & 63
        else:
            scale = (packed[part + 4] & 15) | (packed[part - 4] >> 6) << 4
            minimum = (packed[part + 4] >> 4) | (packed[part] >> 6) << 4
        chosen = nibbles[part // 2 * 32 : part // 2 * 32 + 32]
        out.append(d * scale * (chosen >> 4 * (part % 2) & 15) - smallest * minimum)
    return np.concatenate(out)


def q6_k(block: bytes) -> np.ndarray:
    """256 values by ggml's layout: 128 bytes of low nibbles, 64 of high pairs, 16 scales, f16 d."""
    low, high = np.frombuffer(block[:128], np.uint8), np.frombuffer(block[128:192], np.uint8)
    scales = np.frombuffer(block[192:208], np.int8)
    d = np.frombuffer(block[208:], np.float16).astype(np.float32)[0]
    out = np.zeros(256, np.float32)
    for index in range(256):
        half, rest = divmod(index, 128)
        quarter, column = divmod(rest, 32)
        nibble = low[half * 64 + column + 32 * (quarter % 2)] >> 4 * (quarter // 2) & 15
        pair = high[half * 32 + column] >> 2 * quarter & 3
        out[index] = d * scales[index // 16] * (int(nibble | pair << 4) - 32)
    return out


@pytest.mark.parametrize(("kind", "size", "decode"), [("Q4_K", 144, q4_k), ("Q6_K", 210, q6_k)])
def test_k_quantised_rows_decode_by_ggmls_layout(
    kind: str, size: int, decode: Callable[[bytes], np.ndarray]
) -> None:
    from dpo4rec_jax.weights.gguf import QUANTISATIONS

    assert kind in QUANTISATIONS
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 256, (3, 2 * size), np.uint8)
    scales = [0, 2] if kind == "Q4_K" else [208]
    for offset in [start + at for start in (0, size) for at in scales]:
        rows[:, offset : offset + 2] = np.float16([[0.5], [-1.25], [2.0]]).view(np.uint8)
    got = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    blocks = [[row[:size].tobytes(), row[size:].tobytes()] for row in rows]
    expected = np.stack([np.concatenate([decode(block) for block in row]) for row in blocks])
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_every_tensor_has_a_gguf_name(checkpoints: Callable[[str], Path]) -> None:
    config = load_policy(checkpoints("qwen-3")).config
    names = [_gguf_name(name) for name in huggingface.slots(config)]
    assert len(set(names)) == len(names)
    assert "blk.1.ffn_gate.weight" in names and "output.weight" in names


def test_tokenizer_comes_out_of_the_metadata(wide: Path, tmp_path: Path) -> None:
    policy = load_policy(write(tmp_path / "m.gguf", wide))
    assert policy.stop_ids == (2,)
    assert policy.chat_ids([{"role": "user", "content": "cab"}]) == [
        WORDS.index("c"),
        WORDS.index("ab"),
        2,
    ]
