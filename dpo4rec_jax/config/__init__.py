"""The configuration of a run. A YAML file lists only what differs from the defaults in `sections`
and may name a `base:` file that it overrides; `reading` merges them."""

from __future__ import annotations

from dpo4rec_jax.config.errors import InputError
from dpo4rec_jax.config.reading import dump_config, load_config, section_of
from dpo4rec_jax.config.sections import (
    AlignConfig,
    ColumnsConfig,
    Config,
    DataConfig,
    EncodeConfig,
    EndpointConfig,
    EvaluateConfig,
    LoraConfig,
    PolicyConfig,
    PreferConfig,
    PromptsConfig,
    RankConfig,
    ReasonConfig,
    RuntimeConfig,
    Section,
    SyntheticConfig,
    WarmupConfig,
)

__all__ = [
    "AlignConfig",
    "ColumnsConfig",
    "Config",
    "DataConfig",
    "EncodeConfig",
    "EndpointConfig",
    "EvaluateConfig",
    "InputError",
    "LoraConfig",
    "PolicyConfig",
    "PreferConfig",
    "PromptsConfig",
    "RankConfig",
    "ReasonConfig",
    "RuntimeConfig",
    "Section",
    "SyntheticConfig",
    "WarmupConfig",
    "dump_config",
    "load_config",
    "section_of",
]
