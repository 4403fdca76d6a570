"""DPO4Rec in JAX: an LLM aligned with a recommender by the recommender's own ranking quality.

Array axes stand in the suffixes of names: B batch, T tokens, S cache slots, D width, H query
heads, K key/value heads, V vocabulary, L layers (or candidate lists, in the recommender's rooms),
N list items, C completions of one prompt, F features, U users, I items, P pair side (0 chosen,
1 rejected), A attributes, M values of an attribute, E events, R members (seeds x folds of
re-rankers). `mask_` is True where real; `logp_` is in nats, float32.
"""

import os

# transformers serves as a tokenizer here; that PyTorch is missing is no news.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
