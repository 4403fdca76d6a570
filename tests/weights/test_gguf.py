"""GGUF files written in the test, as llama.cpp's converter lays them out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import hf_models
import jax
import numpy as np
import pytest

from dpo4rec_jax.config import InputError
from dpo4rec_jax.weights import huggingface, load_policy
from dpo4rec_jax.weights.gguf import _gguf_name

TOKENS_BT, LENGTH_B = np.array([[3, 4, 5, 6, 7]]), np.array([5])
WORDS = ["<unk>", "<|im_start|>", "<|im_end|>", *(chr(33 + index) for index in range(93)), "ab"]


def interleave(value: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: halves become adjacent pairs."""
    halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return halves.swapaxes(1, 2).reshape(value.shape)


def write(
    path: Path,
    directory: Path,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    architecture: str = "llama",
    metadata: Callable[[gguf.GGUFWriter], None] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """The checkpoint of a directory as GGUF, its matrices stored as `kind`."""
    policy = load_policy(directory)
    config = policy.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.hidden)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3] + [1] * 94)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}<|im_end|>")
    if metadata is not None:
        metadata(writer)
    if "tokenizer.ggml.merges" not in writer.kv_data[0]:
        writer.add_token_merges(["a b"])
    named = {_gguf_name(k): v for k, v in hf_models.as_hf(config, policy.params).items()}
    for name, value in (named | (tensors or {})).items():
        heads = {"attn_q": config.heads, "attn_k": config.kv_heads}.get(name.split(".")[-2])
        if architecture == "llama" and heads:
            value = interleave(value, heads)
        value = np.ascontiguousarray(value, np.float32)
        if value.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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


def with_uint32(key: str, value: int) -> Callable[[gguf.GGUFWriter], None]:
    return lambda writer: writer.add_uint32(key, value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"architecture": "gemma2"}, r"architecture: expected one of llama, qwen2, .* 'gemma2'"),
        ({"metadata": with_uint32("llama.expert_count", 8)}, r"expected a dense model, got 8 exp"),
        (
            {"metadata": lambda writer: writer.add_string("llama.rope.scaling.type", "yarn")},
            r"rope scaling \(yarn\) is not read from GGUF",
        ),
        (
            {"tensors": {"rope_freqs.weight": np.ones(8, np.float32)}},
            r"rope scaling .* is not read from GGUF",
        ),
        (
            {"tensors": {"blk.0.ffn_gate_inp.weight": np.ones((2, 64), np.float32)}},
            r"blk\.0\.ffn_gate_inp\.weight: expected no such tensor",
        ),
        (
            {"kind": gguf.GGMLQuantizationType.Q5_0},
            r"token_embd\.weight: expected F32, .* got Q5_0",
        ),
    ],
)
def test_gguf_we_do_not_compute_is_refused_by_name(
    options: dict[str, Any], says: str, wide: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "m.gguf", wide, **options)
    with pytest.raises(InputError) as caught:
        load_policy(path)
    assert re.search(says, str(caught.value)) and "\n" not in str(caught.value)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, r"damaged or not a GGUF file"),
        (lambda path: path.write_bytes(b"not a model at all" * 9), r"damaged or not a GGUF file"),
        (lambda path: path.write_bytes(b""), r"damaged or not a GGUF file"),
        (lambda path: path.unlink(), r"expected a GGUF file, got none"),
    ],
)
def test_damaged_gguf_is_one_line(
    damage: Callable[[Path], Any], says: str, wide: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "m.gguf", wide)
    damage(path)
    with pytest.raises(InputError) as caught:
        load_policy(path)
    assert re.search(says, str(caught.value)) and "\n" not in str(caught.value)


def test_tokenizer_comes_out_of_the_metadata(wide: Path, tmp_path: Path) -> None:
    policy = load_policy(write(tmp_path / "m.gguf", wide))
    assert policy.stop_ids == (2,)
    assert policy.chat_ids([{"role": "user", "content": "cab"}]) == [
        WORDS.index("c"),
        WORDS.index("ab"),
        2,
    ]
