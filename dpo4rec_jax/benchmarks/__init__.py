"""What `python -m dpo4rec_jax.benchmark` measures: a module a part, and the machine beside them."""
