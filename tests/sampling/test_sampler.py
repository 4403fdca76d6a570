"""Sampling with tiny random Llamas: exact, independent of company, economical."""

from __future__ import annotations

import dataclasses
import functools
import json
import re

import jax
import numpy as np
import pytest
from process_group import on_eight_devices
from scipy import special, stats

from dpo4rec_jax.config import InputError
from dpo4rec_jax.models import llama
from dpo4rec_jax.models.attention import Causal
from dpo4rec_jax.sampling import (
    Completion,
    Figures,
    Layout,
    common_head,
    plan_layout,
    sample,
    steps,
    stream,
)
from dpo4rec_jax.sampling.filters import Settings
from dpo4rec_jax.sampling.schedule import Schedule

CONFIG = llama.LlamaConfig(
    vocab_size=300, width=48, hidden=96, layers=2, heads=6, kv_heads=2, head_dim=16
)
STOPS = (7, 8, 9)


class Words:
    """A tokenizer that writes ids; special tokens are the stop ids."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(str(token) for token in tokens if token not in STOPS)

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


@dataclasses.dataclass(frozen=True)
class TinyPolicy:
    config: llama.LlamaConfig
    params: dict
    tokenizer: Words = dataclasses.field(default_factory=Words)
    stop_ids: tuple[int, ...] = STOPS

    def chat_ids(self, messages) -> list[int]:
        return [1, *(int(word) for word in messages[-1]["content"].split()), 2]


def tiny_policy(config: llama.LlamaConfig = CONFIG, seed: int = 0) -> TinyPolicy:
    params = llama.init(config, jax.random.key(seed))
    # Ten times the usual weights, so that texts differ and depend on all of their prompt.
    return TinyPolicy(config, jax.tree.map(lambda x: 10 * x if x.ndim > 2 else x, params))


@pytest.fixture(scope="module")
def policy() -> TinyPolicy:
    return tiny_policy()


def random_prompts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(10, 300, length).tolist() for length in lengths]


PROMPTS = random_prompts(1, 40, 33, 2, 64, 130, 32, 21, 90)  # around the sizes of chunks
HEAD = random_prompts(37)[0]
HEADED = [[*HEAD, *own] for own in PROMPTS]


@pytest.fixture(scope="module")
def sampled(policy) -> list[list[Completion]]:
    return sample(policy, PROMPTS, 4, 12, slots=6, logps=True, seed=3)


LONGEST = 180


@functools.partial(jax.jit, static_argnums=0)
def plain_pass(config: llama.LlamaConfig, params: dict, tokens_1T, length_1):
    attention = Causal(length_1)
    hidden, _ = llama.apply(config, params, tokens_1T, attention.position_BT(LONGEST), attention)
    return llama.unembed(config, params, hidden)[0]


def uncached_logits(policy: TinyPolicy, tokens: list[int]) -> np.ndarray:
    """One plain pass over the whole text, padded."""
    padded_1T = np.zeros((1, LONGEST), np.int32)
    padded_1T[0, : len(tokens)] = tokens
    length_1 = np.array([len(tokens)], np.int32)
    return np.asarray(plain_pass(policy.config, policy.params, padded_1T, length_1))[: len(tokens)]


def uncached_logps(policy: TinyPolicy, prompt: list[int], tokens: list[int]) -> np.ndarray:
    logits_TV = uncached_logits(policy, prompt + tokens[:-1])[len(prompt) - 1 :]
    logp_TV = special.log_softmax(logits_TV, axis=-1)
    return logp_TV[np.arange(len(tokens)), tokens]


def test_cached_log_probabilities_equal_an_uncached_pass(policy, sampled) -> None:
    for prompt, completions in zip(PROMPTS, sampled, strict=True):
        for completion in completions:
            expected_T = uncached_logps(policy, prompt, completion.tokens)
            np.testing.assert_allclose(completion.logps, expected_T, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [{"sliding_window": 20}, {"qk_norm": True, "attention_bias": True, "tied": True, "heads": 2}],
    ids=["sliding window", "Qwen's flags"],
)
def test_cached_log_probabilities_of_other_architectures(changes) -> None:
    policy = tiny_policy(dataclasses.replace(CONFIG, **changes))
    prompts = random_prompts(45, 10)
    for prompt, completions in zip(
        prompts, sample(policy, prompts, 2, 30, logps=True), strict=True
    ):
        for completion in completions:
            expected_T = uncached_logps(policy, prompt, completion.tokens)
            np.testing.assert_allclose(completion.logps, expected_T, atol=1e-4)


def test_prompts_may_be_prefilled_several_at_a_time(policy) -> None:
    layout = plan_layout(CONFIG, [len(one) for one in PROMPTS], 2, 6, slots=12)
    layout = dataclasses.replace(layout, chunks=((64, 2), (32, 3)))
    figures = Figures()
    found = dict(stream(policy, PROMPTS, layout, logps=True, figures=figures))
    calls_one_by_one = sum(len(layout.chunks_of(len(one) - 1)) for one in PROMPTS)
    assert figures.prefill_calls < calls_one_by_one
    for index, completions in found.items():
        for completion in completions:
            expected_T = uncached_logps(policy, PROMPTS[index], completion.tokens)
            np.testing.assert_allclose(completion.logps, expected_T, atol=1e-4)


def test_what_all_prompts_begin_with_is_prefilled_once(policy) -> None:
    assert common_head(HEADED) == len(HEAD) and common_head(PROMPTS) == common_head([]) == 0
    lengths, prefilled, texts = [len(one) for one in HEADED], [], []
    for common in (0, len(HEAD)):
        layout = plan_layout(CONFIG, lengths, 2, 6, common=common, slots=12)
        figures = Figures()
        found = dict(stream(policy, HEADED, layout, logps=True, figures=figures))
        prefilled.append(figures.prefill_tokens)
        texts.append([[one.tokens for one in found[index]] for index in range(len(HEADED))])
        for index, completions in found.items():
            for completion in completions:
                expected_T = uncached_logps(policy, HEADED[index], completion.tokens)
                np.testing.assert_allclose(completion.logps, expected_T, atol=1e-4)
    assert texts[0] == texts[1]
    assert prefilled[1] < 0.7 * prefilled[0]
    with pytest.raises(InputError, match=r"prompt 1: expected to begin with 37 tokens of prompt 0"):
        list(stream(policy, [HEADED[0], PROMPTS[1]], layout))


def test_greedy_takes_the_likeliest_token_of_an_uncached_pass(policy) -> None:
    completions = sample(policy, PROMPTS[1:4], 1, 8, temperature=0.0)
    for prompt, (completion,) in zip(PROMPTS[1:4], completions, strict=True):
        tokens = list(prompt)
        for token in completion.tokens:
            assert token == uncached_logits(policy, tokens)[-1].argmax()
            tokens.append(token)


def test_texts_end_at_any_stop_id_or_at_the_limit(sampled) -> None:
    finishes = set()
    for completion in (one for completions in sampled for one in completions):
        finishes.add(completion.finish)
        assert not set(completion.tokens[:-1]) & set(STOPS)
        assert (completion.finish == "stop") == (completion.tokens[-1] in STOPS)
        assert completion.finish == "stop" or len(completion.tokens) == 12
        assert completion.logps is not None and len(completion.logps) == len(completion.tokens)
        words = [str(token) for token in completion.tokens if token not in STOPS]
        assert completion.text == " ".join(words)
    assert finishes == {"stop", "length"}


def tokens_of(completions: list[list[Completion]]) -> list[list[list[int]]]:
    return [[one.tokens for one in row] for row in completions]


def test_texts_do_not_depend_on_order_neighbours_slots_or_refills(policy, sampled) -> None:
    in_place = plan_layout(CONFIG, [len(one) for one in PROMPTS], 4, 12, slots=6)
    parked = dataclasses.replace(in_place, parked=1)
    rng = np.random.default_rng(1)
    for chosen in (rng.permutation(len(PROMPTS)), np.array([4]), np.array([8, 0, 5])):
        order = chosen.tolist()
        part = [PROMPTS[index] for index in order]
        for layout in (in_place, parked):
            found = dict(stream(policy, part, layout, seed=3, prompt_ids=order))
            for place, index in enumerate(order):
                expected = [one.tokens for one in sampled[index]]
                assert [one.tokens for one in found[place]] == expected


def test_samples_prompts_rounds_and_seeds_all_draw_anew(policy, sampled) -> None:
    same_prompt = [PROMPTS[1]] * 3
    by_prompt = tokens_of(sample(policy, same_prompt, 4, 12, slots=6, seed=3))
    texts = {tuple(tokens) for row in by_prompt for tokens in row}
    assert len(texts) == 12
    again = tokens_of(sample(policy, same_prompt, 4, 12, slots=6, seed=3))
    assert again == by_prompt
    for other in ({"seed": 4}, {"seed": 3, "round": 1}):
        changed = tokens_of(sample(policy, same_prompt, 4, 12, slots=6, **other))
        assert not texts & {tuple(tokens) for row in changed for tokens in row}


def test_temperature_filters_and_seeds_do_not_recompile(policy, sampled) -> None:
    counts = (steps.decode._cache_size(), steps.prefill._cache_size())
    for settings in ({"temperature": 0.3}, {"top_p": 0.5}, {"top_k": 3}, {"seed": 99}):
        sample(policy, PROMPTS, 4, 12, slots=6, **settings)
    assert (steps.decode._cache_size(), steps.prefill._cache_size()) == counts


def test_frequencies_of_20000_first_tokens_are_the_softmax_of_an_uncached_pass(policy) -> None:
    prompt, temperature, num_samples = PROMPTS[1], 0.8, 20_000
    completions = sample(policy, [prompt], num_samples, 1, temperature, slots=500)
    counts_V = np.bincount([one.tokens[0] for one in completions[0]], minlength=CONFIG.vocab_size)
    logits_V = uncached_logits(policy, prompt)[-1] / temperature
    expected_V = special.softmax(logits_V.astype(np.float64)) * num_samples
    assert expected_V.min() > 5
    assert stats.chisquare(counts_V, expected_V).pvalue > 1e-3


def test_a_finished_rows_slot_is_used_at_once(policy) -> None:
    """Texts of 2 to 16 tokens in 8 slots: waves that wait for their longest would take 16 each."""
    policy = dataclasses.replace(policy, stop_ids=())
    prompts = random_prompts(*[20] * 16)
    rng = np.random.default_rng(0)
    limit_PN = rng.integers(2, 17, (16, 4))
    layout = plan_layout(CONFIG, [20] * 16, 4, 16, slots=8)
    figures = Figures()
    found = dict(stream(policy, prompts, layout, limit_PN=limit_PN, figures=figures))
    lengths_PN = [[len(one.tokens) for one in found[index]] for index in range(16)]
    np.testing.assert_array_equal(lengths_PN, limit_PN)
    least = limit_PN.sum() / 8
    assert figures.decode_steps < 1.15 * least + 16  # the last rows run alone
    assert figures.decode_steps < 0.75 * 16 * (16 * 4 / 8)
    chunk = layout.chunks[-1][0]
    assert figures.prefill_tokens == 16 * chunk  # every prompt once, though it has four texts
    assert (figures.rows, figures.tokens) == (64, limit_PN.sum())


def test_prompts_prefilled_several_at_a_time_get_the_same_texts(policy, sampled) -> None:
    layout = plan_layout(CONFIG, [len(prompt) for prompt in PROMPTS], 4, 12, slots=6)
    layout = dataclasses.replace(layout, chunks=(*layout.chunks[:-1], (layout.chunks[-1][0], 3)))
    found = dict(stream(policy, PROMPTS, layout, seed=3, logps=True))
    for index, expected in enumerate(sampled):
        for one, other in zip(found[index], expected, strict=True):
            assert one.tokens == other.tokens
            np.testing.assert_allclose(one.logps, other.logps, atol=1e-5)


def compiled_decode(layout: Layout, policy: TinyPolicy) -> str:
    prefix, suffix, rows = steps.empty(policy.config, layout, None)
    params = llama.split_layers(policy.params)
    turn = steps.idle_turn(Schedule(layout, [20] * 3))
    job = steps.Job.of(Settings.of(1.0, 1.0, 0), (3, 4), seed=0, round=0)
    kept = (params, prefix, turn, job)
    # Flat lists: lowering puts what is no array into the arguments' own classes, which are checked.
    kept_leaves, kept_tree = jax.tree.flatten(kept)
    donated_leaves, donated_tree = jax.tree.flatten((suffix, rows))

    def decode(donated: list, others: list) -> list:
        suffix, rows = donated_tree.unflatten(donated)
        params, prefix, *rest = kept_tree.unflatten(others)
        return jax.tree.leaves(
            steps.decode.__wrapped__(policy.config, params, prefix, suffix, rows, *rest)
        )

    lowered = jax.jit(decode, donate_argnums=0).lower(donated_leaves, kept_leaves)
    return lowered.compile().as_text()


def test_the_compiled_step_updates_the_caches_in_place(policy) -> None:
    layout = Layout(shards=1, rows=6, prompts=3, samples=4, prompt_tokens=96, new_tokens=24)
    text = compiled_decode(layout, policy)
    copied = set()
    for line in text.splitlines():
        if re.search(r"= \S+ copy\(", line):
            copied.update(re.findall(r"= \w+\[([\d,]+)\]", line))
    K, d = CONFIG.kv_heads, CONFIG.head_dim
    for owners, tokens in (
        (layout.rows, layout.new_tokens),
        (layout.prompts, layout.prompt_tokens),
    ):
        assert f"1,{owners},{K},{d},{tokens}" not in copied
        assert f"1,{owners},{K},{tokens},{d}" not in copied
    aliased = re.search(r"input_output_alias=\{(.*?)\}, entry", text, re.DOTALL)
    assert aliased and aliased[1].count("alias") >= 2 * CONFIG.layers  # every donated suffix


def test_prompts_may_be_ids_strings_or_messages(policy) -> None:
    ids = [1, 50, 60, 2]
    forms = [ids, "1 50 60 2", [{"role": "user", "content": "50 60"}]]
    by_form = [sample(policy, [form], 2, 8, seed=5)[0] for form in forms]
    assert by_form[0] == by_form[1] == by_form[2]
    assert sample(policy, [], 2, 8) == []


def test_prompts_and_limits_that_do_not_fit_are_refused(policy) -> None:
    with pytest.raises(InputError, match="prompt 1: expected 1 to"):
        sample(policy, [[5], []], 1, 4)
    layout = plan_layout(CONFIG, [20], 1, 4)
    most = layout.prompt_tokens + 1
    with pytest.raises(InputError, match=f"prompt 0: expected 1 to {most} tokens, got {most + 1}"):
        list(stream(policy, random_prompts(most + 1), layout))
    with pytest.raises(InputError, match=r"prompt 0: expected ids from 0 to \d+, got 5 to 1000000"):
        sample(policy, [[5, 1_000_000]], 1, 4)
    with pytest.raises(InputError, match="max_new_tokens: expected 1 to 4, got 5 to 5"):
        list(stream(policy, [[5]], layout, limit_PN=np.array([[5]])))


def test_a_policy_without_numbers_is_refused_and_does_not_hang(policy) -> None:
    norm_D = policy.params["final_norm"].at[0].set(np.nan)
    broken = dataclasses.replace(policy, params={**policy.params, "final_norm": norm_D})
    with pytest.raises(InputError, match="policy: its logits for prompt 0 are not finite"):
        sample(broken, [[1, 50, 60, 2]], 2, 8, top_p=0.9)


EIGHT_DEVICES = """
import json
import jax
from dpo4rec_jax.runtime.mesh import make_mesh
from dpo4rec_jax.sampling import plan_layout, stream
from sampling import test_sampler as t
policy, found = t.tiny_policy(), {}
for tensor in (1, 2):
    mesh = make_mesh({"data": -1, "tensor": tensor})
    assert mesh.size == 8
    sizes = ([len(one) for one in t.HEADED], 4, 12)
    layout = plan_layout(t.CONFIG, *sizes, common=len(t.HEAD), slots=16, mesh=mesh)
    params = policy.params
    if tensor > 1:
        from dpo4rec_jax.runtime.mesh import shardings
        params = jax.device_put(params, shardings(params, mesh))
    run = stream(t.TinyPolicy(t.CONFIG, params), t.HEADED, layout, mesh=mesh, seed=3)
    found[tensor] = t.tokens_of([row for _, row in sorted(run, key=lambda pair: pair[0])])
print(json.dumps(found))
"""


def test_eight_devices_write_the_texts_of_one(policy) -> None:
    found = json.loads(on_eight_devices(EIGHT_DEVICES).splitlines()[-1])
    expected = tokens_of(sample(policy, HEADED, 4, 12, slots=6, seed=3))
    rows = [tokens for row in expected for tokens in row]
    for name, of_tensor in found.items():
        others = [tokens for row in of_tensor for tokens in row]
        share = np.mean([one != other for one, other in zip(rows, others, strict=True)])
        assert share <= 0.01, f"tensor {name}"
