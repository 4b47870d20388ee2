"""Graphs against the model called as ever. On a CPU a trace by make_fx stands for a CUDA graph: it too has fixed shapes, reads
the same tensors each time, runs no Python, and refuses what asks for a value."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from no_waiting import NoWaiting
from paligemma_vla import Policy
from paligemma_vla.config import config_from_dict
from paligemma_vla.errors import ModelError
from paligemma_vla.model import graphs
from paligemma_vla.model.graphs import GraphedModel
from paligemma_vla.policy import Continuation
from support import ACTION_DIM, observation_of

Rows = list[dict[str, Any]]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")


def trace(run: graphs.Run, inputs: Sequence[Tensor], pool: Any) -> graphs.Replay:
    with torch.no_grad():
        traced = make_fx(run)(inputs)
    return lambda: traced(inputs)


@pytest.fixture
def graphed(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Policy:
    """The policy of the suite by traces; it knows prefixes of 2 actions."""
    monkeypatch.setattr(graphs, "capture", trace)
    return with_graphs(policy, fused=False)


def with_graphs(policy: Policy, fused: bool) -> Policy:
    graphed = copy.copy(policy)
    graphed.config = config_from_dict(policy.config.model_dump(), {"training.rtc_max_delay": 2})
    prompts = policy.preprocessor.prompts
    graphed.graphs = GraphedModel(policy.model, 2 * prompts.image_tokens + prompts.max_len, fused)
    return graphed


def asked(rows: Rows) -> Iterator[dict[str, Any]]:
    """Arguments of `infer_batch`: one and several observations, instructions of two lengths, steps, and prefixes."""
    seen = [observation_of(row) for row in rows if row["image_2_bytes"] is not None][:6]
    seen[1]["prompt"] = "open the upper drawer, and then close it again"
    left = np.random.default_rng(0).uniform(-0.5, 0.5, (3, ACTION_DIM)).astype(np.float32)
    for observations in (seen[:1], seen[1:2], seen[:3], seen[3:6]):
        for num_steps in (None, 3):
            for delays in (None, (1, 2, 1), (2, 1, 2)):
                size = len(observations)
                continuations = None if delays is None else [Continuation(left, delay) for delay in delays[:size]]
                yield {
                    "observations": observations,
                    "seeds": range(size),
                    "num_steps": num_steps,
                    "continuations": continuations,
                }


def assert_same_answers(graphed: Policy, rows: Rows, tolerance: float = 1e-5) -> None:
    eager = copy.copy(graphed)
    eager.graphs = None
    for arguments in asked(rows):
        np.testing.assert_allclose(graphed.infer_batch(**arguments), eager.infer_batch(**arguments), atol=tolerance)


def test_graphs_answer_as_the_model_does_and_few_serve_all(graphed: Policy, rows: Rows) -> None:
    assert_same_answers(graphed, rows)
    kinds = len((1, 3)) * len((None, 3)) * len(("anew", "prefix"))
    assert [type(graph) for graph in graphed.graphs.captured.values()] == [graphs._Graph] * kinds


def test_what_no_graph_can_serve_is_computed_by_the_model(graphed: Policy, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = observation_of(next(row for row in rows if row["image_2_bytes"] is not None))
    eager = copy.copy(graphed)
    eager.graphs = None

    def check(**options: Any) -> None:
        given = {"observation": seen, "seed": 3} | options
        np.testing.assert_allclose(graphed.infer(**given)["actions"], eager.infer(**given)["actions"], atol=1e-5)

    lacking = {key: value for key, value in seen.items() if key != "image_2"}
    both = [policy.infer_batch([seen, lacking], [0, 0]) for policy in (graphed, eager)]
    np.testing.assert_allclose(*both, atol=1e-5)
    check(continuation=Continuation(np.zeros((3, ACTION_DIM), np.float32), 1), realtime="guidance")
    assert not graphed.graphs.captured
    monkeypatch.setattr(graphs, "GRAPHS", 1)
    for num_steps in (2, 3):
        check(num_steps=num_steps)
    assert len(graphed.graphs.captured) == 1


def test_a_camera_that_all_lack_has_a_graph_of_its_own(graphed: Policy, rows: Rows) -> None:
    eager = copy.copy(graphed)
    eager.graphs = None
    seen = observation_of(next(row for row in rows if row["image_2_bytes"] is not None))
    for number, lost in enumerate(("", "image_2"), 1):
        given = {key: value for key, value in seen.items() if key != lost}
        np.testing.assert_allclose(graphed.infer(given, seed=0)["actions"], eager.infer(given, seed=0)["actions"], atol=1e-5)
        assert len(graphed.graphs.captured) == number and None not in graphed.graphs.captured.values()


def test_rows_of_the_heads_mask_are_multiples_of_8(policy: Policy) -> None:
    for tokens in (23, 24, 25, 31):
        taken = GraphedModel(policy.model, tokens, fused=False).tokens
        assert tokens <= taken < tokens + 8
        assert (taken + 1) % 8 == 0


def test_a_capture_never_waits_for_the_gpu(policy: Policy, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    def watch(run: graphs.Run, inputs: Sequence[Tensor], pool: Any) -> graphs.Replay:
        with NoWaiting():
            answer = run(inputs)
        return lambda: answer

    monkeypatch.setattr(graphs, "capture", watch)
    graphed = with_graphs(policy, fused=False)
    for arguments in asked(rows):
        graphed.infer_batch(**arguments)
    assert None not in graphed.graphs.captured.values()


def test_what_cannot_be_captured_is_said_and_computed_as_ever(
    policy: Policy, rows: Rows, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []

    def fail(run: graphs.Run, inputs: Sequence[Tensor], pool: Any) -> graphs.Replay:
        tried.append(run)
        raise RuntimeError("no C compiler\nin /usr/bin")

    monkeypatch.setattr(graphs, "capture", fail)
    assert_same_answers(with_graphs(policy, fused=True), rows, tolerance=0)
    assert [record.message for record in caplog.records] == [
        "compile: torch.compile failed (no C compiler); a CUDA graph without it is captured, and answers take longer",
        "compile: a CUDA graph failed (no C compiler); kernels are launched one by one, and answers take longer",
    ]
    assert len(tried) == 2


def test_policy_on_a_cpu_has_no_graphs(checkpoint: Any) -> None:
    with pytest.raises(ModelError, match=r"compile: got the device cpu, expected cuda, where graphs are captured; leave it"):
        Policy.from_checkpoint(checkpoint, compile=True)


@pytest.mark.long
def test_compiled_step_answers_as_the_model_does(policy: Policy, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(run: graphs.Run, inputs: Sequence[Tensor], pool: Any) -> graphs.Replay:
        return lambda: run(inputs)

    monkeypatch.setattr(graphs, "capture", call)
    compiled = with_graphs(policy, fused=True)
    assert_same_answers(compiled, rows)
    assert len(compiled.graphs._to_capture) == 2, "torch.compile failed"


@needs_gpu
@pytest.mark.parametrize("fused", [False, True])
def test_cuda_graphs_answer_as_the_model_does(checkpoint: Any, rows: Rows, fused: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    graphed = with_graphs(Policy.from_checkpoint(checkpoint, device="cuda"), fused)
    assert_same_answers(graphed, rows)
    assert len(graphed.graphs._to_capture) == 1 + fused, "it could not be captured"
    assert None not in graphed.graphs.captured.values()
