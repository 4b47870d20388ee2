"""`paligemma-vla replay`: recorded actions, open loop, in a simulator."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

from paligemma_vla.cli.arguments import add_workers, from_flags, positive, share


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from paligemma_vla.evaluation.replay import Column

    parser.epilog = (
        "The exit status is 0 when the episodes were played, whatever came of it: replay.json says that. Data that does not "
        "say how its episodes start is played by a program of your own (docs/replay.md)."
    )
    parser.add_argument("--env", default="metaworld", help="simulator (default: %(default)s)")
    parser.add_argument("--data", required=True, nargs="+", metavar="D", help="episode files, folders, globs, URLs")
    parser.add_argument("--tasks", nargs="+", metavar="T", help="only these (default: all in the data)")
    parser.add_argument("--episodes", type=positive, metavar="N", help="the first ones of each task (default: all)")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="O", help="for replay.json")
    text = "actions to play (default: executed_action where it is stored, else action, which training learns)"
    parser.add_argument("--column", choices=get_args(Column), help=text)
    text = "how far the state may be from the recorded one, as a share of its range in the data (default: %(default)s)"
    parser.add_argument("--tolerance", type=share, default=0.01, metavar="X", help=text)
    add_workers(parser)


def main(args: argparse.Namespace) -> int:
    """Replay, and print what came of it."""
    from paligemma_vla.evaluation.replay import ReplayConfig, replay

    result = replay(from_flags(ReplayConfig, args))
    tasks = result["tasks"]
    total = {name: sum(count[name] for count in tasks.values()) for name in next(iter(tasks.values()))}
    lines = [_task_line(task, count) for task, count in tasks.items()]
    lines += [_task_line("all", total)] if len(tasks) > 1 else []
    away = [entry for entry in result["episodes"] if entry["deviation"] is not None]
    first = {entry["task"]: entry for entry in reversed(away)}
    lines += [_deviation_line(first[task]) for task in tasks if task in first]
    lines += [f"finding: {finding['text']}" for finding in result["findings"]]
    lines.append(_verdict(total, bool(result["findings"])))
    sys.stdout.write("\n".join([*lines, f"-> {args.output_dir / 'replay.json'}"]) + "\n")
    return 0


def _task_line(task: str, count: dict[str, int]) -> str:
    successes = f"{count['both']} of {count['recorded_successes']} recorded successes succeed here"
    return f"{task:28s} {successes}; the state leaves the recorded one in {count['deviations']} of {count['episodes']} episodes"


def _deviation_line(entry: dict[str, Any]) -> str:
    found, unit = entry["deviation"], f" {entry['deviation']['unit']}".rstrip()
    where = f"{entry['file']}: row {entry['row']} ({entry['task']}, seed {entry['seed']})"
    got = f"{found['dimension']} is {found['replayed']:.4g}{unit}, recorded {found['recorded']:.4g}{unit}"
    outcome = "succeeds" if entry["success"] else "fails"
    return f"{where}: {outcome}; at step {found['step']} {got} (tolerance {found['tolerance']:.2g})"


def _verdict(total: dict[str, int], found: bool) -> str:
    if total["both"] == total["recorded_successes"] and not total["deviations"]:
        return "the recorded actions do here what they did in the recording" + (", but see the findings" if found else "")
    if found:
        return "the recorded actions do not do here what they did in the recording: see the findings"
    return (
        "the recorded actions do not do here what they did in the recording, and no sign or scale of an action explains it; "
        "compare control rate, timing and the start"
    )
