"""The documents name files, symbols, tests, configuration keys and flags: all of them exist, and the examples run."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import yaml
from benchmarks import lerobot
from pydantic import BaseModel
from torch.distributed.run import get_args_parser as torchrun_parser

from paligemma_vla.cli.main import COMMANDS, main, script
from paligemma_vla.config import VLAConfig, config_from_dict
from paligemma_vla.data.index import EpisodeIndex
from support import encode_image

ROOT = Path(__file__).parent.parent
READMES = (ROOT / "README.md", ROOT / "README.zh-CN.md")
DOCUMENTS = (*READMES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))
SCRIPTS = {
    "main_train.py": "train",
    "main_train_ddp.py": "train",
    "main_eval.py": "evaluate",
    "utils/calculate_normalization_stats.py": "stats",
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

NAMED = re.compile(r"`((?:src|tests|configs|docs|utils|benchmarks)/[\w./-]+?)(?:(::?)([\w.]+))?`")

document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def blocks(path: Path, language: str) -> list[str]:
    """Fenced code of one language, in order."""
    return [code for kind, code in FENCE.findall(path.read_text("utf-8")) if kind == language]


def prose(path: Path) -> str:
    return FENCE.sub("", path.read_text("utf-8"))


def without_comments(code: str) -> str:
    return re.sub(r"\s*#.*$", "", code, flags=re.MULTILINE)


def defines(path: Path, name: str) -> bool:
    """Whether a Python file defines a function, a class, `Class.method`, or a constant."""
    text = path.read_text("utf-8")
    return all(re.search(rf"^ *(async def|def|class) {part}\b|^{part}\b.* = ", text, re.MULTILINE) for part in name.split("."))


@document
def test_paths_symbols_and_tests_that_a_document_names_exist(path: Path) -> None:
    faults = []
    for file, separator, name in NAMED.findall(prose(path)):
        target = ROOT / file
        if not target.exists():
            faults.append(file)
        elif name and not defines(target, name):
            faults.append(f"{file}{separator}{name}")
    assert not faults


@document
def test_links_within_the_repository_lead_somewhere(path: Path) -> None:
    faults = []
    for target in re.findall(r"\[[^\]]*\]\(([^)]+)\)", prose(path)):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            faults.append(target)
    assert not faults


def anchors(path: Path) -> set[str]:
    """What headings are called in links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@document
def test_configuration_keys_that_a_document_names_exist(path: Path) -> None:
    text = prose(path) + "".join(blocks(path, "bash"))
    keys = re.findall(r"(?:`|--set )((?:data|model|training|optimizer|lr_scheduler|wandb)\.[\w.]+)", text)
    assert not [key for key in keys if not key.endswith((".py", ".json", ".md", ".safetensors", ".pt2")) and not is_key(key)]


@document
def test_configuration_in_a_document_is_accepted(path: Path) -> None:
    needed = {"data.train_parquet_files": "x", "model.vlm_config.model_name_or_path": "x"}
    for text in blocks(path, "yaml"):
        if not text.startswith("apiVersion:"):  # of Kubernetes
            config_from_dict(yaml.safe_load(text), needed)


def is_key(dotted: str) -> bool:
    section: object = VLAConfig
    for name in dotted.split("."):
        if not (isinstance(section, type) and issubclass(section, BaseModel) and name in section.model_fields):
            return False
        section = section.model_fields[name].annotation
    return True


def command_lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(command of `paligemma-vla`, its arguments) of each of the project's commands in a document's shell blocks."""
    for line in without_comments("".join(blocks(path, "bash"))).splitlines():
        if not line.startswith(("python ", "paligemma-vla ")):
            continue  # what the shell takes from line to line is not split here
        words = shlex.split(line)
        if words[0] == "python" and words[1] in SCRIPTS:
            yield SCRIPTS[words[1]], words[2:]
        elif words[0] == "paligemma-vla":
            yield words[1], words[2:]


@document
def test_commands_in_shell_blocks_parse(path: Path) -> None:
    for command, arguments in command_lines(path):
        assert command in COMMANDS
        parser = argparse.ArgumentParser(prog=command, exit_on_error=False)
        import_module(f"paligemma_vla.cli.{command}").add_arguments(parser)
        parser.parse_args(arguments)  # exits, which fails the test, when a flag is unknown


def flags_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Flags of a parser and of the actions below it (`data check`)."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from flags_of(below)


@document
def test_flags_that_a_document_names_in_its_prose_exist(path: Path) -> None:
    known = {"--debug", "--help", "--kill-on-bad-exit", "--requeue", "--shm-size", "--ipc", *flags_of(torchrun_parser())}
    known.update(flags_of(lerobot.arguments()))
    for command in COMMANDS:
        parser = argparse.ArgumentParser()
        import_module(f"paligemma_vla.cli.{command}").add_arguments(parser)
        known.update(flags_of(parser))
    named = re.findall(r"`[^`\n]*?(--\w[\w-]*)", prose(path))
    assert not set(named) - known


def test_shell_blocks_are_valid_shell() -> None:
    for path in DOCUMENTS:
        for code in blocks(path, "bash"):
            checked = subprocess.run(["bash", "-n"], input=code, capture_output=True, text=True, check=False)
            assert checked.returncode == 0, f"{path.name}: {checked.stderr}"


def torchrun_words(code: str) -> list[str]:
    """The arguments of the `torchrun` in a shell script, with a number for whatever the shell would put in."""
    command = code[code.index("torchrun") :].replace("\\\n", " ").splitlines()[0].rstrip("'")
    plain = re.sub(r"\$\(\(.*?\)\)|\$\([^)]*\)|\$\{?\w+\}?", "1", command)
    return shlex.split(plain)[1:]


def test_examples_of_several_machines_are_what_torchrun_and_training_take() -> None:
    """The plain one, the one for Slurm, and the one for Kubernetes."""
    path = ROOT / "docs" / "deploy.md"
    service, job = yaml.safe_load_all(next(text for text in blocks(path, "yaml") if text.startswith("apiVersion:")))
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    scripts = [code for code in blocks(path, "bash") if "torchrun" in code] + container["args"]
    assert len(scripts) == 3
    for text in scripts:
        given = torchrun_parser().parse_args(torchrun_words(text))
        assert given.training_script == "main_train_ddp.py"
        assert (given.rdzv_backend, given.nproc_per_node) == ("c10d", "8")
        assert "is_host=1" in given.rdzv_conf
        parser = argparse.ArgumentParser(exit_on_error=False)
        import_module("paligemma_vla.cli.train").add_arguments(parser)
        assert parser.parse_args(given.training_script_args).resume_checkpoint == "auto"
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert pod["terminationGracePeriodSeconds"] > int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert f"{job['metadata']['name']}-0.{service['metadata']['name']}:" in container["args"][0]
    signal_s = int(re.findall(r"--signal=TERM@(\d+)", scripts[1])[0])
    assert signal_s > int(re.findall(r"SHUTDOWN_TIMEOUT=(\d+)", scripts[1])[0])


def test_both_readmes_have_the_same_parts() -> None:
    """Headings of the same levels, the same tables, the same links, and the same code but for its comments."""
    english, chinese = READMES

    def shape(path: Path) -> list[str]:
        return re.findall(r"^#+|^\|[-|]+\|$|^\d+\.|^- ", prose(path), flags=re.MULTILINE)

    def links(path: Path) -> list[str]:
        return sorted(target for target in re.findall(r"\]\(([^)]+)\)", prose(path)) if not target.startswith("README"))

    def code(path: Path) -> list[tuple[str, str]]:
        return [(kind, without_comments(text)) for kind, text in FENCE.findall(path.read_text("utf-8"))]

    assert shape(english) == shape(chinese)
    assert links(english) == links(chinese)
    assert code(english) == code(chinese)


def test_map_names_every_module() -> None:
    """Paths in the table are those below the package; after the first of a row, those beside it."""
    package = ROOT / "src" / "paligemma_vla"
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rows = text[text.index("## The map") :].split("\n## ")[0]
    listed: set[str] = set()
    for names in re.findall(r"^\| (`[^|]+`) \|", rows, flags=re.MULTILINE):
        first, *others = re.findall(r"`([^`]+)`", names)
        listed.update([first, *(str(Path(first).parent / other) for other in others)])
    there = {file.relative_to(package).as_posix() for file in package.rglob("*.py") if file.name != "__init__.py"}
    assert not there - listed
    gone = {name for name in listed if name.endswith(".py") and not (package / name).exists() and not (ROOT / name).exists()}
    assert not gone


def test_data_format_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for code in blocks(ROOT / "docs" / "data_format.md", "python"):
        exec(compile(code, "data_format.md", "exec"), scope)
    assert scope["index"].steps == 20 + 21 + 22 + 23  # type: ignore[attr-defined]
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for code in blocks(ROOT / "docs" / "replay.md", "python"):
        exec(compile(code, "replay.md", "exec"), scope)
    assert scope["replayed"].state.shape == (20, 4)  # type: ignore[attr-defined]
    by_hand = EpisodeIndex.build("data/by_hand.parquet")
    assert (len(by_hand), by_hand.steps, by_hand.layout.metadata.robot) == (1, 25, "my arm")


@pytest.fixture
def small_configs(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A folder with configs/vla_config.yaml, the shipped one but for sizes."""
    raw = yaml.safe_load((ROOT / "configs" / "vla_config.yaml").read_text("utf-8"))
    raw["model"]["vlm_config"] |= {"model_name_or_path": str(tiny_model_dir), "dtype": "float32"}
    raw["model"]["action_head_config"] |= {"embed_dim": 32, "num_layers": 1, "num_heads": 2, "num_inference_timesteps": 2}
    raw["training"] |= {"epochs": 1, "stages": [], "val_action_samples": 4}
    raw["data"] |= {"batch_size": 8, "num_workers": 0, "val_fraction": 0.3}
    raw["optimizer"] = {"lr": 1e-3}
    raw["lr_scheduler"] = {}
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "vla_config.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path


def test_readme_own_data_runs_as_written(small_configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write, look, statistics, train, evaluate, infer, export: the blocks of the README, with a tiny model."""
    monkeypatch.chdir(small_configs)
    text = READMES[0].read_text("utf-8")
    part = text[text.index("## Your own data") : text.index("## The real PaliGemma")]
    rng = np.random.default_rng(0)
    episodes = []
    for length in (7, 9, 5, 8):
        state, action = rng.normal(size=(2, length, 7)).astype(np.float32)
        episodes.append(([encode_image(rng) for _ in range(length)], state, action, "open the drawer"))
    given = {"my_episodes": episodes, "image": rng.integers(0, 256, (48, 64, 3), dtype=np.uint8), "state": np.zeros(7)}
    scope: dict[str, object] = {}
    runners: dict[str, Callable[[list[str]], int]] = {
        name: lambda words, command=command: script(command, words) for name, command in SCRIPTS.items()
    }
    deploying = text[text.index("## Deploying") : text.index("## Install")]
    for kind, code in FENCE.findall(part + deploying):
        if kind == "python":
            scope.update(given)
            exec(compile(code, "README.md", "exec"), scope)
            assert "out" not in scope or scope["out"]["actions"].shape == (8, 7)  # type: ignore[index]
            continue
        for line in code.splitlines():
            words = shlex.split(line)
            status = main(words[1:]) if words[0] == "paligemma-vla" else runners[words[1]](words[2:])
            assert status == 0, line
    assert "out" in scope
    assert (small_configs / "experiments" / "my_arm" / "eval" / "report.html").is_file()
