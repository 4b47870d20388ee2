"""The trainer against naive loops; N steps = k steps + resume + the rest, bit for bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import ConfigFactory
from paligemma_vla.data.order import SampleRef
from paligemma_vla.data.writer import EpisodeWriter
from paligemma_vla.errors import CheckpointError, DataError, TrainingError
from paligemma_vla.model.tiny import TinySpec, write_tiny_paligemma
from paligemma_vla.model.vla_model import arguments_from_batch
from paligemma_vla.normalization import DatasetStatistics
from paligemma_vla.training import trainer as trainer_module
from paligemma_vla.training.checkpoint import load_checkpoint
from paligemma_vla.training.trainer import Trainer
from ranks import ALONE
from support import ACTION_DIM, HORIZON, METADATA, identical, make_episode, read_metrics, train_here, write_episodes


def collate(trainer: Trainer, refs: list[SampleRef], validation: bool = False) -> dict[str, Any]:
    from paligemma_vla.data.loader import Collator

    data = trainer.data.validation if validation else trainer.data.train
    batch = Collator(trainer.preprocessor.prompts)([data[ref] for ref in refs])
    assert isinstance(batch, dict)
    return batch


def naive_sums(trainer: Trainer, refs: list[SampleRef], validation: bool = False) -> tuple[Any, float]:
    """Sum of squared errors over valid elements and their number, one sample at a time."""
    total, count = torch.zeros(()), 0.0
    for ref in refs:
        batch = collate(trainer, [ref], validation)
        output = trainer.model(**arguments_from_batch(batch))
        mask = batch["action_mask"][:, None].expand_as(output.target)
        total = (
            total
            + ((output.velocity - (batch["action"].view(1, 1, HORIZON, ACTION_DIM) - batch["flow_noise"])) ** 2)[mask].sum()
        )
        count += mask.sum().item()
    return total, count


def test_step_is_the_gradient_of_the_mean_over_valid_elements_of_the_whole_batch(tiny_config: ConfigFactory) -> None:
    config = tiny_config({"training.stop_after_step": 1, "training.gradient_accumulation_steps": 4})
    twin = Trainer(tiny_config({"training.experiment_name": "twin"}), ALONE)
    twin.model.train()
    positions, samples = twin.data.order.batch(0)
    refs = [SampleRef(int(p), int(s)) for p, s in zip(positions, samples, strict=True)]
    total, count = naive_sums(twin, refs)
    assert count < len(refs) * 2 * HORIZON * ACTION_DIM  # some labels are past an episode's end
    (total / count).backward()
    norm = torch.stack([p.grad.norm() for p in twin.model.parameters()]).norm()

    train_here(config)
    line = read_metrics(config.run_dir)[0]
    assert line["step"] == 1
    assert line["train/batch_loss"] == pytest.approx((total / count).item(), rel=1e-5)
    assert line["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_processes_are_prepared_before_data_and_model(
    workers: int, tiny_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[str] = []

    def prepare(*arguments: object) -> None:
        began.append("data")
        raise DataError("enough")

    monkeypatch.setattr(trainer_module, "start_forkserver", lambda: began.append("forkserver"))
    monkeypatch.setattr(trainer_module, "prepare", prepare)
    with pytest.raises(DataError, match="enough"):
        Trainer(tiny_config({"data.num_workers": workers}), ALONE)
    assert began == [*["forkserver"][:workers], "data"]


def test_gradients_are_clipped_over_all_weights_together(tiny_config: ConfigFactory) -> None:
    norms = []
    for limit in (1e9, 0.05):
        config = tiny_config({"training.grad_clip_norm": limit, "training.experiment_name": f"clip_{limit}"})
        trainer = Trainer(config, ALONE)
        trainer._enter_stage()
        trainer._train_step([next(trainer._stream(1))])
        norms.append(torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm().item())
    assert norms[0] > 0.05
    assert norms[1] == pytest.approx(0.05, rel=1e-3)


STAGES = [{"train": "head", "steps": 4}, {"train": "all"}]


@pytest.fixture(scope="module")
def uninterrupted(session_config: ConfigFactory) -> Path:
    """Two epochs of five steps in two stages, four workers' worth of randomness: augmentation, flow, EMA."""
    config = session_config({"training.experiment_name": "uninterrupted", "training.stages": STAGES}, cameras=2)
    trainer = train_here(config)
    assert (trainer.data.order.steps_per_epoch, trainer.total_steps) == (5, 10)
    return config.run_dir


@pytest.mark.parametrize(
    "stop", [{"training.stop_after_epoch": 1}, {"training.stop_after_step": 4}, {"training.stop_after_step": 7}]
)
def test_resume_goes_on_bit_for_bit(session_config: ConfigFactory, uninterrupted: Path, stop: dict[str, int]) -> None:
    """D3, at an epoch's end, at a stage's end and in mid-epoch. Nothing that an uninterrupted run would not have stays behind:
    no further validation, no other `best`, no further checkpoint."""
    name = f"resumed_{next(iter(stop.values()))}"
    common = {"training.experiment_name": name, "training.stages": STAGES}
    first = session_config({**common, **stop}, cameras=2)
    part = train_here(first)
    assert part.step == stop.get("training.stop_after_step", 5)
    train_here(session_config(common, cameras=2), resume=first.run_dir / "checkpoints" / "last.pth.tar")
    runs = (uninterrupted, first.run_dir)
    expected, got = (load_checkpoint(run / "checkpoints" / "checkpoint_epoch_2.pth.tar") for run in runs)
    for key in ("state_dict", "optimizer", "ema", "lr_scheduler", "rng", "epoch", "step", "best_metric", "stale"):
        assert identical(got[key], expected[key]), key
    assert read_metrics(first.run_dir) == read_metrics(uninterrupted)
    links = [{(path.name, path.resolve().name) for path in (run / "checkpoints").glob("*.pth.tar")} for run in runs]
    assert links[0] == links[1]


def test_stages_train_what_they_say(session_config: ConfigFactory, uninterrupted: Path) -> None:
    """Head alone for four steps: the backbone stands still to the last bit; then everything moves."""
    trainer = Trainer(session_config({"training.experiment_name": "stage", "training.stages": STAGES}, cameras=2), ALONE)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer._enter_stage()
    stream = trainer._stream(4)
    for _ in range(4):
        trainer._train_step([next(stream)])
    middle = trainer.model.state_dict()
    moved = {name for name in start if not torch.equal(start[name], middle[name])}
    assert len(moved) > 10
    assert not any(name.startswith("paligemma_vlm.") for name in moved)
    end = load_checkpoint(uninterrupted / "checkpoints" / "last.pth.tar")["state_dict"]
    # Rows of the embedding table that no prompt uses do not move; tensors as a whole do.
    assert [name for name in start if torch.equal(start[name], end[name]) and "k_proj.bias" not in name] == []


def test_validation_equals_a_naive_pass(tiny_config: ConfigFactory, two_camera_dir: Path) -> None:
    """With the averaged weights: the objective on fixed noise, and the mean absolute error of sampled actions in real units.
    Nothing changes by it."""
    averaged = {"training.ema_decay": 0.99, "optimizer.lr": 1e-2, "training.max_steps": 6}
    config = tiny_config({**averaged, "data.val_parquet_files": str(two_camera_dir), "training.val_action_samples": 1000})
    trainer = train_here(config)
    trainer.model.eval().requires_grad_(False)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    metrics = trainer.validate()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert trainer.validate() == metrics
    assert torch.equal(torch.get_rng_state(), state)
    assert identical(trainer.model.state_dict(), before)

    refs = [SampleRef(n, n) for n in range(len(trainer.data.validation))]
    scale = (np.array(trainer.preprocessor.statistics.action.max) - trainer.preprocessor.statistics.action.min) / 2
    errors, valid = np.zeros((HORIZON, ACTION_DIM)), np.zeros((HORIZON, ACTION_DIM))
    of_last_weights, count = naive_sums(trainer, refs, validation=True)
    with trainer.ema.applied(trainer.model):
        total, _ = naive_sums(trainer, refs, validation=True)
        for ref in refs:
            batch = collate(trainer, [ref], validation=True)
            sampled = trainer.model(**arguments_from_batch(batch, sample=True))[0].numpy()
            mask = batch["action_mask"][0].numpy()
            errors += np.abs(sampled - batch["action"].view(HORIZON, ACTION_DIM).numpy()) * scale * mask
            valid += mask
    assert metrics["val/epoch_loss"] == pytest.approx((total / count).item(), rel=1e-5)
    assert abs(metrics["val/epoch_loss"] - (of_last_weights / count).item()) > 1e-4
    assert metrics["val/action_mae"] == pytest.approx(errors.sum() / valid.sum(), rel=1e-4)
    assert metrics["val/action_mae_per_dim"] == pytest.approx((errors.sum(0) / valid.sum(0)).tolist(), rel=1e-4)
    assert metrics["val/action_mae_per_step"] == pytest.approx((errors.sum(1) / valid.sum(1)).tolist(), rel=1e-4)
    assert read_metrics(config.run_dir)[-1]["val/epoch_loss"] == metrics["val/epoch_loss"]


def test_validation_has_no_figure_where_no_label_reaches(tiny_config: ConfigFactory, tmp_path: Path) -> None:
    write_episodes(tmp_path / "val", lengths=(2, 3))
    metrics = Trainer(tiny_config({"data.val_parquet_files": str(tmp_path / "val")}), ALONE).validate()
    *reached, last = metrics["val/action_mae_per_step"]  # the horizon is 4
    assert last is None
    assert all(value > 0 for value in reached)
    assert metrics["val/action_mae"] > 0


def test_best_is_the_lowest_validation_and_last_the_last(tiny_config: ConfigFactory) -> None:
    config = tiny_config(
        {"training.epochs": 4, "optimizer.lr": 3e-2, "lr_scheduler.type": "constant", "training.ema_decay": 0.0}
    )
    train_here(config)
    losses = {line["step"]: line["val/epoch_loss"] for line in read_metrics(config.run_dir) if "val/epoch_loss" in line}
    best = min(losses, key=losses.__getitem__)
    folder = config.run_dir / "checkpoints"
    saved = load_checkpoint(folder / "model_best.pth.tar")
    assert (saved["step"], saved["best_metric"]) == (best, losses[best])
    assert load_checkpoint(folder / "last.pth.tar")["step"] == max(losses)
    assert load_checkpoint(folder / "last.pth.tar")["best_metric"] == losses[best]


def test_without_validation_best_follows_last_and_numbers_follow_save_every_n_epochs(tiny_config: ConfigFactory) -> None:
    config = tiny_config({"training.epochs": 5, "training.save_every_n_epochs": 2, "data.val_fraction": 0.0})
    assert train_here(config).data.validation is None
    folder = config.run_dir / "checkpoints"
    assert {path.name for path in folder.glob("checkpoint_*.pth.tar")} == {f"checkpoint_epoch_{n}.pth.tar" for n in (2, 4, 5)}
    assert (folder / "model_best.pth.tar").resolve() == (folder / "last.pth.tar").resolve()
    assert not any("val/epoch_loss" in line for line in read_metrics(config.run_dir))


def test_metrics_lines_are_the_promised_ones(trained_run: Path) -> None:
    lines = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/batch_loss" in line]
    assert [(line["step"], line["epoch"]) for line in steps] == [(n, pytest.approx(n / 5)) for n in range(1, 11)]
    promised = {"train/lr", "train/grad_norm", "train/samples_per_s", "train/data_wait"}
    assert all(promised <= set(line) and 0 <= line["train/data_wait"] <= 1 for line in steps)
    assert [line["step"] for line in lines if line.get("val/epoch_loss", 0) and line["val/action_mae"] > 0] == [5, 10]


def test_one_tiny_batch_is_learned_by_heart(tiny_config: ConfigFactory, tmp_path: Path) -> None:
    write_episodes(tmp_path / "data", lengths=(8,))
    config = tiny_config(
        {
            "data.train_parquet_files": str(tmp_path / "data"),
            "data.val_parquet_files": str(tmp_path / "data"),
            "data.augmentation.enabled": False,
            "data.batch_size": 8,
            "model.action_head_config.num_flow_samples": 8,
            "model.action_head_config.num_inference_timesteps": 10,
            "training.epochs": 250,
            "training.log_interval": 50,
            "training.validate_every_n_steps": 1000,
            "training.save_every_n_epochs": 1000,
            "training.ema_decay": 0.0,
            "optimizer.lr": 4e-3,
            "optimizer.weight_decay": 0.0,
            "lr_scheduler.warmup_steps": 10,
        }
    )
    trainer = train_here(config)
    actions = np.stack([trainer.data.train[n]["action"][:ACTION_DIM].numpy() for n in range(8)])
    scale = trainer.preprocessor.action.scale
    spread = np.abs((actions - actions.mean(0)) * scale).mean()  # what the best constant answer would cost
    losses = [line["train/batch_loss"] for line in read_metrics(config.run_dir) if "train/batch_loss" in line]
    assert losses[-1] < 0.1 * losses[0]
    assert read_metrics(config.run_dir)[-1]["val/action_mae"] < 0.25 * spread


def test_resume_on_other_data_is_refused_and_on_moved_data_is_not(
    session_config: ConfigFactory, checkpoint: Path, two_camera_dir: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The same for the backbone. Statistics may be gone, but not others."""
    data, statistics, backbone = (
        "data.train_parquet_files",
        "data.normalization_stats_path",
        "model.vlm_config.model_name_or_path",
    )
    moved = Path(shutil.copytree(two_camera_dir, tmp_path / "moved"))
    moved_backbone = shutil.copytree(tiny_model_dir, tmp_path / "moved_backbone")
    here = {data: str(moved), statistics: str(tmp_path / "gone.json"), backbone: str(moved_backbone)}

    def resume(key: str | None = None, value: Path | None = None) -> Trainer:
        changes = here if key is None else {**here, key: str(value)}
        config = session_config({"training.experiment_name": "moved", "optimizer.lr": 5e-3, **changes}, cameras=2)
        return Trainer(config, ALONE, checkpoint)

    assert resume().step == 10
    spec = TinySpec(image_size=32, patch_size=16, vision_layers=1, text_layers=3, width=32, heads=4, vocabulary=400)
    for path in (write_tiny_paligemma(tmp_path / "other", spec), tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match=rf"\n  {backbone}: '{tiny_model_dir}' in the checkpoint, '{path}' now"):
            resume(backbone, path)
    changed = DatasetStatistics.load(session_config().data.normalization_stats_path)
    replace(changed, action=changed.state).save(tmp_path / "other.json")
    with pytest.raises(CheckpointError, match=rf"\n  {statistics}: .*other\.json"):
        resume(statistics, tmp_path / "other.json")
    write_episodes(moved, lengths=(5,), cameras=2, seed=9)
    with pytest.raises(CheckpointError, match=rf"\n  {data}: '\w+' in the checkpoint, '\w+' now"):
        resume()


def test_resume_with_another_number_of_threads_says_so(
    session_config: ConfigFactory, trained_run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = session_config({"training.experiment_name": "trained", "optimizer.lr": 5e-3}, cameras=2)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            Trainer(config, ALONE, trained_run / "checkpoints" / "last.pth.tar")
        finally:
            torch.set_num_threads(1)
        assert ("a process of 1 threads, this one has 2" in caplog.text) == (threads == 2)


def test_forced_resume_takes_the_new_settings(tiny_config: ConfigFactory, trained_run: Path) -> None:
    resume = trained_run / "checkpoints" / "last.pth.tar"
    change = {"optimizer.lr": 7e-3, "optimizer.weight_decay": 0.5, "lr_scheduler.type": "constant", "training.epochs": 3}
    config = tiny_config({**change, "training.seed": 3}, cameras=2)
    forced = Trainer(config, ALONE, resume, force=True)
    assert forced.step == 10
    assert {group["lr"] for group in forced.optimizer.param_groups} == {7e-3}
    assert {group["weight_decay"] for group in forced.optimizer.param_groups} == {0.0, 0.5}
    before = load_checkpoint(resume)["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(forced.optimizer.state_dict()["state"][0]["exp_avg"], before)
    forced.run()
    assert load_checkpoint(config.run_dir / "checkpoints" / "last.pth.tar")["step"] == 15


def test_resume_with_more_epochs_and_other_intervals_follows_the_longer_run(
    session_config: ConfigFactory, trained_run: Path
) -> None:
    """The weights of the shorter run, then the schedule of the longer one: as if the rest had been planned so from there on."""
    more = {"training.epochs": 4, "training.log_interval": 3, "training.gradient_accumulation_steps": 2, "data.num_workers": 1}
    longer = session_config({"training.experiment_name": "longer", "optimizer.lr": 5e-3, **more}, cameras=2)
    trainer = train_here(longer, resume=trained_run / "checkpoints" / "checkpoint_epoch_1.pth.tar")
    assert (trainer.step, trainer.total_steps) == (20, 20)
    rates = {line["step"]: line["train/lr"] for line in read_metrics(longer.run_dir) if "train/lr" in line}
    assert rates.keys() == {6, 9, 12, 15, 18, 20}
    for step, rate in rates.items():
        assert rate == pytest.approx(5e-3 * trainer.scheduler.lr_lambdas[0](step - 1), rel=1e-12)


def test_memory_that_is_full_is_explained(tiny_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """S10.2."""
    trainer = Trainer(tiny_config(), ALONE)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "_train_step", fail)
    with pytest.raises(TrainingError, match=r"(?s)batch_size 16.*gradient_accumulation_steps"):
        trainer.run()


@pytest.mark.parametrize("limit", [4, 100])
def test_run_that_diverges_stops_and_leaves_no_trace_of_it(tiny_config: ConfigFactory, limit: int) -> None:
    """Also when it ends before so many steps in a row were skipped."""
    settings = {"training.validate_every_n_steps": 2, "training.save_every_n_steps": 1, "training.max_skipped_steps": limit}
    config = tiny_config({**settings, "optimizer.lr": 1e30, "lr_scheduler.warmup_steps": 0, "training.stop_after_step": 8})
    trainer = Trainer(config, ALONE)
    with pytest.raises(
        TrainingError, match=r"step (5|8): NaN or infinity .* (4|7) steps in a row .*lower optimizer\.lr \(1e\+30\)"
    ):
        trainer.run()
    text = (config.run_dir / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert {load_checkpoint(p)["step"] for p in (config.run_dir / "checkpoints").glob("*.pth.tar")} <= {1, 2}


def write_outlier(folder: Path, lengths: tuple[int, ...], number: int, row: int, factor: float) -> dict[str, Any]:
    """Episodes with one action that is `factor` times too large; settings to train on them, each sample with its own label."""
    rng = np.random.default_rng(5)
    with EpisodeWriter(folder, METADATA, episodes_per_file=1) as writer:
        for each, length in enumerate(lengths):
            episode = make_episode(rng, length, number=each)
            if each == number:
                episode.action[row] *= factor
            writer.write(episode)
    return {
        "data.train_parquet_files": str(folder),
        "data.allow_other_statistics": True,
        "data.val_fraction": 0.0,
        "model.action_head_config.horizon": 1,
    }


def warnings_with(words: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if words in record.getMessage()]


def test_step_that_is_not_finite_is_skipped_counted_and_named(
    tiny_config: ConfigFactory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Finite numbers, of which one overflows the loss."""
    common = {**write_outlier(tmp_path / "data", (20, 6, 22), 1, 3, 1e30), "data.batch_size": 8}
    config = tiny_config(common)
    trainer = train_here(config)
    assert (trainer.total_steps, trainer.monitor.skipped) == (12, 2)  # once an epoch
    skipped = warnings_with("skipped", caplog)
    assert len(skipped) == 2
    for message in skipped:
        (named,) = message.splitlines()[1:]
        assert named.startswith(f"  {tmp_path / 'data' / 'episodes-00001.parquet'}: row 3 (loss ")
    lines = read_metrics(config.run_dir)
    assert lines[-1]["train/skipped_steps"] == 2
    broken = [line["step"] for line in lines if "train/batch_loss" not in line]
    assert len(broken) == 2

    # The weights after the run are those of a run whose optimiser never saw these two batches.
    twin = Trainer(tiny_config({**common, "training.experiment_name": "twin"}), ALONE)
    twin._enter_stage()
    stream = twin._stream(12)
    for step in range(1, 13):
        if step in broken:
            next(stream)
            twin.scheduler.step()
        else:
            twin._train_step([next(stream)])
    assert identical(twin.model.state_dict(), trainer.model.state_dict())
    assert identical(twin.ema.state_dict(), trainer.ema.state_dict())

    # And a resume right after a skipped step ends where the run ended that was not stopped.
    name = {"training.experiment_name": "stopped"}
    part = tiny_config({**common, **name, "training.stop_after_step": broken[1]})
    train_here(part)
    train_here(tiny_config({**common, **name}), resume=part.run_dir / "checkpoints" / "last.pth.tar")
    got, want = (load_checkpoint(each.run_dir / "checkpoints" / "last.pth.tar") for each in (part, config))
    assert all(identical(got[key], want[key]) for key in ("state_dict", "optimizer", "ema", "watch", "lr_scheduler"))
    assert read_metrics(part.run_dir) == lines


def test_loss_spike_is_told_with_its_samples(
    tiny_config: ConfigFactory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = write_outlier(tmp_path / "data", (40,) * 5, 2, 20, 100)  # one action in 200
    train_here(tiny_config({**settings, "data.batch_size": 5}))
    spikes = warnings_with("times the median", caplog)
    assert 1 <= len(spikes) <= 2
    for message in spikes:
        assert message.splitlines()[1].startswith(f"  {tmp_path / 'data' / 'episodes-00002.parquet'}: row 20 (loss ")


def test_validation_that_does_not_fall_is_diagnosed_once_and_nan_is_never_the_best(
    tiny_config: ConfigFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """S10.2."""
    trainer = Trainer(tiny_config(), ALONE)
    assert not trainer._improved({"val/epoch_loss": float("nan")})
    assert trainer._improved({"val/epoch_loss": 1.0})
    assert not any(trainer._improved({"val/epoch_loss": 1.0}) for _ in range(7))
    (warning,) = warnings_with("has not fallen", caplog)
    assert "lower optimizer.lr" in warning


def test_stage_that_would_never_begin_is_told(tiny_config: ConfigFactory, caplog: pytest.LogCaptureFixture) -> None:
    stages = [{"train": "head", "steps": 4}, {"train": "all"}]
    Trainer(tiny_config({"training.max_steps": 5, "training.stages": stages}), ALONE)
    assert "the last stage would begin" not in caplog.text
    Trainer(tiny_config({"training.max_steps": 4, "training.stages": stages}), ALONE)
    assert "the last stage would begin after step 4, but the run ends with step 4" in caplog.text
