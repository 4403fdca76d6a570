"""Malformed weights and tokenizers, given to `train` as policy.path."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import jax
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from malformed_input import Malformed, check_refusal, rows, settings, write
from safetensors.numpy import load_file, save_file

from dpo4rec_jax import train
from dpo4rec_jax.config import InputError, PolicyConfig
from dpo4rec_jax.weights import hf_config, load_policy
from dpo4rec_jax.weights.export import save_policy
from dpo4rec_jax.weights.huggingface import read_header
from dpo4rec_jax.weights.tiny import make_tiny, make_tokenizer

WORDS = [f"word{n}" for n in range(60)]
CONFIG = "data: {synthetic: {users: 40, items: 30, interactions: 20}}\n"

Damage = Callable[[Path], Any]
Make = Callable[[Path], Sequence[str]]


@functools.cache
def sound() -> Path:
    """A checkpoint without a fault, in one file; its rows are whole quantisation blocks."""
    sizes = PolicyConfig(tiny_width=32, tiny_layers=2, tiny_heads=2, dtype="float32")
    directory = Path(tempfile.mkdtemp(prefix="sound-"))
    save_policy(make_tiny(sizes, WORDS, jax.random.key(0)), directory / "whole")
    save_policy(load_policy(directory / "whole"), directory / "sharded", shard_bytes=9000)
    return directory


def damaged(damage: Damage, kind: str = "whole") -> Make:
    """A copy of the sound checkpoint, damaged."""

    def make(directory: Path) -> list[str]:
        policy = Path(shutil.copytree(sound() / kind, directory / "policy"))
        damage(policy)
        return settings(policy__path=policy)

    return make


def tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Make:
    def damage(path: Path) -> None:
        held = load_file(path / "model.safetensors")
        change(held)
        save_file(held, path / "model.safetensors")

    return damaged(damage)


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def setting(**values: Any) -> Make:
    return damaged(lambda path: edit_json(path / "config.json", lambda c: c.update(values)))


def rope(**values: Any) -> Make:
    return setting(rope_parameters={"rope_theta": 1e4, **values})


def file(name: str, content: str | bytes) -> Make:
    return damaged(lambda path: write(path, {name: content}))


def cut(name: str, at: int, kind: str = "whole") -> Make:
    def damage(path: Path) -> None:
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[:at])

    return damaged(damage, kind)


def poison(held: dict[str, np.ndarray]) -> None:
    held["model.layers.1.mlp.up_proj.weight"][3, 2] = np.nan


def transpose(held: dict[str, np.ndarray]) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    held[name] = np.ascontiguousarray(held[name].T)


def scramble(path: Path) -> None:
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:8] + b"?" * 40 + content[48:])


def delete_a_shard(path: Path) -> None:
    next(path.glob("model-00002-*.safetensors")).unlink()


def name_twice(path: Path) -> None:
    first, second = sorted(path.glob("model-*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second)


def misplace(path: Path) -> None:
    last = sorted(path.glob("model-*.safetensors"))[-1].name
    index = path / "model.safetensors.index.json"
    edit_json(index, lambda i: i["weight_map"].update({"model.embed_tokens.weight": last}))


def without_map(path: Path) -> None:
    edit_json(path / "model.safetensors.index.json", lambda index: index.pop("weight_map"))


def other_tokenizer(path: Path) -> None:
    make_tokenizer([f"w{n}" for n in range(300)]).save_pretrained(path)


def unlink(name: str) -> Make:
    return damaged(lambda path: (path / name).unlink())


def rename(name: str, to: str) -> Make:
    return damaged(lambda path: (path / name).rename(path / to))


WEIGHTS = (
    Malformed(
        "cut", cut("model.safetensors", -100), r"safetensors: truncated: .* ends at byte \d+, "
    ),
    Malformed("cut header", cut("model.safetensors", 50), "truncated: ends within its header"),
    Malformed("empty", file("model.safetensors", b""), "truncated: ends within its header"),
    Malformed("scrambled header", damaged(scramble), "not a safetensors file"),
    Malformed(
        "nan", tensors(poison), r"layers\.1\.mlp\.up_proj\.weight: expected finite numbers, got"
    ),
    Malformed(
        "transposed", tensors(transpose), r"down_proj\.weight: expected \[32, 96\], got \[96, 32"
    ),
    Malformed(
        "no norm",
        tensors(lambda held: held.pop("model.norm.weight")),
        r"model\.norm\.weight: expected \[32\], got no such tensor",
    ),
    Malformed(
        "one more",
        tensors(lambda held: held.update(score=np.ones(2, np.float32))),
        r"score: expected no such tensor in this architecture, got \[2\]",
    ),
    Malformed(
        "integers",
        tensors(lambda held: held.update(score=np.ones(2, np.int8))),
        "score: expected F64, F32, F16, BF16, got I8; quantised checkpoints load as GGUF",
    ),
    Malformed(
        "pickled", rename("model.safetensors", "pytorch_model.bin"), r"\.bin: pickled .*never read"
    ),
    Malformed("no weights", unlink("model.safetensors"), "got no weights at all"),
    Malformed(
        "a shard less", damaged(delete_a_shard, "sharded"), r"names the shard model-00002-of-"
    ),
    Malformed("twice", damaged(name_twice, "sharded"), r"stored twice, also in .*model-00001"),
    Malformed(
        "misplaced", damaged(misplace, "sharded"), r"embed_tokens\.weight: expected in model-.*"
    ),
    Malformed(
        "no map", damaged(without_map, "sharded"), "weight_map: expected an object of tensor na"
    ),
    Malformed(
        "no path", lambda d: settings(policy__path=d / "x"), "expected a Hugging Face directory"
    ),
)
CONFIGS = (
    Malformed(
        "no config", unlink("config.json"), r"config\.json: not there; expected a Hugging Face"
    ),
    Malformed("cut config", file("config.json", "{"), r"config\.json: cannot be read as JSON"),
    Malformed("deep config", file("config.json", "[" * 9999), r"as JSON: nested too deeply"),
    Malformed("list config", file("config.json", "[]"), "expected a JSON object, got list"),
    Malformed(
        "family", setting(model_type="gpt2"), "model_type: expected one of llama, .*, got 'gpt2'"
    ),
    Malformed(
        "no size", setting(hidden_size=None), "hidden_size: expected a whole number from 1, got"
    ),
    Malformed("0 heads", setting(num_attention_heads=0), "num_attention_heads: expected .* got 0"),
    Malformed(
        "words", setting(head_dim="many"), "head_dim: expected a whole number from 1, got 'many'"
    ),
    Malformed(
        "eps", setting(rms_norm_eps="tiny"), "rms_norm_eps: expected a number above 0, got 'tiny'"
    ),
    Malformed(
        "a layer more", setting(num_hidden_layers=3), r"layers\.2\.input_layernorm\.weight: expec"
    ),
    Malformed(
        "groups", setting(num_key_value_heads=3), "num_key_value_heads to divide num_attention_h"
    ),
    Malformed("activation", setting(hidden_act="gelu"), "hidden_act: expected 'silu', got 'gelu'"),
    Malformed("bias", setting(mlp_bias=True), "mlp_bias: expected False, got True"),
    Malformed(
        "quantised", setting(quantization_config={"bits": 4}), "quantization_config: a feature we"
    ),
    Malformed(
        "multiplier", setting(residual_multiplier=0.22), "residual_multiplier: a feature we do n"
    ),
    Malformed("window", setting(sliding_window=7), "sliding_window: llama has none, got 7"),
    Malformed("stop", setting(eos_token_id="x"), "eos_token_id'? .*'x'"),
    Malformed(
        "rope: list", setting(rope_scaling=[1]), r"rope_scaling: expected an object, got \[1\]"
    ),
    Malformed(
        "rope: yarn", rope(rope_type="yarn", factor=4.0), "rope_type: expected default, linear or"
    ),
    Malformed(
        "rope: lacks", rope(rope_type="llama3", factor=8.0), "low_freq_factor: expected a number"
    ),
    Malformed(
        "rope: part", rope(partial_rotary_factor=0.5), "partial_rotary_factor: expected 1, got 0.5"
    ),
    Malformed(
        "rope: theta", rope(rope_theta="x"), "rope_theta: expected a number above 0, got 'x'"
    ),
)
TOKENIZERS = (
    Malformed(
        "no tokenizer", unlink("tokenizer.json"), r"policy: (no usable tokenizer|.*tokenizer\.js)"
    ),
    Malformed(
        "cut tokenizer", file("tokenizer.json", '{"version": "1.0", "tr'), "no usable tokenizer"
    ),
    Malformed(
        "another's", damaged(other_tokenizer), r"the tokenizer has ids up to 605, .* another model"
    ),
    Malformed(
        "a directory without one",
        lambda d: settings(policy__path=sound() / "whole", policy__tokenizer=write(d / "t", {})),
        "/t: no usable tokenizer",
    ),
)


def gguf_of(damage: Damage = lambda path: None, **options: Any) -> Make:
    """The sound checkpoint as GGUF, written with these options and then damaged."""

    def make(directory: Path) -> list[str]:
        path = gguf_files.write(write(directory, {}) / "m.gguf", sound() / "whole", **options)
        damage(path)
        return settings(policy__path=path)

    return make


def metadata(method: str, *arguments: Any) -> Make:
    return gguf_of(metadata=lambda writer: getattr(writer, method)(*arguments))


def overwrite(old: bytes, new: bytes) -> Damage:
    return lambda path: path.write_bytes(path.read_bytes().replace(old, new, 1))


GGUF = (
    Malformed(
        "gguf: family", gguf_of(architecture="gemma2"), "architecture: expected one of .*'gemma2'"
    ),
    Malformed(
        "gguf: experts", metadata("add_uint32", "llama.expert_count", 8), "dense model, got 8 exp"
    ),
    Malformed(
        "gguf: yarn",
        metadata("add_string", "llama.rope.scaling.type", "yarn"),
        r"rope scaling \(yarn\) is not read from GGUF",
    ),
    Malformed(
        "gguf: frequencies",
        gguf_of(tensors={"rope_freqs.weight": np.ones(8, np.float32)}),
        "rope scaling .* is not read from GGUF",
    ),
    Malformed(
        "gguf: one more",
        gguf_of(tensors={"blk.0.ffn_gate_inp.weight": np.ones((2, 64), np.float32)}),
        r"blk\.0\.ffn_gate_inp\.weight: expected no such tensor",
    ),
    Malformed(
        "gguf: quantised",
        gguf_of(kind=gguf.GGMLQuantizationType.Q5_0),
        r"token_embd\.weight: expected F32, .* got Q5_0",
    ),
    Malformed(
        "gguf: cut", gguf_of(lambda p: p.write_bytes(p.read_bytes()[:-5000])), "damaged or not a "
    ),
    Malformed(
        "gguf: text", gguf_of(lambda p: p.write_bytes(b"no model " * 9)), "damaged or not a GGUF"
    ),
    Malformed("gguf: empty", gguf_of(lambda p: p.write_bytes(b"")), "damaged or not a GGUF file"),
    Malformed("gguf: none", lambda d: settings(policy__path=d / "m.gguf"), "a GGUF file, got none"),
    Malformed(
        "gguf: key", gguf_of(overwrite(b"llama.block_count", b"llama.block_cnt!!")), "block_count"
    ),
    Malformed(
        "gguf: bytes", gguf_of(overwrite(b"general.arch", b"general.\xffrch")), "damaged or not a"
    ),
)


@rows(*WEIGHTS, *CONFIGS, *TOKENIZERS, *GGUF)
def test_it_is_one_line_and_status_2(
    row: Malformed, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = write(tmp_path, {"c.yaml": CONFIG}) / "c.yaml"
    arguments = ["--config", str(config), "--workdir", str(tmp_path / "w"), *row.make(tmp_path)]
    capsys.readouterr()
    status = train.main([*arguments, "--stages", "prepare,reason"])
    check_refusal(status, capsys.readouterr().err, row.says, tmp_path / "w")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 99) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=4,
)
KEYS = sorted(hf_config._UNDERSTOOD)


@examples(max_examples=200, deadline=None)
@example({"use_sliding_window": True, "max_window_layers": "x", "model_type": "qwen2"})
@given(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4))
def test_any_config_is_an_architecture_or_one_line(changes: dict[str, Any]) -> None:
    values = json.loads((sound() / "whole" / "config.json").read_text())
    try:
        hf_config.parse_config(values | changes, "config.json")
    except InputError as error:
        assert "\n" not in str(error)


@examples(max_examples=200, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 2**64 - 1) | st.integers(0, 99))
def test_any_safetensors_header_is_read_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, header: bytes, length: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header)
    try:
        read_header(path)
    except InputError as error:
        assert "\n" not in str(error)
