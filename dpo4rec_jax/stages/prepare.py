"""Stage prepare, once a run: raw logs and metadata to sequences, lists and prompts."""

from __future__ import annotations

from dpo4rec_jax.data import build
from dpo4rec_jax.stages.affinities import check_size
from dpo4rec_jax.workspace import Stage


def run(stage: Stage) -> None:
    """Raises InputError for whatever the data or section `data` make impossible."""
    config = stage.config
    prepared = build(config.data, config.seed, config.runtime.cache_dir)
    if config.rank.ease is not None:
        check_size(prepared)
    prepared.save(stage.directory)
    counts = prepared.counts
    stage.progress.say(
        f"  {counts['users']:,} users, {counts['items']:,} items, {counts['interactions']:,} "
        f"interactions; {counts['lists']:,} lists, of which {counts['lists_without_positives']:,} "
        "hold no positive"
    )
