# SPDX-License-Identifier: Apache-2.0
"""The policy gradient is that of the expected reward; baselines change its variance, not its mean."""

import itertools

import pytest
import torch

from eloftr_ops.losses import (
    Candidates,
    agreement_rewards,
    expected_choice_loss,
    expected_reward_loss,
    homography_reward,
    leave_one_out,
    pose_reward,
    support_reward,
)
from support.gradients import finite_gradients

REWARDS = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("draws", [1, 2, 3])
def test_the_gradient_is_that_of_the_expected_reward(draws: int, baseline: bool) -> None:
    """Exactly: all tuples of independent draws from three outcomes, by their probabilities."""
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(-(logits.softmax(0) * REWARDS).sum(), logits)
    log_p = logits.log_softmax(0)
    outcomes = torch.tensor(list(itertools.product(range(3), repeat=draws)))
    losses = expected_reward_loss(log_p[outcomes], REWARDS[outcomes], baseline=baseline, reduction="none")
    probability = log_p.detach()[outcomes].sum(1).exp()
    (found,) = torch.autograd.grad((probability * losses).sum(), logits)
    torch.testing.assert_close(found, expected)


def test_the_entropy_term_goes_up_the_entropy() -> None:
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    log_p = logits.log_softmax(0)
    (expected,) = torch.autograd.grad(0.1 * (log_p.exp() * log_p).sum(), logits, retain_graph=True)
    losses = expected_reward_loss(log_p[:, None], torch.zeros(3, 1, dtype=torch.float64), entropy=0.1, reduction="none")
    (found,) = torch.autograd.grad((log_p.detach().exp() * losses).sum(), logits)
    torch.testing.assert_close(found, expected)


def test_what_is_not_valid_counts_for_nothing() -> None:
    log_p = torch.tensor([[[-1.0, -torch.inf], [-2.0, -3.0]], [[-torch.inf] * 2] * 2], requires_grad=True)
    valid = torch.isfinite(log_p.detach())
    rewards = torch.where(valid, 1.0, torch.nan)
    losses = expected_reward_loss(log_p, rewards, valid=valid, baseline=False, reduction="none")
    assert losses.tolist() == [1.75, 0]
    (slopes,) = finite_gradients(losses, [log_p])
    assert not slopes[~valid].any()
    assert float(expected_reward_loss(log_p, rewards, valid=valid, baseline=False).detach()) == 1.75


def test_rewards_of_matches() -> None:
    reward = torch.tensor([[0.8, 0.4], [0.0, 0.0]])
    agrees = torch.tensor([[[True, False], [True, True]], [[True, False], [False, False]]])
    torch.testing.assert_close(leave_one_out(reward), torch.tensor([[0.4, -0.4], [0.0, 0.0]]))
    found = agreement_rewards(reward, agrees, penalty=0.25)
    torch.testing.assert_close(found[0], torch.tensor([[1.2, -0.2], [0.0, 0.0]]))
    assert not found[1].any()  # no success anywhere: nothing is punished
    alone = agreement_rewards(reward[:, :1], agrees[:, :1])
    torch.testing.assert_close(alone[0, 0], torch.tensor([0.8, -0.2]))


def test_rewards_of_models() -> None:
    H = torch.eye(3).repeat(3, 1, 1)
    H[1, 0, 2] = 8.0
    found = Candidates(H, torch.tensor([True, True, False]), torch.tensor([0, 0, 1]), torch.tensor([1.0, 0.525, 1.0]))
    truth = torch.eye(3).repeat(2, 1, 1)
    reward = homography_reward(found, truth, (64, 64), scale=16.0)
    torch.testing.assert_close(reward, torch.tensor([1.0, 0.5, 0.0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(support_reward(found, chance=0.05), torch.tensor([1.0, 0.5, 0.0]))
    T = torch.eye(4).repeat(3, 1, 1)
    T[:, 2, 3] = 1
    T[1, :3, 3] = torch.tensor([0.0, 0.17364818, 0.98480775])  # 10 degrees
    reward = pose_reward(found._replace(models_0to1=T), T[:2].clone()[[0, 0]], scale=20.0)
    torch.testing.assert_close(reward, torch.tensor([1.0, 0.5, 0.0]), atol=1e-3, rtol=0)


def test_bad_input() -> None:
    log_p = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"rewards: expected the shape of log_probability, \(2, 3\)"):
        expected_reward_loss(log_p, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="rewards: expected finite"):
        expected_reward_loss(log_p, torch.full((2, 3), torch.nan))
    with pytest.raises(ValueError, match="entropy: expected a finite"):
        expected_reward_loss(log_p, log_p, entropy=-1.0)
    with pytest.raises(TypeError, match=r"valid: expected dtype torch\.bool"):
        expected_reward_loss(log_p, log_p, valid=torch.ones(2, 3))
    with pytest.raises(ValueError, match="log_probability: expected shape"):
        expected_reward_loss(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="agrees: expected shape"):
        agreement_rewards(torch.zeros(2, 2), torch.zeros(2, 3, 4, dtype=torch.bool))
    found = Candidates(
        *(torch.zeros(0, 3, 3), *(torch.zeros(0, dtype=d) for d in (torch.bool, torch.int64, torch.float32)))
    )
    with pytest.raises(ValueError, match="chance: expected a share"):
        support_reward(found, chance=1.0)


def test_the_loss_of_choices_with_one_good_choice_is_its_negative_log_likelihood() -> None:
    generator = torch.Generator().manual_seed(0)
    log_p = torch.rand(3, 4, 5, generator=generator).log_softmax(2)
    rewards = torch.zeros(3, 4, 5)
    rewards[..., 2] = 0.5
    found = expected_choice_loss(log_p, rewards)
    torch.testing.assert_close(found, -0.5 * log_p[..., 2].mean(1))


def test_the_loss_of_choices_has_the_right_gradient_and_is_finite_without_a_good_choice() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator).requires_grad_()
    rewards = torch.rand(2, 3, 4, dtype=torch.float64, generator=generator)
    rewards[0, 0] = 0

    def loss(x: torch.Tensor) -> torch.Tensor:
        return expected_choice_loss(x.log_softmax(2), rewards)

    assert torch.autograd.gradcheck(loss, scores)
    (slopes,) = torch.autograd.grad(loss(scores).sum(), scores)
    assert bool(slopes[0, 1].abs().max() > 1e-3)
    assert bool(slopes[0, 0].abs().max() < 1e-9)
    extreme = torch.full((1, 1, 2), -1e30, requires_grad=True)
    finite_gradients(expected_choice_loss(extreme, torch.ones(1, 1, 2)), [extreme])
