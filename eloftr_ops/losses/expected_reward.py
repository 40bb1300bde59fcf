# SPDX-License-Identifier: Apache-2.0
"""Policy gradient over drawn matches: a loss from their log-probabilities, and rewards from what they determine."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from eloftr_ops.geometry._checks import check_scale
from eloftr_ops.losses._reduction import check_options, reduce_pairs
from eloftr_ops.losses.homography import corner_error_loss
from eloftr_ops.losses.pose import rotation_angle, translation_direction_angle

__all__ = [
    "Candidates",
    "agreement_rewards",
    "expected_choice_loss",
    "expected_reward_loss",
    "homography_reward",
    "leave_one_out",
    "pose_reward",
    "support_reward",
]


class Candidates(NamedTuple):
    """N models, each estimated from one draw of matches: what a reward looks at. Nothing here carries a gradient."""

    models_0to1: Tensor  # (N, 3, 3) homographies or fundamental matrices, or (N, 4, 4) poses
    valid: Tensor  # (N,) bool: a model was found
    pairs: Tensor  # (N,) int64: the pair of images in the batch that it belongs to
    support: Tensor  # (N,) share, in [0, 1], of the drawn matches that agree with it


def expected_reward_loss(
    log_probability: Tensor,
    rewards: Tensor,
    *,
    valid: Tensor | None = None,
    baseline: bool = True,
    entropy: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Loss whose gradient goes up the expected reward of what was drawn (REINFORCE, Williams 1992).

    .. math:: -\frac{1}{D} \sum_d \frac{1}{|V_d|} \sum_{k \in V_d} (r_{dk} - b_d) \log p_{dk}

    with, for the baseline :math:`b_d`, the mean reward of the *other* draws (leave-one-out: Kool, van Hoof and Welling,
    "Buy 4 REINFORCE Samples, Get a Baseline for Free!", 2019). It depends on nothing in its own draw, so it lowers the
    variance and adds no bias.

    Convention:
        - Everything drawn in a draw has the same weight, whatever its probability. Draws without replacement are
          therefore flatter than the probabilities: rare matches count for more.
        - ``entropy`` adds that weight times the entropy to the reward, as :math:`-\log p` of what was drawn: large
          values keep the choice open.
        - The value of the loss is of no use to watch: it has no minimum that means anything. Watch the rewards.
        - No valid element gives zero, with zero gradient. Log-probabilities under ``valid=False`` may be infinite.
        - Gradient: to ``log_probability`` alone.

    Args:
        log_probability: ``(B, D)`` or ``(B, D, K)``: D draws each, of one or of K things.
        rewards: the same shape.
        valid: the same shape, bool; None for all.
        baseline: subtract the mean of the other draws; with one draw there is nothing to subtract.
        entropy: weight, at least 0.
        reduction: "none" ``(B,)``, "mean" over those with a valid element, or "sum".

    Returns:
        ``(B,)`` or a scalar, in the dtype of ``log_probability``.

    Raises:
        ValueError: shapes that do not fit, rewards that are NaN or infinite where valid, an option out of range.
        TypeError: ``valid`` is not bool.
    """
    check_options(1.0, None, reduction)
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    _check_draws(log_probability, rewards, valid, entropy)
    if log_probability.ndim == 2:
        log_probability, rewards, valid = (x[..., None] for x in (log_probability, rewards, valid))
    log_probability = torch.where(valid, log_probability, 0)
    rewards = torch.where(valid, rewards.detach(), 0).to(log_probability)
    rewards = rewards - entropy * log_probability.detach()
    counts = valid.sum(2)
    share = valid / counts.clamp_min(1)[..., None]
    if baseline:
        rewards = rewards - _others((rewards * share).sum(2), counts > 0)[..., None]
    drawn = counts > 0
    per_draw = -(rewards * share * log_probability).sum(2)
    per_pair = per_draw.sum(1) / drawn.sum(1).clamp_min(1)
    return reduce_pairs(per_pair, drawn.any(1), reduction)


def expected_choice_loss(log_probability: Tensor, rewards: Tensor) -> Tensor:
    r"""Negative logarithm of the expected reward of choices, relative to the best that there is.

    .. math:: \frac{1}{R} \sum_r m_r \log \frac{m_r}{\sum_s p_{rs} r_{rs}}, \quad m_r = \max_s r_{rs}

    Where all things that can be chosen are known with their rewards, nothing need be drawn. The logarithm keeps the
    gradient large where the probability of all good choices is small. Rows without a good choice hardly count.

    Args:
        log_probability: ``(M, R, S)``: of R choices among S, for each of M.
        rewards: ``(M, R, S)`` in [0, 1].

    Returns:
        ``(M,)``. Gradient: to ``log_probability`` alone; finite.
    """
    rewards = rewards.detach().clamp_min(1e-12)
    best = rewards.amax(2)
    expected = torch.logsumexp(log_probability + rewards.log(), 2)
    return (best * (best.log() - expected)).mean(1)


def leave_one_out(rewards: Tensor) -> Tensor:
    """Rewards ``(B, D)`` minus the mean of the other draws of their row; zero for a single draw."""
    if rewards.shape[1] < 2:
        return torch.zeros_like(rewards)
    return rewards - _others(rewards, torch.ones_like(rewards, dtype=torch.bool))


def agreement_rewards(reward: Tensor, agrees: Tensor, *, penalty: float = 0.25, baseline: bool = True) -> Tensor:
    r"""Reward of each match of a draw, from that of the model that the draw gave.

    Of a model with reward :math:`R > 0`, matches that agree with it get :math:`R`, the others :math:`-pR`: the model is
    right, so they are. With ``baseline``, matches that agree also get :math:`R - b`, b the mean of the pair's other
    draws: what they determined is better, or worse, than what others did. Where no draw of a pair succeeds, nothing
    gets anything: a penalty without a success anywhere would drive all probabilities down.

    Args:
        reward: ``(B, D)`` of the models, in [0, 1]; zero is a failure.
        agrees: ``(B, D, K)`` bool.
        penalty: p, at least 0.
        baseline: compare with the other draws.

    Returns:
        ``(B, D, K)``.

    Raises:
        ValueError: shapes that do not fit, or a negative penalty.
    """
    if reward.ndim != 2 or agrees.shape[:2] != reward.shape or agrees.ndim != 3:
        raise ValueError(
            f"agrees: expected shape (B, D, K) for reward (B, D) = {tuple(reward.shape)}, got {tuple(agrees.shape)}"
        )
    if not penalty >= 0:
        raise ValueError(f"penalty: expected at least 0, got {penalty}")
    reward = reward.detach()
    agreeing = reward + (leave_one_out(reward) if baseline else 0)
    return torch.where(agrees, agreeing[..., None], -penalty * reward[..., None])


def homography_reward(found: Candidates, H_gt_0to1: Tensor, size_hw: tuple[int, int], *, scale: float = 16.0) -> Tensor:
    """One minus the corner error over ``scale``, at least 0; 0 where no homography was found.

    Args:
        found: N homographies.
        H_gt_0to1: ``(B, 3, 3)``, frame and direction as :func:`corner_error_loss`.
        size_hw: height and width of image 0, pixels.
        scale: error, in pixels of image 1, from which on the reward is zero.

    Returns:
        ``(N,)`` in [0, 1].
    """
    check_scale("scale", scale)
    truth = H_gt_0to1[found.pairs]
    error = corner_error_loss(found.models_0to1.to(truth), truth, size_hw, reduction="none").detach()
    return _from_error(error, found.valid, scale)


def pose_reward(found: Candidates, T_gt_0to1: Tensor, *, scale: float = 20.0) -> Tensor:
    """One minus the larger angle, of rotation or translation direction, over ``scale`` degrees, at least 0.

    Args:
        found: N poses.
        T_gt_0to1: ``(B, 4, 4)``, ``X1 = T_gt_0to1 X0``; the length of the translation does not matter.
        scale: error, in degrees, from which on the reward is zero.

    Returns:
        ``(N,)`` in [0, 1]; 0 where no pose was found.
    """
    check_scale("scale", scale)
    truth = T_gt_0to1[found.pairs]
    models = found.models_0to1.to(truth)
    turn = rotation_angle(models[:, :3, :3], truth[:, :3, :3])
    slide = translation_direction_angle(models[:, :3, 3], truth[:, :3, 3])
    return _from_error(torch.rad2deg(torch.maximum(turn, slide)).detach(), found.valid, scale)


def support_reward(found: Candidates, *, chance: float = 0.05) -> Tensor:
    """Share of the drawn matches that agree with the model, beyond what chance gives: for pairs without labels.

    Args:
        found: N models.
        chance: share that agrees with the best model of random matches; rewards start there, and end at 1.

    Returns:
        ``(N,)`` in [0, 1].

    Raises:
        ValueError: ``chance`` outside [0, 1).
    """
    if not 0 <= chance < 1:
        raise ValueError(f"chance: expected a share in [0, 1), got {chance}")
    return torch.where(found.valid, ((found.support - chance) / (1 - chance)).clamp(min=0), 0)


def _from_error(error: Tensor, valid: Tensor, scale: float) -> Tensor:
    """NaN and infinite errors, too, are failures."""
    good = valid & torch.isfinite(error)
    return torch.where(good, (1 - torch.where(good, error, 0) / scale).clamp(min=0), 0)


def _others(values: Tensor, present: Tensor) -> Tensor:
    """Mean ``(B, D)`` of the other present values of each row; zero where there is none."""
    values = values * present
    count = present.sum(1, keepdim=True) - present.long()
    return (values.sum(1, keepdim=True) - values) / count.clamp_min(1) * (count > 0)


def _check_draws(log_probability: Tensor, rewards: Tensor, valid: Tensor, entropy: float) -> None:
    if log_probability.ndim not in (2, 3):
        raise ValueError(f"log_probability: expected shape (B, D) or (B, D, K), got {tuple(log_probability.shape)}")
    for name, x in (("rewards", rewards), ("valid", valid)):
        if x.shape != log_probability.shape:
            raise ValueError(
                f"{name}: expected the shape of log_probability, {tuple(log_probability.shape)}, got {tuple(x.shape)}"
            )
    if valid.dtype != torch.bool:
        raise TypeError(f"valid: expected dtype torch.bool, got {valid.dtype}")
    if not bool(torch.isfinite(rewards.detach()[valid]).all()):
        raise ValueError("rewards: expected finite numbers, got NaN or infinity")
    if not (entropy >= 0 and math.isfinite(entropy)):
        raise ValueError(f"entropy: expected a finite number of at least 0, got {entropy}")
