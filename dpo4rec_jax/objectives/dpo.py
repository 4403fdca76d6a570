"""Direct preference optimisation and its relatives, from log-probabilities of whole completions."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Loss = Literal["sigmoid", "ipo", "hinge", "robust"]


class DPOLoss(NamedTuple):
    """Of every pair: its loss, and the implicit rewards beta * log(policy / reference)."""

    loss_B: Float[Array, "*B"]
    reward_BP: Float[Array, "*B P"]


def dpo_loss(
    logp_policy_BP: Float[Array, "*B P"],
    logp_reference_BP: Float[Array, "*B P"],
    *,
    beta: float,
    loss: Loss = "sigmoid",
    label_smoothing: float = 0.0,
    length_BP: Int[Array, "*B P"] | None = None,
    margin_B: Float[Array, "*B"] | None = None,
    nll_weight: float = 0.0,
    length_normalise: bool = False,
    reference_free: bool = False,
) -> DPOLoss:
    """Loss and rewards of each pair, float32. Side 0 of P is the chosen completion, 1 the rejected.

    Log-probabilities are sums over a completion's tokens, nats. With h the policy's log-ratio of
    chosen to rejected minus the reference's, in units of beta: u = beta * h - margin, and

    - sigmoid: -log sigmoid(u) (Rafailov et al. 2023, arXiv 2305.18290, eq. 7); label smoothing e
      takes that share of the pairs to be mislabelled: -(1-e) log sigmoid(u) - e log sigmoid(-u)
      (conservative DPO, Mitchell 2023, "A note on DPO with noisy preferences").
    - robust: ((1-e) (-log sigmoid(u)) - e (-log sigmoid(-u))) / (1-2e), whose expectation under
      labels flipped with probability e is the clean loss (Chowdhury et al. 2024, arXiv 2403.00409).
    - hinge: max(0, 1 - u) (SLiC, Zhao et al. 2023, arXiv 2305.10425).
    - ipo: (u / beta - 1 / (2 beta))^2 (Azar et al. 2023, arXiv 2310.12036, eq. 17). The paper's
      experiments and TRL use it on means over tokens: set `length_normalise`.

    margin_B is a gap, in rewards, that chosen must lead by: the offset of ODPO (Amini et al. 2024,
    arXiv 2402.10571), or SimPO's gamma. `nll_weight` adds that multiple of the chosen completion's
    negative log-likelihood a token (Pang et al. 2024, arXiv 2404.19733, eq. 1).
    `length_normalise` divides every log-probability by the completion's length; with
    `reference_free`, which takes the reference as uniform, and a margin, that is SimPO (Meng et
    al. 2024, arXiv 2405.14734). Both `nll_weight` and `length_normalise` need `length_BP`, tokens.

    The reference gets no gradient. Raises ValueError for an unknown loss or a missing length.
    """
    if (nll_weight or length_normalise) and length_BP is None:
        raise ValueError("dpo_loss: nll_weight and length_normalise need length_BP")
    policy_BP = logp_policy_BP.astype(jnp.float32)
    reference_BP = jax.lax.stop_gradient(logp_reference_BP).astype(jnp.float32)
    if reference_free:
        reference_BP = jnp.zeros_like(reference_BP)
    ratio_BP = policy_BP - reference_BP
    # A completion truncated away has no tokens; its log-probability is 0 and so is its mean.
    tokens_BP = None if length_BP is None else jnp.maximum(length_BP, 1).astype(jnp.float32)
    if length_normalise:
        assert tokens_BP is not None, "normalisation by length needs length_BP"
        ratio_BP = ratio_BP / tokens_BP
    lead_B = beta * (ratio_BP[..., 0] - ratio_BP[..., 1])
    if margin_B is not None:
        lead_B = lead_B - margin_B.astype(jnp.float32)
    loss_B = _loss_of_lead(lead_B, beta, loss, label_smoothing)
    if nll_weight:
        assert tokens_BP is not None
        loss_B = loss_B - nll_weight * policy_BP[..., 0] / tokens_BP[..., 0]
    return DPOLoss(loss_B, beta * ratio_BP)


def _loss_of_lead(lead_B: Array, beta: float, loss: str, label_smoothing: float) -> Array:
    clean_B, flipped_B = -jax.nn.log_sigmoid(lead_B), -jax.nn.log_sigmoid(-lead_B)
    keep = 1.0 - label_smoothing
    match loss:
        case "sigmoid":
            return keep * clean_B + label_smoothing * flipped_B
        case "robust":
            return (keep * clean_B - label_smoothing * flipped_B) / (keep - label_smoothing)
        case "hinge":
            return jax.nn.relu(1.0 - lead_B)
        case "ipo":
            return ((lead_B - 0.5) / beta) ** 2
        case _:
            raise ValueError(f"dpo_loss: expected sigmoid, ipo, hinge or robust, got {loss!r}")


def completion_logps(
    logp_BCT: Float[Array, "*B C T"], mask_BCT: Bool[Array, "*B C T"]
) -> Float[Array, "*B C"]:
    """Log-probability of each completion: the sum over its real tokens, never the mean."""
    return jnp.where(mask_BCT, logp_BCT.astype(jnp.float32), 0.0).sum(axis=-1)


def best_against_each(logp_BC: Float[Array, "*B C"]) -> Float[Array, "*B C-1 P"]:
    """Pairs of completion 0, the best, with each of the others, for rows that hold all samples."""
    best_BC = jnp.broadcast_to(logp_BC[..., :1], logp_BC[..., 1:].shape)
    return jnp.stack([best_BC, logp_BC[..., 1:]], axis=-1)
