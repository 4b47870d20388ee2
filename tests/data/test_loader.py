"""Items and batches against rows read naively with pyarrow."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from paligemma_vla import flow
from paligemma_vla.config import VLAConfig
from paligemma_vla.data.formats import parquet
from paligemma_vla.data.loader import Collator, VLADataset, _stack, build_preprocessor, load_batches
from paligemma_vla.data.order import RunSampler, SampleOrder, SampleRef
from paligemma_vla.errors import DataError
from paligemma_vla.normalization import DatasetStatistics
from paligemma_vla.preprocess import Preprocessor
from paligemma_vla.seeding import derive_seed
from support import ACTION_DIM, HORIZON, STATE_DIM, identical, read_rows, write_episodes

ConfigFactory = Callable[..., VLAConfig]


def make(config: VLAConfig, preprocessor: Preprocessor, path: Path | None = None, training: bool = False) -> VLADataset:
    return VLADataset(str(path or config.data.train_parquet_files), preprocessor, config, training)


def naive_chunk(rows: list[dict[str, Any]], number: int) -> tuple[list[list[float]], list[bool]]:
    """action[t : t + K] within the episode; past its end the last action again, and False."""
    actions, valid = [], []
    for ahead in range(HORIZON):
        there = number + ahead
        inside = there < len(rows) and rows[there]["episode"] == rows[number]["episode"]
        actions.append(rows[there]["action"] if inside else actions[-1])
        valid.append(inside)
    return actions, valid


def min_max(values: Any, statistics: Any) -> np.ndarray:
    low, high = statistics.min, statistics.max
    return 2 * (np.asarray(values) - low) / (high - low) - 1


def test_items_equal_rows_read_naively(two_camera_dataset: VLADataset, two_camera_dir: Path, statistics_path: Path) -> None:
    rows = read_rows(two_camera_dir)
    statistics = DatasetStatistics.load(statistics_path)
    spec = two_camera_dataset.preprocessor.image
    assert len(two_camera_dataset) == len(rows)
    present, masked = 0, 0
    for number, row in enumerate(rows):
        item = two_camera_dataset[number]
        actions, valid = naive_chunk(rows, number)
        np.testing.assert_allclose(item["state"], min_max(row["state"], statistics.state), atol=1e-5)
        np.testing.assert_allclose(item["action"].view(HORIZON, ACTION_DIM), min_max(actions, statistics.action), atol=1e-5)
        assert item["action_mask"].tolist() == [[step] * ACTION_DIM for step in valid]
        for camera in (1, 2):
            image = row[f"image_{camera}_bytes"]
            assert bool(item["image_mask"][camera - 1]) is (image is not None)
            if image is not None:
                resized = Image.open(io.BytesIO(image)).resize((spec.size, spec.size), Image.Resampling.BICUBIC)
                difference = item[f"image_{camera}"].permute(1, 2, 0).numpy() - np.asarray(resized, int)
                assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 0.01
        assert item["raw_prompt_text"] == row["prompt"]
        assert item["position"] == number
        assert two_camera_dataset.locate(number) == (row["episode"], row["step"])
        present, masked = present + int(item["image_mask"][1]), masked + valid.count(False)
    assert 0 < present < len(rows)  # the test data does hold both cases
    assert masked > 0
    with pytest.raises(IndexError):
        two_camera_dataset[len(rows)]


def test_item_shapes_and_types_are_the_promised_ones(dataset: VLADataset) -> None:
    item = dataset[3]
    shapes = {name: tuple(value.shape) for name, value in item.items() if isinstance(value, torch.Tensor)}
    tokens = shapes.pop("input_ids")
    assert shapes.pop("vlm_attention_mask") == tokens
    assert shapes == {
        "image_1": (3, 32, 32),
        "image_mask": (1,),
        "state": (STATE_DIM,),
        "action": (HORIZON * ACTION_DIM,),
        "action_mask": (HORIZON, ACTION_DIM),
        "flow_time": (2,),
        "flow_noise": (2, HORIZON, ACTION_DIM),
    }
    assert item["image_1"].dtype == torch.uint8
    assert item["state"].dtype == item["action"].dtype == item["flow_noise"].dtype == torch.float32
    assert item["action_mask"].dtype == item["image_mask"].dtype == item["vlm_attention_mask"].dtype == torch.bool


def test_flow_draws_are_a_function_of_seed_stream_and_position(dataset: VLADataset, tiny_config: ConfigFactory) -> None:
    item = dataset[SampleRef(position=77, sample=5)]
    generator = torch.Generator().manual_seed(derive_seed(0, "validation flow", 77))
    assert torch.equal(item["flow_time"], flow.draw_time((2,), generator))
    assert torch.equal(item["flow_noise"], flow.draw_noise((2, HORIZON, ACTION_DIM), generator))
    assert torch.equal(dataset[SampleRef(77, 9)]["flow_noise"], item["flow_noise"])
    assert not torch.equal(dataset[SampleRef(78, 5)]["flow_noise"], item["flow_noise"])
    other_seed = make(tiny_config({"training.seed": 1}), dataset.preprocessor)
    assert not torch.equal(other_seed[SampleRef(77, 5)]["flow_noise"], item["flow_noise"])
    training = make(tiny_config(), dataset.preprocessor, training=True)
    assert not torch.equal(training[SampleRef(77, 5)]["flow_noise"], item["flow_noise"])


def test_augmentation_is_a_function_of_the_position_and_off_in_evaluation(
    dataset: VLADataset, tiny_config: ConfigFactory
) -> None:
    training = make(tiny_config(), dataset.preprocessor, training=True)
    plain = dataset[SampleRef(50, 8)]["image_1"]
    first = training[SampleRef(50, 8)]["image_1"]
    assert torch.equal(first, training[SampleRef(50, 8)]["image_1"])
    assert not torch.equal(first, training[SampleRef(51, 8)]["image_1"])
    assert not torch.equal(first, plain)
    assert torch.equal(dataset[SampleRef(51, 8)]["image_1"], plain)
    off = make(tiny_config({"data.augmentation.enabled": False}), dataset.preprocessor, training=True)
    assert torch.equal(off[SampleRef(50, 8)]["image_1"], plain)
    gentle = {f"data.augmentation.{name}": 0.0 for name in ("brightness", "contrast", "saturation")}
    nothing = make(tiny_config({**gentle, "data.augmentation.crop_scale": 1.0}), dataset.preprocessor, training=True)
    assert torch.equal(nothing[SampleRef(50, 8)]["image_1"], plain)


@pytest.mark.parametrize("window", [1, 5])
def test_only_frames_that_the_model_uses_are_decoded(
    two_camera_dataset: VLADataset, tiny_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    decoded: list[Any] = []
    original = parquet.decode

    def counting(data: Any, side: int) -> np.ndarray:
        decoded.append(data)
        return original(data, side)

    monkeypatch.setattr(parquet, "decode", counting)
    dataset = make(tiny_config({"data.max_seq_len": window}, cameras=2), two_camera_dataset.preprocessor)
    for number in range(20):
        decoded.clear()
        item = dataset[number]
        assert len(decoded) == int(item["image_mask"].sum())
        assert item["image_1"].shape == (3, 32, 32)


def test_second_camera_of_the_data_is_not_even_read_when_unused(
    two_camera_dir: Path, dataset: VLADataset, tiny_config: ConfigFactory
) -> None:
    one = make(tiny_config(), dataset.preprocessor, two_camera_dir)
    assert "image_2" not in one[0]
    assert one[0]["image_mask"].tolist() == [True]
    assert len(one.reader.group_of(0, 0)[0].images) == 1


def test_batch_is_its_items_with_prompts_laid_out_together(two_camera_dataset: VLADataset) -> None:
    items = [two_camera_dataset[n] for n in (0, 7, 9, 20)]
    batch = Collator(two_camera_dataset.preprocessor.prompts)(items)
    assert isinstance(batch, dict)
    for name in ("image_1", "image_2", "image_mask", "state", "action", "action_mask", "flow_time", "flow_noise"):
        assert torch.equal(batch[name], torch.stack([item[name] for item in items])), name
    assert batch["position"].tolist() == [0, 7, 9, 20]
    assert batch["raw_prompt_text"] == [item["raw_prompt_text"] for item in items]
    for row, item in enumerate(items):
        real = batch["input_ids"][row][batch["vlm_attention_mask"][row]]
        assert real.tolist() == item["input_ids"][item["vlm_attention_mask"]].tolist()


def test_workers_prefetch_and_where_a_run_goes_on_change_no_batch(
    tiny_config: ConfigFactory, two_camera_dataset: VLADataset
) -> None:
    order = SampleOrder([len(two_camera_dataset)], None, 16, seed=0)

    def read(start: int, **loading: int) -> list[dict[str, Any]]:
        config = tiny_config({f"data.{key}": value for key, value in loading.items()}, cameras=2)
        data = make(config, two_camera_dataset.preprocessor, training=True)
        return list(load_batches(data, RunSampler(order, start, 9, 0, 1, 2), config, pin_memory=False))

    expected = read(3, num_workers=0)
    assert len(expected) == 12
    for start, loading in [
        (3, {"num_workers": 1, "prefetch_factor": 4}),
        (3, {"num_workers": 2, "cache_mb": 0}),
        (5, {"num_workers": 4, "prefetch_factor": 1}),
        (8, {"num_workers": 0, "cache_mb": 0}),
    ]:
        got = read(start, **loading)
        assert identical(got, expected[2 * (start - 3) :])


def test_batch_that_finds_no_shared_memory_is_the_same(
    two_camera_dataset: VLADataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    collator = Collator(two_camera_dataset.preprocessor.prompts)
    items = [two_camera_dataset[n] for n in (0, 7, 9, 20)]
    expected, shared = collator(items), []

    def share(tensor: torch.Tensor) -> None:
        shared.append(tensor)
        if len(shared) == 3:
            raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr("paligemma_vla.data.loader.get_worker_info", lambda: True)
    monkeypatch.setattr(torch.Tensor, "share_memory_", share)
    sent = pickle.loads(pickle.dumps(_stack(items)))  # noqa: S301 - as through a pipe
    assert not any(isinstance(value, torch.Tensor) for value in sent.values())
    for _ in range(2):
        assert identical(collator.join([sent]), expected)
    assert [record.message.partition(";")[0] for record in caplog.records] == [
        "data.num_workers: the batches that loader processes prepare do not fit into /dev/shm"
    ]


class Unsendable(VLADataset):
    def __getitem__(self, ref: int | SampleRef) -> Any:
        return {**super().__getitem__(ref), "raw_prompt_text": lambda: None}


def test_worker_that_cannot_hand_over_its_batch_ends(
    tiny_config: ConfigFactory, dataset: VLADataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the trainer would wait for that batch for ever."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    config = tiny_config({"data.num_workers": 1})
    data = Unsendable(config.data.train_parquet_files, dataset.preprocessor, config)
    with pytest.raises(RuntimeError, match=r"DataLoader worker .* exited unexpectedly"):
        next(load_batches(data, [[SampleRef(0, 0)]], config, pin_memory=False))


def change(folder: Path, name: str, values: dict[int, Any]) -> Path:
    """Replace values of some rows of a folder's first file; returns its path."""
    path = sorted(folder.glob("*.parquet"))[0]
    table = pq.read_table(path)
    column = [values.get(row, value) for row, value in enumerate(table[name].to_pylist())]
    position = table.schema.get_field_index(name)
    pq.write_table(table.set_column(position, name, pa.array(column, table[name].type)), path, row_group_size=5)
    return path


@pytest.mark.parametrize("workers", [0, 1])
def test_error_in_a_worker_arrives_as_it_was_raised(
    tmp_path: Path, tiny_config: ConfigFactory, dataset: VLADataset, workers: int
) -> None:
    write_episodes(tmp_path / "data")
    path = change(tmp_path / "data", "image_1_bytes", {11: b"\xff\xd8\xff broken"})
    config = tiny_config({"data.num_workers": workers})
    data = make(config, dataset.preprocessor, tmp_path / "data")
    assert len(data) == len(dataset)  # corrupt image bytes do not disturb indexing
    stream = load_batches(data, [[SampleRef(n, n)] for n in (0, 10, 11, 12)], config, pin_memory=False)
    assert [next(stream)["position"].tolist() for _ in range(2)] == [[0], [10]]
    with pytest.raises(DataError) as caught:
        next(stream)
    assert str(caught.value).startswith(f"{path}: row 11, column image_1_bytes: cannot be decoded as JPEG or PNG")
    assert "Traceback" not in str(caught.value)
    assert not active_children()  # although the traceback is still there
    assert caught.value.__cause__ is None or workers == 0


def test_missing_main_image_and_bad_prompts_name_the_row(
    tmp_path: Path, tiny_config: ConfigFactory, dataset: VLADataset
) -> None:
    write_episodes(tmp_path / "data")
    change(tmp_path / "data", "image_1_bytes", {4: None})
    change(tmp_path / "data", "prompt", {2: None, 3: "word " * 200})
    data = make(tiny_config(), dataset.preprocessor, tmp_path / "data")
    for row, message in [(4, "image_1_bytes: got null"), (2, "prompt: got null"), (3, "prompt: .*prompt_max_len")]:
        with pytest.raises(DataError, match=f"row {row}, column {message}"):
            data[row]


def test_data_that_does_not_fit_the_configuration_names_every_key(
    tiny_config: ConfigFactory, dataset: VLADataset, tmp_path: Path
) -> None:
    statistics = DatasetStatistics.load(tiny_config().data.normalization_stats_path)
    swapped = DatasetStatistics(statistics.action, statistics.state)
    preprocessor = Preprocessor(dataset.preprocessor.prompts, dataset.preprocessor.image, swapped, "min_max")
    config = tiny_config({"data.state_dim": 5, "model.action_head_config.per_action_dim": 1, "model.vlm_config.num_cameras": 2})
    with pytest.raises(DataError) as caught:
        make(config, preprocessor)
    faults = [line.strip().partition(":")[0] for line in str(caught.value).splitlines()[1:]]
    assert faults == [
        "data.state_dim",
        "model.action_head_config.per_action_dim",
        "model.vlm_config",
        "data.normalization_stats_path",
        "data.normalization_stats_path",
    ]


def test_narrower_actions_are_padded_and_masked_when_asked_for(tiny_config: ConfigFactory, dataset: VLADataset) -> None:
    wider = {"model.action_head_config.per_action_dim": ACTION_DIM + 3}
    with pytest.raises(DataError, match="per_action_dim: got 5, expected 2"):
        make(tiny_config(wider), dataset.preprocessor)
    padded = make(tiny_config({**wider, "data.pad_action_dim": True}), dataset.preprocessor)
    for number in (0, 4, 5, 8):
        item, plain = padded[number], dataset[number]
        action, mask = item["action"].view(HORIZON, ACTION_DIM + 3), item["action_mask"]
        assert torch.equal(action[:, :ACTION_DIM].flatten(), plain["action"])
        assert (action[:, ACTION_DIM:] == 0).all()
        assert torch.equal(mask[:, :ACTION_DIM], plain["action_mask"])
        assert not mask[:, ACTION_DIM:].any()


def test_processor_may_be_a_folder(tiny_config: ConfigFactory, tiny_model_dir: Path, dataset: VLADataset) -> None:
    config = tiny_config({"model.vlm_config.model_name_or_path": "somewhere/else"})
    built = VLADataset(config.data.train_parquet_files, str(tiny_model_dir), config)
    assert identical(dict(built[5]), dict(dataset[5]))
    assert build_preprocessor(tiny_config()).to_dict() == built.preprocessor.to_dict()


def test_prefixes_are_drawn_for_training_alone_and_leave_the_other_draws_as_they_are(
    session_config: ConfigFactory, preprocessor: Preprocessor
) -> None:
    draws = {"model.action_head_config.num_flow_samples": 8}
    plain = make(session_config(draws, cameras=2), preprocessor, training=True)
    config = session_config({"training.rtc_max_delay": 3, **draws}, cameras=2)
    given = make(config, preprocessor, training=True)
    drawn = []
    for number in range(len(given)):
        item, without = given[number], plain[number]
        assert item.keys() - without.keys() == {"flow_prefix"}
        assert all(identical(item[key], without[key]) for key in without)
        assert torch.equal(item["flow_prefix"], given[number]["flow_prefix"])
        drawn.append(item["flow_prefix"])
    counts = torch.stack(drawn).flatten().bincount()
    shares = counts / counts.sum()
    torch.testing.assert_close(shares, torch.tensor([1 / 2, 1 / 6, 1 / 6, 1 / 6]), atol=0.06, rtol=0)
    batch = Collator(preprocessor.prompts)([given[0], given[1]])
    assert batch["flow_prefix"].shape == (2, 8)
    assert "flow_prefix" not in make(config, preprocessor)[0]
