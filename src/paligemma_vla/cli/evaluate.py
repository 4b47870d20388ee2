"""`paligemma-vla evaluate` and main_eval.py: a policy's actions beside recorded ones."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paligemma_vla import versions
from paligemma_vla.cli.arguments import add_policy_arguments, from_flags, natural, positive
from paligemma_vla.storage import atomic_write

if TYPE_CHECKING:
    from paligemma_vla.evaluation.open_loop import OpenLoopResult
    from paligemma_vla.policy import Policy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_policy_arguments(parser, required=True)
    parser.add_argument(
        "--eval_data_path", required=True, nargs="+", metavar="D", help="episode files, folders, globs, URLs, lerobot:FOLDER"
    )
    parser.add_argument("--output_dir", required=True, type=Path, metavar="O", help="for metrics.json and report.html")
    parser.add_argument("--save_predictions", action="store_true", help="also write predictions.parquet")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), help="default: the best there is")
    parser.add_argument("--max_samples", type=positive, metavar="N", help="steps to compare, evenly spread (default: all)")
    parser.add_argument(
        "--batch_size", type=positive, default=64, metavar="B", help="observations at a time (default: %(default)s)"
    )
    parser.add_argument("--num_steps", type=positive, metavar="N", help="Euler steps (default: the checkpoint's)")
    parser.add_argument("--seed", type=natural, default=0, help="of the noise that actions start from (default: %(default)s)")


def main(args: argparse.Namespace) -> int:
    """Evaluate, write the files, and print a summary."""
    from paligemma_vla.data.index import EpisodeIndex
    from paligemma_vla.evaluation.open_loop import OpenLoopConfig, OpenLoopResult, evaluate
    from paligemma_vla.policy import Policy
    from paligemma_vla.training.distributed import choose_device

    output: Path = args.output_dir
    output.mkdir(parents=True, exist_ok=True)
    predictions = output / "predictions.parquet" if args.save_predictions else None
    config = from_flags(OpenLoopConfig, args, predictions_path=predictions)
    device = choose_device(args.device)
    index = EpisodeIndex.build(args.eval_data_path, "--eval_data_path")
    policy = Policy.from_checkpoint(args.checkpoint_path, device=str(device), weights=args.weights)
    result = evaluate(policy, index, config)
    result = OpenLoopResult({**result.metrics, "checkpoint": checkpoint_facts(args.checkpoint_path, policy)}, result.traces)
    text = json.dumps({**result.metrics, "versions": versions()}, indent=2, allow_nan=False)
    atomic_write(output / "metrics.json", f"{text}\n")
    _write_report(output / "report.html", index, result)
    sys.stdout.write(summary(result.metrics, output) + "\n")
    return 0


def checkpoint_facts(path: str, policy: Policy) -> dict[str, Any]:
    """What the checkpoint is: where it came from and how large, besides `Policy.metadata`."""
    from paligemma_vla.model.quantize import weight_bytes
    from paligemma_vla.policy import fingerprint

    head = policy.config.model.action_head_config
    trained = policy.metadata["training"]
    return {
        "path": path,
        "sha256": fingerprint(path),
        **{name: trained[name] for name in ("step", "epoch", "averaged_weights")},
        "weights": policy.metadata["weights"],
        "weights_mb": round(weight_bytes(policy.model) / 1e6, 2),
        "experiment": policy.config.training.experiment_name,
        "backbone": policy.config.model.vlm_config.model_name_or_path,
        "parameters": sum(parameter.numel() for parameter in policy.model.parameters()),
        "horizon": head.horizon,
        "per_action_dim": head.per_action_dim,
        "normalization": policy.config.data.normalization,
        "versions_in_training": policy.metadata["versions"],
    }


def _write_report(path: Path, index: Any, result: OpenLoopResult) -> None:
    from paligemma_vla.evaluation.report import Report, write_report

    facts = result.metrics["checkpoint"]
    run_dir = Path(facts["path"]).resolve().parent.parent
    write_report(
        path,
        Report(
            title=f"{facts['experiment']}: open-loop evaluation",
            subtitle=f"{facts['path']}, step {facts['step']:,}",
            # A checkpoint that was copied elsewhere has left its curves behind.
            run_dir=run_dir if (run_dir / "metrics.jsonl").is_file() and (run_dir / "config.yaml").is_file() else None,
            dataset=index,
            evaluation=result,
            facts={**facts, **result.metrics["settings"], "versions": versions()},
        ),
    )


def summary(metrics: dict[str, Any], output: Path) -> str:
    """The main figures as a few aligned lines."""
    lines = [f"{'dimension':20s} {'MAE':>9s} {'MSE':>9s} {'MAE of the mean action':>24s}"]
    total = {"name": "all", **metrics, "mean_action_mae": metrics["baselines"]["mean_action"]["mae"]}
    for row in [*metrics["per_dimension"], total]:
        lines.append(f"{row['name']:20s} {row['mae']:9.4f} {row['mse']:9.4f} {row['mean_action_mae']:24.4f}")
    lines.append(
        f"velocity loss {metrics['velocity_loss']:.5f}, {metrics['samples']} samples of {metrics['episodes']} episodes"
    )
    if metrics["data"]["training_files"]:
        lines.append("note: some of these files were in the training data, so the figures flatter")
    return "\n".join([*lines, f"-> {output / 'report.html'}"])
