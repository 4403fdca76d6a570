"""What training minimises and evaluation reports: one float32 value per example."""

from dpo4rec_jax.objectives.dpo import dpo_loss
from dpo4rec_jax.objectives.listwise import listwise_loss, log_likelihood
from dpo4rec_jax.objectives.metrics import average_precision, ndcg

__all__ = ["average_precision", "dpo_loss", "listwise_loss", "log_likelihood", "ndcg"]
