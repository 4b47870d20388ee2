"""The mathematics of the flow against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from paligemma_vla import flow


def test_draw_time_follows_beta_2_2_between_the_clamps() -> None:
    draws = 200_000
    time = flow.draw_time((draws,), torch.Generator().manual_seed(0)).double()
    assert time.min() == pytest.approx(0.02, abs=1e-7)
    assert time.max() == pytest.approx(0.98, abs=1e-7)
    ordered = time.sort().values
    inside = (ordered > 0.02001) & (ordered < 0.97999)
    cdf = 3 * ordered**2 - 2 * ordered**3
    empirical = torch.arange(1, draws + 1, dtype=torch.float64) / draws
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is the bound at significance 0.001
    assert (cdf - empirical)[inside].abs().max() < 1.95 / draws**0.5
    assert time.mean().item() == pytest.approx(0.5, abs=0.003)
    assert time.var().item() == pytest.approx(1 / 20, abs=0.001)
    clamped = (time <= 0.02001).double().mean().item()
    assert clamped == pytest.approx(3 * 0.02**2 - 2 * 0.02**3, abs=4e-4)


def test_draw_noise_is_uniform_between_minus_one_and_one() -> None:
    draws = 100_000
    noise = flow.draw_noise((draws,), torch.Generator().manual_seed(0)).double().sort().values
    cdf = (noise + 1) / 2
    assert (cdf - torch.arange(1, draws + 1) / draws).abs().max() < 1.95 / draws**0.5
    assert -1 <= noise.min() < -0.999 < 0.999 < noise.max() <= 1


@pytest.mark.parametrize("draws", [1, 2, 5, 8])
def test_half_of_the_draws_of_a_sample_have_a_prefix(draws: int) -> None:
    samples, longest = 20_000, 6
    length = flow.draw_prefix((samples, draws), longest, torch.Generator().manual_seed(0))
    with_prefix = (length > 0).sum(dim=1)
    assert set(with_prefix.tolist()) <= {draws // 2, (draws + 1) // 2}
    shares = torch.bincount(length.flatten(), minlength=longest + 1) / length.numel()
    expected = torch.tensor([0.5, *[0.5 / longest] * longest])
    torch.testing.assert_close(shares, expected, atol=0.01, rtol=0)
    assert (length > 0).float().mean(dim=0) == pytest.approx([0.5] * draws, abs=0.02)


def test_path_runs_from_noise_to_action_with_the_target_as_its_velocity() -> None:
    generator = torch.Generator().manual_seed(0)
    noise, action = (torch.randn(5, 3, 4, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    assert torch.equal(flow.interpolate(noise, action, torch.zeros(5, 3, dtype=torch.float64)), noise)
    assert torch.equal(flow.interpolate(noise, action, torch.ones(5, 3, dtype=torch.float64)), action)
    time = torch.rand(5, 3, generator=generator, dtype=torch.float64) * 0.9
    slope = (flow.interpolate(noise, action, time + 0.1) - flow.interpolate(noise, action, time)) / 0.1
    torch.testing.assert_close(slope, flow.velocity_target(noise, action))
    torch.testing.assert_close(flow.velocity_target(noise, action), action - noise)
    # each (sample, draw) has its own time
    for sample in range(5):
        for draw in range(3):
            t = time[sample, draw]
            expected = (1 - t) * noise[sample, draw] + t * action[sample, draw]
            torch.testing.assert_close(flow.interpolate(noise, action, time)[sample, draw], expected)


def test_masked_squared_error_equals_a_naive_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    velocity, target = (torch.randn(4, 2, 3, 2, generator=generator) for _ in range(2))
    mask = torch.rand(4, 1, 3, 2, generator=generator) > 0.4
    velocity[~mask.expand_as(velocity)] = float("nan")  # what is left out must not reach the sum, not even as nan * 0
    total, count = 0.0, 0
    for b in range(4):
        for m in range(2):
            for k in range(3):
                for a in range(2):
                    if mask[b, 0, k, a]:
                        total += (velocity[b, m, k, a].item() - target[b, m, k, a].item()) ** 2
                        count += 1
    loss_sum, valid = flow.masked_squared_error(velocity, target, mask)
    assert loss_sum.item() == pytest.approx(total, rel=1e-6)
    assert valid.item() == count
    assert loss_sum.shape == valid.shape == ()


def test_masked_squared_error_gives_no_gradient_to_what_is_masked() -> None:
    velocity = torch.randn(2, 1, 3, 2, requires_grad=True)
    mask = torch.tensor([True, False, True]).view(1, 1, 3, 1).expand(2, 1, 3, 2)
    flow.masked_squared_error(velocity, torch.zeros(2, 1, 3, 2), mask)[0].backward()
    assert (velocity.grad[:, :, 1] == 0).all()
    assert (velocity.grad[:, :, [0, 2]] != 0).all()


@pytest.mark.parametrize("steps", [1, 3, 10, 50])
def test_euler_is_exact_on_a_constant_velocity(steps: int) -> None:
    noise, action = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    got = flow.euler(lambda point, time: action - noise, noise, steps)
    torch.testing.assert_close(got, action)


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_euler_on_a_linear_velocity_is_the_compound_interest_formula(steps: int) -> None:
    noise = torch.randn(2, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(flow.euler(lambda point, time: 0.7 * point, noise, steps), noise * (1 + 0.7 / steps) ** steps)


@pytest.mark.parametrize("steps", [0, -1])
def test_euler_refuses_fewer_than_one_step(steps: int) -> None:
    with pytest.raises(ValueError, match="num_steps"):
        flow.euler(lambda point, time: point, torch.zeros(1, 1, 1), steps)


def test_soft_mask_keeps_what_is_executed_and_lets_go_of_what_is_not_planned() -> None:
    """The paper's equation 5 with H actions, d of them executed meanwhile, s executed since the last chunk: length = H - s."""
    horizon = 12
    for delay, length in ((0, 5), (3, 8), (4, 4), (2, 12), (0, 0)):
        expected = []
        for i in range(horizon):
            c = (length - i) / (length - delay + 1)
            soft = c * (math.exp(c) - 1) / (math.e - 1)
            expected.append(1.0 if i < delay else soft if i < length else 0.0)
        got = flow.soft_mask(torch.tensor([delay]), torch.tensor([length]), horizon)[0]
        torch.testing.assert_close(got, torch.tensor(expected))
        assert (got.diff() <= 0).all()


def test_guidance_weight_is_the_papers_below_its_limit() -> None:
    assert flow.guidance_weight(0.0) == flow.GUIDANCE_WEIGHT
    for time in (0.3, 0.5, 0.7):
        ratio = (1 - time) ** 2 / (time**2 + (1 - time) ** 2)  # r^2 of the paper
        assert flow.guidance_weight(time) == pytest.approx(min(flow.GUIDANCE_WEIGHT, (1 - time) / (time * ratio)))
    assert flow.guidance_weight(0.5) == pytest.approx(2.0)


def test_guided_velocity_equals_finite_differences() -> None:
    """What is added is the weight times the gradient of -1/2 |target - end|^2, weighted, through the end that v leads to.
    Estimates that are not steep: the weight is the paper's."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(8, 8, generator=generator, dtype=torch.float64) / 3

    def velocity(action: torch.Tensor, time: float) -> torch.Tensor:
        return 0.1 * torch.tanh(action.flatten(1) @ mix + time).view(action.shape) - 0.9 * action

    action, target = (torch.randn(2, 4, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = torch.rand(2, 4, 1, generator=generator, dtype=torch.float64).expand(2, 4, 2)
    for time in (0.0, 0.4, 0.9):

        def distance(point: torch.Tensor, time: float = time) -> float:
            end = point + (1 - time) * velocity(point, time)
            return float((weights * (target - end).square()).sum() / 2)

        got = flow.guided(velocity, target, weights)(action, time) - velocity(action, time)
        step, expected = 1e-6, torch.zeros_like(action)
        for index in np.ndindex(*action.shape):
            nudge = torch.zeros_like(action)
            nudge[index] = step
            expected[index] = -(distance(action + nudge) - distance(action - nudge)) / (2 * step)
        torch.testing.assert_close(got, flow.guidance_weight(time) * expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("steepness", [0.5, 3.0, 20.0])
@pytest.mark.parametrize("time", [0.0, 0.5, 0.9])
def test_guidance_does_not_lead_past_its_target(steepness: float, time: float) -> None:
    """An end that is `steepness` times the point: in the time that is left, the correction takes it at most to the target."""
    generator = torch.Generator().manual_seed(0)
    action, target = (torch.randn(3, 4, 2, generator=generator, dtype=torch.float64) for _ in range(2))

    def velocity(point: torch.Tensor, at: float) -> torch.Tensor:
        return (steepness - 1) * point / (1 - at)

    correction = flow.guided(velocity, target, torch.ones_like(action))(action, time) - velocity(action, time)
    error, moved = target - steepness * action, steepness * (1 - time) * correction
    share = moved / error
    torch.testing.assert_close(share, share[:1, :1, :1].expand_as(share))
    papers = flow.guidance_weight(time) * (1 - time) * steepness**2
    assert share[0, 0, 0].item() == pytest.approx(min(1.0, papers))
    at_target = flow.guided(velocity, steepness * action, torch.ones_like(action))(action, time)
    torch.testing.assert_close(at_target, velocity(action, time))


def test_guidance_with_a_soft_mask_goes_where_the_weighted_distance_is_least() -> None:
    """Where the limit counts: neither a little more nor a little less of the correction comes nearer to the target."""
    generator = torch.Generator().manual_seed(0)
    action, target = (torch.randn(3, 4, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = torch.rand(3, 4, 1, generator=generator, dtype=torch.float64).expand(3, 4, 2)
    steepness, time = 20.0, 0.5

    def velocity(point: torch.Tensor, at: float) -> torch.Tensor:
        return (steepness - 1) * point / (1 - at)

    correction = flow.guided(velocity, target, weights)(action, time) - velocity(action, time)

    def distance(share: float) -> torch.Tensor:
        end = steepness * (action + share * (1 - time) * correction)
        return (weights * (target - end).square()).sum((1, 2))

    assert (distance(1.0) < distance(0.99)).all()
    assert (distance(1.0) < distance(1.01)).all()
