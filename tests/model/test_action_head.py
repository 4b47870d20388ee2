"""FlowmatchingActionHead against naive loops, and on a toy distribution with two modes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paligemma_vla import flow
from paligemma_vla.config import ActionHeadConfig
from paligemma_vla.model import FlowmatchingActionHead

from support import randomize  # isort: skip

E, T, P, K, A = 24, 7, 5, 4, 3


def make_head(seed: int = 0, **options: Any) -> FlowmatchingActionHead:
    """A head of another width than the context, with random weights everywhere."""
    sizes = {"horizon": K, "per_action_dim": A, "embed_dim": 32, "num_layers": 2, "num_heads": 4, **options}
    return randomize(FlowmatchingActionHead(ActionHeadConfig(**sizes), E, P), seed)


def inputs(batch: int = 5, horizon: int = K, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, T, dtype=torch.bool)
    for row in range(batch):
        mask[row, T - row % 4 :] = False
    return {
        "context": torch.randn(batch, T, E, generator=generator),
        "mask": mask,
        "state": torch.randn(batch, P, generator=generator),
        "noise": torch.rand(batch, horizon, A, generator=generator) * 2 - 1,
    }


@torch.no_grad()
def naive_euler(head: FlowmatchingActionHead, x: dict[str, Tensor], steps: int, state: bool = True) -> Tensor:
    """The specification's loop (S6.1), one sample at a time, on unpadded context projected anew at every step."""
    rows = []
    for row in range(len(x["noise"])):
        action = x["noise"][row : row + 1]
        context = x["context"][row : row + 1, x["mask"][row]]
        for i in range(steps):
            t = torch.full((1,), i / steps)
            velocity = head.predict_velocity(action, t, context, None, x["state"][row : row + 1] if state else None)
            action = action + (1 / steps) * velocity
        rows.append(action)
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        *((steps, {}) for steps in (1, 10, 50)),
        *((5, options) for options in ({"horizon": 1}, {"use_state_input": False}, {"horizon": 1, "use_state_input": False})),
    ],
)
def test_sample_equals_the_specifications_loop(steps: int, options: dict[str, Any]) -> None:
    """Alone and without padding as in a batch and with it: samples do not see each other, nor what is masked."""
    head, x = make_head(**options), inputs(horizon=options.get("horizon", K))
    state = options.get("use_state_input", True)
    with torch.no_grad():
        got = head.sample(x["context"], x["mask"], x["state"] if state else None, x["noise"], steps)
    assert (got.dtype, got.shape) == (torch.float32, x["noise"].shape)
    torch.testing.assert_close(got, naive_euler(head, x, steps, state), atol=1e-5, rtol=0)
    assert (got - x["noise"]).abs().max() > 0.1  # the loop did move


@torch.no_grad()
def test_every_input_has_influence() -> None:
    head, x = make_head(), inputs()
    base = head.predict_velocity(x["noise"], 0.5, x["context"], x["mask"], x["state"])
    other = inputs(seed=1)
    for name in ("context", "state", "noise"):
        y = {**x, name: other[name]}
        changed = head.predict_velocity(y["noise"], 0.5, y["context"], y["mask"], y["state"])
        assert (changed - base).abs().amax(dim=(1, 2)).min() > 1e-3, name
    assert (head.predict_velocity(x["noise"], 0.6, x["context"], x["mask"], x["state"]) - base).abs().max() > 1e-3


@torch.no_grad()
def test_action_tokens_see_each_other_and_know_their_place() -> None:
    head, x = make_head(), inputs()
    base = head.predict_velocity(x["noise"], 0.5, x["context"], x["mask"], x["state"])
    nudged = x["noise"].clone()
    nudged[:, 3] += 0.5
    assert (head.predict_velocity(nudged, 0.5, x["context"], x["mask"], x["state"]) - base)[:, 0].abs().max() > 1e-3
    same = x["noise"][:, :1].expand(-1, K, -1)
    velocity = head.predict_velocity(same, 0.5, x["context"], x["mask"], x["state"])
    assert (velocity[:, 0] - velocity[:, 1]).abs().max() > 1e-3


def test_what_does_not_change_is_computed_once_not_once_per_step() -> None:
    head, x = make_head(), inputs()
    calls: Counter[str] = Counter()

    def count(name: str) -> Callable[..., None]:
        return lambda *_: calls.update([name])

    head.context_proj.register_forward_hook(count("context_proj"))
    head.state_encoder.register_forward_hook(count("state_encoder"))
    for block in head.blocks:
        block.key_value.register_forward_hook(count("key_value"))
        block.qkv.register_forward_hook(count("qkv"))
        block.modulation.register_forward_hook(count("modulation"))
    with torch.no_grad():
        head.sample(x["context"], x["mask"], x["state"], x["noise"], 50)
    assert calls == {"context_proj": 1, "state_encoder": 1, "key_value": 2, "modulation": 2, "qkv": 2 * 50}
    calls.clear()
    draws = {"flow_time": torch.rand(5, 6), "flow_noise": torch.randn(5, 6, K, A)}
    head.loss(x["context"], torch.randn(5, K * A), x["state"], x["mask"], **draws)
    assert calls == {"context_proj": 1, "state_encoder": 1, "key_value": 2, "modulation": 2, "qkv": 2}


def test_loss_is_the_specifications_objective() -> None:
    head, x = make_head(), inputs()
    generator = torch.Generator().manual_seed(3)
    action = torch.randn(5, K, A, generator=generator)
    action_mask = torch.rand(5, K, A, generator=generator) > 0.3
    time, noise = torch.rand(5, 2, generator=generator), torch.randn(5, 2, K, A, generator=generator)
    output = head.loss(x["context"], action.flatten(1), x["state"], x["mask"], action_mask, time, noise)
    total = 0.0
    for b in range(5):
        for m in range(2):
            t = time[b, m]
            point = (1 - t) * noise[b, m] + t * action[b]
            v = head.predict_velocity(
                point[None], t[None], x["context"][b : b + 1], x["mask"][b : b + 1], x["state"][b : b + 1]
            )[0]
            total += float(((v - (action[b] - noise[b, m])) ** 2)[action_mask[b]].sum().detach())
    assert output.loss_sum.detach().item() == pytest.approx(total, rel=1e-5)
    assert output.valid_count == 2 * action_mask.sum()
    torch.testing.assert_close(output.target, action[:, None] - noise)


@torch.no_grad()
def naive_velocity(head: FlowmatchingActionHead, x: dict[str, Tensor], action: Tensor, time: Tensor) -> Tensor:
    """The head written down with a time of its own for each action: action (B, K, A), time (B, K)."""
    context = head.project_context(x["context"], x["mask"], x["state"])
    condition = F.silu(head.time_embedding(time) + context.state)  # (B, K, D)
    tokens = head.action_encoder(action) + head.position

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (4, -1)).transpose(1, 2)

    for block, (key, value) in zip(head.blocks, context.keys_values, strict=True):
        parts = F.linear(condition, block.modulation.weight, block.modulation.bias).chunk(9, dim=-1)  # each (B, K, D)
        y = block.norm(tokens) * (1 + parts[1]) + parts[0]
        attended = F.scaled_dot_product_attention(*(heads(each) for each in block.qkv(y).chunk(3, dim=-1)))
        tokens = tokens + parts[2] * block.self_out(attended.transpose(1, 2).flatten(2))
        y = block.norm(tokens) * (1 + parts[4]) + parts[3]
        attended = F.scaled_dot_product_attention(heads(block.query(y)), key, value, attn_mask=context.mask)
        tokens = tokens + parts[5] * block.cross_out(attended.transpose(1, 2).flatten(2))
        tokens = tokens + parts[8] * block.mlp(block.norm(tokens) * (1 + parts[7]) + parts[6])
    last = head.final_modulation
    shift, scale = F.linear(condition, last.weight, last.bias).chunk(2, dim=-1)
    return head.velocity(head.final_norm(tokens) * (1 + scale) + shift)


DELAYS = torch.tensor([0, 1, 3, 2, 4])


def test_loss_with_prefixes_equals_a_loop_with_a_time_for_each_action() -> None:
    head, x = make_head(), inputs()
    generator = torch.Generator().manual_seed(3)
    action, noise = torch.randn(5, K, A, generator=generator), torch.randn(5, 2, K, A, generator=generator)
    action_mask = torch.rand(5, K, A, generator=generator) > 0.2
    time, prefix = torch.rand(5, 2, generator=generator), torch.stack([DELAYS, DELAYS.flip(0)], dim=1)
    output = head.loss(x["context"], action.flatten(1), x["state"], x["mask"], action_mask, time, noise, prefix)
    total, count = 0.0, 0
    for m in range(2):
        own = torch.stack([torch.tensor([1.0 if k < prefix[b, m] else float(time[b, m]) for k in range(K)]) for b in range(5)])
        point = (1 - own[..., None]) * noise[:, m] + own[..., None] * action
        velocity = naive_velocity(head, x, point, own)
        for b in range(5):
            for k in range(int(prefix[b, m]), K):
                error = (velocity[b, k] - (action - noise[:, m])[b, k])[action_mask[b, k]]
                total, count = total + float(error.square().sum()), count + len(error)
    assert output.loss_sum.detach().item() == pytest.approx(total, rel=1e-5)
    assert output.valid_count == count > 0
    without = head.loss(x["context"], action.flatten(1), x["state"], x["mask"], action_mask, time, noise)
    none = head.loss(x["context"], action.flatten(1), x["state"], x["mask"], action_mask, time, noise, 0 * prefix)
    torch.testing.assert_close(none.loss_sum, without.loss_sum)


def ongoing(guided: bool, delay: Tensor = DELAYS) -> flow.Ongoing:
    actions = torch.rand(5, K, A, generator=torch.Generator().manual_seed(9)) * 2 - 1
    return flow.Ongoing(actions, delay, torch.full((5,), K), guided)


def test_sample_with_a_prefix_equals_a_loop_that_writes_it_at_each_step() -> None:
    head, x, given = make_head(), inputs(), ongoing(guided=False)
    with torch.no_grad():
        got = head.sample(x["context"], x["mask"], x["state"], x["noise"], 6, given)
    action = x["noise"].clone()
    for step in range(6):
        time = torch.full((5, K), step / 6)
        for b, delay in enumerate(DELAYS.tolist()):
            action[b, :delay], time[b, :delay] = given.actions[b, :delay], 1.0
        action = action + naive_velocity(head, x, action, time) / 6
    for b, delay in enumerate(DELAYS.tolist()):
        action[b, :delay] = given.actions[b, :delay]
        assert torch.equal(got[b, :delay], given.actions[b, :delay])
    torch.testing.assert_close(got, action, atol=1e-5, rtol=0)


def test_guidance_leads_to_what_is_being_executed_and_leaves_other_samples_alone() -> None:
    head, x = make_head(), inputs()
    delay = torch.tensor([0, 2, 4, 0, 1])
    given = ongoing(guided=True, delay=delay)._replace(length=torch.tensor([0, 3, 4, 0, 4]))
    with torch.no_grad():
        free = head.sample(x["context"], x["mask"], x["state"], x["noise"], 10)
        got = head.sample(x["context"], x["mask"], x["state"], x["noise"], 10, given)
    assert torch.equal(got[[0, 3]], free[[0, 3]])  # nothing to continue
    for b in (1, 2, 4):
        before, after = ((each[b] - given.actions[b])[: delay[b]].abs().max() for each in (free, got))
        assert after < 0.2 * before


def test_draws_left_to_the_head_follow_the_configuration_and_torchs_seed() -> None:
    head, x = make_head(num_flow_samples=3, num_inference_timesteps=7), inputs()
    action = torch.zeros(5, K * A)
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(head.loss(x["context"], action, x["state"], x["mask"]))
    assert outputs[0].target.shape == (5, 3, K, A)
    assert torch.equal(outputs[0].target, outputs[1].target)
    assert not torch.equal(outputs[0].target, outputs[2].target)
    assert -1 <= outputs[0].target.min() < outputs[0].target.max() <= 1  # minus Uniform(-1, 1) noise
    assert outputs[0].valid_count == 5 * 3 * K * A
    with torch.no_grad():
        torch.manual_seed(4)
        got = head.get_action(x["context"], x["state"], x["mask"])
        torch.manual_seed(4)
        noise = flow.draw_noise((5, K, A))
        torch.testing.assert_close(got, head.sample(x["context"], x["mask"], x["state"], noise, 7))
    assert head(x["context"], x["state"], action).velocity.shape == (5, 3, K, A)  # training with actions, sampling without
    assert head(x["context"], x["state"]).shape == (5, K, A)


def test_state_is_demanded_when_it_is_used() -> None:
    x = inputs()
    with pytest.raises(ValueError, match="state"):
        make_head().get_action(x["context"], None, x["mask"])
    without = make_head(use_state_input=False)
    assert not any("state" in name for name, _ in without.named_parameters())
    with torch.no_grad():
        answers = [without.sample(x["context"], x["mask"], state, x["noise"], 3) for state in (None, x["state"])]
    assert torch.equal(*answers)


def test_a_new_head_predicts_no_velocity_yet_every_layer_can_learn() -> None:
    """adaLN-zero: the start is calm, and within two steps of training every parameter has a gradient that is not zero."""
    head = FlowmatchingActionHead(ActionHeadConfig(horizon=K, per_action_dim=A, embed_dim=32, num_layers=2, num_heads=4), E, P)
    x = inputs()
    assert (head.predict_velocity(x["noise"], 0.3, x["context"], x["mask"], x["state"]) == 0).all()
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        head.loss(x["context"], x["noise"].flatten(1), x["state"], x["mask"]).loss_sum.backward()
        assert all(p.grad is not None for p in head.parameters())
        optimizer.step()
    dead = [name for name, p in head.named_parameters() if p.grad.abs().max() == 0]
    assert dead == []


MODE = torch.tensor([0.7, -0.7, 0.7])


def test_two_modes_are_learned_and_not_averaged() -> None:
    """A 3-dimensional toy distribution: context 0 means either mode, context 1 the first, context 2 the second."""
    torch.manual_seed(0)
    sizes = {"horizon": 1, "per_action_dim": 3, "embed_dim": 32, "num_layers": 1, "num_heads": 2}
    head = FlowmatchingActionHead(ActionHeadConfig(**sizes, use_state_input=False), 3, 1)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    steps = 700
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    eye = torch.eye(3)
    for _ in range(steps):
        kind = torch.randint(0, 3, (256,))
        sign = torch.where(kind == 0, torch.randint(0, 2, (256,)) * 2 - 1, 3 - 2 * kind).float()
        action = sign[:, None] * MODE + 0.05 * torch.randn(256, 3)
        output = head.loss(eye[kind][:, None], action)
        optimizer.zero_grad()
        (output.loss_sum / output.valid_count).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        kind = torch.arange(3).repeat_interleave(400)
        samples = head.get_action(eye[kind][:, None], num_steps=20)[:, 0]  # (1200, 3)
    side = (samples @ MODE).sign()
    near = (samples - side[:, None] * MODE).norm(dim=1) < 0.35
    between = samples.norm(dim=1) < 0.5 * MODE.norm()
    assert near.float().mean() > 0.9
    assert between.float().mean() < 0.02
    either = side[kind == 0]
    assert 0.35 < (either > 0).float().mean() < 0.65
    assert (side[kind == 1] > 0).float().mean() > 0.97
    assert (side[kind == 2] < 0).float().mean() > 0.97
    assert samples[kind == 0].mean(0).abs().max() < 0.25  # the mean that a regression would have answered, and nobody did
