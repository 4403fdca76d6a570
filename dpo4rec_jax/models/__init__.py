"""Networks: the policy (llama), its adapters (lora), the encoder (bert) and the re-rankers.

Flax linen stays inside; everyone else sees `init`, `apply` and nested dicts of arrays.
"""
