"""torch.export programs: read back from a file they compute what the model computes, at sizes they were not made with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from paligemma_vla import Policy, flow
from paligemma_vla.config import ActionHeadConfig
from paligemma_vla.errors import ModelError
from paligemma_vla.export.programs import STEPS, export_program, save_program
from paligemma_vla.model import FlowmatchingActionHead
from support import ACTION_DIM, HORIZON, STATE_DIM, randomize

SHAPES = [(1, 1), (1, 9), (2, 5), (3, 40)]  # B, T


def loaded(path: Path) -> tuple[torch.nn.Module, int]:
    steps = {STEPS: ""}
    program = torch.export.load(path, extra_files=steps)
    return program.module(), int(steps[STEPS])


def head_config(policy: Policy, steps: int, **changes: object) -> ActionHeadConfig:
    return policy.config.model.action_head_config.model_copy(update={"num_inference_timesteps": steps, **changes})


@pytest.mark.parametrize("with_state", [True, False])
@torch.no_grad()
def test_sampler_program_equals_the_head(policy: Policy, tmp_path: Path, with_state: bool) -> None:
    class Model:
        head = head_config(policy, 3, use_state_input=with_state)
        action_head = randomize(FlowmatchingActionHead(head, policy.model.paligemma_vlm.hidden_size, STATE_DIM))
        paligemma_vlm = policy.model.paligemma_vlm

    save_program(tmp_path, "sampler", Model, policy.preprocessor, Model.head)  # type: ignore[arg-type]
    program, steps = loaded(tmp_path / "sampler.pt2")
    assert steps == 3
    torch.manual_seed(0)
    for batch, tokens in SHAPES:
        context = torch.randn(batch, tokens, policy.model.paligemma_vlm.hidden_size)
        mask = torch.rand(batch, tokens) > 0.4
        mask[:, 0] = True
        state, noise = torch.randn(batch, STATE_DIM) if with_state else None, flow.draw_noise((batch, HORIZON, ACTION_DIM))
        expected = Model.action_head.sample(context, mask, state, noise, steps)
        torch.testing.assert_close(program(context, mask, state, noise), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_model_program_equals_the_model(policy: Policy, tmp_path: Path) -> None:
    """Tokens and pictures to actions, one camera absent here and there, padded and not."""
    save_program(tmp_path, "model", policy.model, policy.preprocessor, head_config(policy, 1))
    program, steps = loaded(tmp_path / "model.pt2")
    assert steps == 1
    torch.manual_seed(0)
    several = ["open the drawer", "push the window shut now", "turn the faucet on"]
    for prompts, absent in ((several[:1], ()), (several[:1], (0,)), (several, (1,)), (several, (0, 1, 2))):
        present = np.ones((len(prompts), 2), bool)
        present[list(absent), 1] = False
        ids, mask = (torch.from_numpy(value) for value in policy.preprocessor.prompts.encode(prompts, present))
        images = torch.randint(0, 256, (len(prompts), 2, 3, 32, 32), dtype=torch.uint8)
        state, noise = torch.randn(len(prompts), STATE_DIM), flow.draw_noise((len(prompts), HORIZON, ACTION_DIM))
        expected = policy.model(
            image_1_batch=images[:, 0],
            raw_prompt_texts_batch=prompts,
            vlm_attention_mask_batch=mask,
            state_batch=state,
            image_2_batch=images[:, 1],
            input_ids=ids,
            image_mask=torch.from_numpy(present),
            flow_noise=noise[:, None],
            num_steps=steps,
        )
        got = program(images[torch.from_numpy(present)], ids, mask, state, noise)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_head_that_cannot_be_traced_is_a_model_error(policy: Policy) -> None:
    class Looping(torch.nn.Module):
        def get_action(self, context: torch.Tensor, *_: object) -> torch.Tensor:
            while bool(context.sum() > 0):
                context = context - 1
            return context

    class Model:
        action_head, paligemma_vlm = Looping(), policy.model.paligemma_vlm

    with pytest.raises(ModelError, match=r"torch\.export: SamplerProgram cannot be traced"):
        export_program("sampler", Model, policy.preprocessor, head_config(policy, 2))  # type: ignore[arg-type]
