"""Better with every failure: a policy of few demonstrations, corrections where it fails, and what they were worth.

    python examples/improve/improve.py --work experiments/improve

1. Demonstrations, statistics, and a policy trained to its end on them.
2. The policy plays starts of its own; where it fails, it plays the same start again until the expert takes over.
3. From its weights two more runs of as many steps: one on the demonstrations with these corrections, one on the demonstrations
   alone. The second says what further training is worth without corrections.
4. All three policies play the same fresh starts, which no data was recorded at: improve.json, report.html.

Every step is a command of `paligemma-vla`, shown before it runs, and noted in WORK/done when it has ended: a call that was
stopped goes on where it was. docs/improve.md says how the same is done with a robot.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from paligemma_vla.cli.arguments import add_workers, natural, positive
from paligemma_vla.cli.demo import ACTION_REPEAT, TASKS
from paligemma_vla.cli.main import main as paligemma_vla
from paligemma_vla.evaluation.compare import difference
from paligemma_vla.evaluation.report import Report, write_report
from paligemma_vla.storage import atomic_write

CONFIG = Path(__file__).parents[2] / "configs" / "demo.yaml"
# Demonstrations, starts of corrections and fresh starts are drawn from seeds that differ.
CORRECTION_SEED, FRESH_SEED = 1000, 2000
ARMS = {  # by folder: label and note on the page, the headline first
    "corrections": ("after corrections", "trained further on demonstrations and corrections"),
    "before": ("before", "the policy that was corrected"),
    "plain": ("more training", "as many further steps, on the demonstrations alone"),
}


def main() -> int:
    args = parse_arguments()
    work: Path = args.work
    simulator = ["--env", "metaworld", "--workers", args.workers]
    demonstrate(args, simulator)
    train(args, "before", work / "demonstrations", args.base_steps)
    policy = checkpoint(work, "before")
    correct(args, simulator, policy)
    demonstrations, corrections = str(work / "demonstrations"), str(work / "corrections")
    mixture = [{"path": demonstrations, "weight": 1 - args.weight}, {"path": corrections, "weight": args.weight}]
    further = ("--init_from", policy, *settings(args.further))
    train(args, "corrections", json.dumps(mixture), args.steps, *further, "--set", "data.labels=interventions")
    train(args, "plain", demonstrations, args.steps, *further)
    for arm in ARMS:
        starts = ["--episodes", args.episodes, "--seed", FRESH_SEED + args.seed, "--max_videos", args.max_videos]
        play(args, simulator, f"fresh/{arm}", checkpoint(work, arm), *starts)
    again = ["--failed_in", work / "own" / "rollout.json", *correction_starts(args)]
    play(args, simulator, "again", checkpoint(work, "corrections"), *again)
    return report(args)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("experiments/improve"), help="where everything goes")
    parser.add_argument("--tasks", nargs="+", default=TASKS, metavar="T")
    parser.add_argument("--demonstrations", type=positive, default=32, help="per task (default: %(default)s)")
    parser.add_argument("--base_steps", type=positive, default=1800, help="of the first training (default: %(default)s)")
    parser.add_argument("--correction_starts", type=positive, default=120, help="per task (default: %(default)s)")
    text = "actions of the policy before the expert takes over; each failed start is played once for each (default: 6 12 20)"
    parser.add_argument("--take_over_after", nargs="+", type=natural, default=[6, 12, 20], metavar="N", help=text)
    parser.add_argument("--weight", type=float, default=0.4, help="share of corrections in a batch (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=900, help="of further training (default: %(default)s)")
    parser.add_argument("--episodes", type=positive, default=120, help="fresh starts per task (default: %(default)s)")
    parser.add_argument("--weakest", type=positive, default=2, help="tasks that are judged together (default: %(default)s)")
    parser.add_argument("--max_videos", type=natural, default=1, help="per task, policy and outcome (default: %(default)s)")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of every training run")
    further = ["optimizer.lr=1.0e-3", "optimizer.vlm_lr=3.0e-4", "training.stages=[]"]
    parser.add_argument("--further", nargs="+", default=further, metavar="KEY=VALUE", help="of further training alone")
    add_workers(parser)
    args = parser.parse_args()
    if not 0 < args.weight < 1:
        parser.error(f"--weight: got {args.weight}, expected more than 0 and less than 1")
    return args


def checkpoint(work: Path, arm: str) -> Path:
    return work / "experiments" / arm / "checkpoints" / "last.pth.tar"


def settings(values: list[str]) -> list[str]:
    return [word for value in values for word in ("--set", value)]


def stage(work: Path, name: str, *command: object, made: Path | None = None) -> None:
    """Run one command of `paligemma-vla`, unless it has ended before. made: a folder that it does not continue."""
    words = [str(word) for word in command]
    line = shlex.join(words)
    note = work / "done" / name.replace("/", "_")
    if note.exists():
        if (before := note.read_text().rstrip("\n")) != line:
            sys.exit(
                f"error: {note}: made by another command\n  got      {before}\n  expected {line}\n"
                "  take the settings of that call, or another --work"
            )
        return
    if made is not None and made.exists():
        shutil.rmtree(made)
    sys.stderr.write(f"\n=== {name}\npaligemma-vla {line}\n")
    if status := paligemma_vla(words):
        sys.exit(status)
    note.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(note, line + "\n")


def demonstrate(args: argparse.Namespace, simulator: list[object]) -> None:
    """A tiny backbone, demonstrations, and their statistics, which all three policies have."""
    work: Path = args.work
    stage(work, "backbone", "tiny", "--output_dir", work / "tiny-paligemma")
    recorded = ["--output_dir", work / "demonstrations", "--episodes", args.demonstrations, "--seed", args.seed]
    stage(work, "demonstrations", "collect", *simulator, "--tasks", *args.tasks, *recorded, "--action_repeat", ACTION_REPEAT)
    data = ["--train_data_override", work / "demonstrations"]
    stage(work, "statistics", "stats", "--config_path", CONFIG, "--output_path", work / "normalization_stats.json", *data)


def train(args: argparse.Namespace, arm: str, data: object, steps: int, *more: object) -> None:
    """One run of `steps` steps; a call that was stopped resumes it."""
    work: Path = args.work
    values = [
        f"data.train_parquet_files={data}",
        f"data.normalization_stats_path={work / 'normalization_stats.json'}",
        "data.allow_other_statistics=true",  # a policy that fails leaves the range of the demonstrations
        f"model.vlm_config.model_name_or_path={work / 'tiny-paligemma'}",
        f"training.checkpoint_dir={work / 'experiments'}",
        f"training.experiment_name={arm}",
        f"training.max_steps={steps}",
        "training.epochs=1000000",  # the steps decide
        f"training.seed={args.seed}",
    ]
    processes = max(1, min(args.workers, 8))
    run = ["train", "--config_path", CONFIG, "--device", "cpu", "--nproc", processes, "--resume_checkpoint", "auto"]
    stage(work, f"train/{arm}", *run, *settings(values), *settings(args.set), *more)


def play(args: argparse.Namespace, simulator: list[object], name: str, policy: Path, *more: object) -> None:
    output = args.work / name
    command = ["rollout", *simulator, "--checkpoint_path", policy, "--tasks", *args.tasks, "--output_dir", output]
    stage(args.work, f"rollout/{name}", *command, *more, made=output)


def correction_starts(args: argparse.Namespace) -> list[object]:
    return ["--episodes", args.correction_starts, "--seed", CORRECTION_SEED + args.seed, "--max_videos", 0]


def correct(args: argparse.Namespace, simulator: list[object], policy: Path) -> None:
    """The policy alone, then what it failed again, with the expert taking over after some of its actions."""
    starts = correction_starts(args)
    play(args, simulator, "own", policy, *starts)
    for after in args.take_over_after:
        helped = ["--failed_in", args.work / "own" / "rollout.json", "--take_over", "expert", "--take_over_after", after]
        folder = args.work / "corrections" / f"after_{after:02d}"
        play(args, simulator, f"corrections/after_{after:02d}", policy, *starts, *helped, "--record", folder / "episodes")


def report(args: argparse.Namespace) -> int:
    """Differences in pairs, over each task and over the weakest together: improve.json, a page, and a table."""
    work: Path = args.work
    own = json.loads((work / "own" / "rollout.json").read_text())["tasks"]
    # Weakest by other starts than those that are compared: the worst of those would be better again by chance.
    weakest = sorted(own, key=lambda task: own[task]["rate"])[: args.weakest]
    played = {arm: work / "fresh" / arm / "rollout.json" for arm in ARMS}
    result: dict[str, Any] = {"weakest": weakest, "own": {task: own[task]["rate"] for task in own}}
    for other in ("before", "plain"):
        tasks = {task: difference(played[other], played["corrections"], [task]) for task in own}
        pooled = difference(played[other], played["corrections"], weakest)
        result[f"corrections_against_{other}"] = {"tasks": tasks, "weakest": pooled}
    again = json.loads((work / "again" / "rollout.json").read_text())["tasks"].values()
    solved, failed = (sum(entry[name] for entry in again) for name in ("successes", "episodes"))
    result["failed_starts"] = {"episodes": failed, "solved_after": solved}
    atomic_write(work / "improve.json", json.dumps(result, indent=2) + "\n")
    facts = {
        "the weakest tasks": ", ".join(weakest),
        "their success, against the policy before": shown(result["corrections_against_before"]["weakest"]),
        "against as much plain training": shown(result["corrections_against_plain"]["weakest"]),
        "starts that failed before": f"{solved} of {failed} are solved now",
    }
    by_task = {
        f"by task, against {name}": {task: interval(found) for task, found in result[key]["tasks"].items()}
        for name, key in (("the policy before", "corrections_against_before"), ("more training", "corrections_against_plain"))
    }
    page = Report(
        title="Learning from its own failures",
        subtitle=f"{args.demonstrations} demonstrations a task, then corrections of failures and {args.steps} further steps.",
        run_dir=work / "experiments" / "corrections",
        rollouts=[(*text, played[arm].parent) for arm, text in ARMS.items()],
        facts=facts | by_task,
    )
    write_report(work / "report.html", page)
    lines = [table(result), *(f"{name}: {value}" for name, value in facts.items())]
    sys.stdout.write("\n".join([*lines, f"{work / 'report.html'}: open it in a browser"]) + "\n")
    return 0


def table(result: dict[str, Any]) -> str:
    """Success of the three policies and its differences, by task; the weakest have a star."""
    lines = ["task           before  after  plain   after - before         after - plain"]
    for task in result["own"]:
        one, two = (result[f"corrections_against_{other}"]["tasks"][task] for other in ("before", "plain"))
        rates = f"{one['before']:6.2f} {one['after']:6.2f} {two['before']:6.2f}"
        lines.append(f"{task:14s} {rates}   {interval(one):22s} {interval(two)}{' *' * (task in result['weakest'])}")
    return "\n".join(lines)


def interval(found: dict[str, Any]) -> str:
    low, high = found["ci95"]
    return f"{found['difference']:+.2f} [{low:+.2f}, {high:+.2f}]"


def shown(found: dict[str, Any]) -> str:
    return f"{found['before']:.2f} to {found['after']:.2f}, {interval(found)} over {found['episodes']} starts"


if __name__ == "__main__":
    sys.exit(main())
