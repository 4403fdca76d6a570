"""Takes a result elsewhere: python -m dpo4rec_jax.export --workdir D --format hf --to DIR

hf         the aligned policy as a Hugging Face directory (transformers, vLLM, llama.cpp)
peft       what alignment added, as one PEFT adapter on the base model
knowledge  the last round's text vectors (safetensors) with their user and item ids (Parquet)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dpo4rec_jax.command import exit_status
from dpo4rec_jax.config import Config, InputError
from dpo4rec_jax.workspace import Workspace, write_safetensors


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dpo4rec_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", required=True, metavar="D", help="workspace of a finished run")
    parser.add_argument("--format", required=True, choices=tuple(FORMATS))
    parser.add_argument("--to", required=True, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the exported weights (policy.param_dtype)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return exit_status(lambda: export(options))


def export(options: argparse.Namespace) -> None:
    """Raises InputError where the workspace lacks what is asked for."""
    workspace = Workspace(Path(options.workdir))
    config = workspace.config()
    what = FORMATS[options.format](config, workspace, Path(options.to), options.dtype)
    print(f"{what}: {options.to}")


def export_policy(config: Config, workspace: Workspace, to: Path, dtype: str | None) -> str:
    """Writes the policy of the last round with its adapters merged."""
    from dpo4rec_jax.weights import load_policy
    from dpo4rec_jax.weights.export import save_policy

    _require_aligned(config, workspace)
    path, adapters = workspace.policy_source(config, config.rounds)
    policy = load_policy(
        path,
        dtype="float32",
        param_dtype=dtype or config.policy.param_dtype,
        tokenizer=config.policy.tokenizer,
        adapters=adapters,
        cache_dir=config.runtime.cache_dir,
    )
    save_policy(policy, to)
    return f"policy after {alignments(config.rounds)} ({policy.config.param_dtype})"


def alignments(count: int) -> str:
    return "1 alignment" if count == 1 else f"{count} alignments"


def export_adapter(config: Config, workspace: Workspace, to: Path, dtype: str | None) -> str:
    """Writes the adapters of all rounds as one."""
    from dpo4rec_jax.weights import outline, peft

    if config.align.method != "lora" or not config.rounds:
        raise InputError(
            f"{workspace.path}: expected a run with align.method lora and rounds, got "
            f"{config.align.method} and {config.rounds}; use --format hf"
        )
    _require_aligned(config, workspace)
    path, adapters = workspace.policy_source(config, config.rounds)
    architecture, _ = outline(
        path, tokenizer=config.policy.tokenizer, cache_dir=config.runtime.cache_dir
    )
    loaded = [peft.load_adapter(directory, architecture) for directory in adapters]
    adapter, lora_config = loaded[0] if len(loaded) == 1 else peft.combine(loaded)
    peft.save_adapter(to, architecture, adapter, lora_config, base=path)
    return f"adapter of {alignments(len(loaded))}, rank {lora_config.rank}, on {path}"


def export_knowledge(config: Config, workspace: Workspace, to: Path, dtype: str | None) -> str:
    """Writes knowledge.safetensors (user_UxCxF, user_count, item_IxF) and, row by row, the ids."""
    import polars as pl

    from dpo4rec_jax.data.knowledge import Knowledge

    done = [
        round_
        for round_ in range(config.rounds + 1)
        if workspace.manifest("encode", round_) is not None
    ]
    if not done:
        raise InputError(f"{workspace.path}: no round is encoded yet; run stage encode")
    knowledge = Knowledge.load(workspace.stage_dir("encode", done[-1]) / "vectors.npz")
    to.mkdir(parents=True, exist_ok=True)
    tensors = {
        "user_UxCxF": knowledge.user_UCF,
        "user_count": knowledge.count_U,
        "item_IxF": knowledge.item_IF,
    }
    write_safetensors(to / "knowledge.safetensors", tensors, {"round": str(done[-1])})
    users = pl.DataFrame({"user": knowledge.user_id, "num_texts": knowledge.count_U})
    users.with_row_index("row").write_parquet(to / "users.parquet")
    items = pl.DataFrame({"item": knowledge.item_id})
    items.with_row_index("row").write_parquet(to / "items.parquet")
    return f"vectors of round {done[-1]}, {len(users)} users and {len(items)} items"


def _require_aligned(config: Config, workspace: Workspace) -> None:
    for round_ in range(config.rounds):
        if workspace.manifest("align", round_) is None:
            raise InputError(
                f"{workspace.path}: round {round_} is not aligned yet; finish the run with "
                "python -m dpo4rec_jax.train ... --resume"
            )


FORMATS = {"hf": export_policy, "peft": export_adapter, "knowledge": export_knowledge}

if __name__ == "__main__":
    sys.exit(main())
