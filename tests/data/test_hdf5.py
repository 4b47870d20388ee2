"""HDF5 files as LIBERO, robomimic and ALOHA write them, made with h5py from the description of each, against what is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paligemma_vla.cli.stats import write_statistics
from paligemma_vla.config import VLAConfig
from paligemma_vla.data.convert import Recording, read_episodes
from paligemma_vla.data.doctor import CheckOptions, diagnose
from paligemma_vla.data.faults import Kind
from paligemma_vla.data.images import encode_image
from paligemma_vla.data.index import EpisodeIndex, ExclusionList, expand_paths
from paligemma_vla.errors import DataError
from paligemma_vla.training.distributed import Distributed
from support import call, train_here

h5py: Any = pytest.importorskip("h5py")
ConfigFactory = Callable[..., VLAConfig]
LENGTHS = {"demo_0": 5, "demo_1": 3, "demo_2": 4, "demo_10": 6}
WORDS = "pick up the bowl and place it on the plate"
Truth = dict[str, dict[str, np.ndarray]]


def smooth(rng: np.random.Generator, length: int, height: int = 24, width: int = 32) -> np.ndarray:
    """Pictures (T, H, W, 3) whose four quarters differ, so that one that is turned is another one."""
    corners = rng.integers(0, 256, (length, 2, 2, 3), dtype=np.uint8)
    return corners.repeat(height // 2, 1).repeat(width // 2, 2)


def write_libero(path: Path, words: Any = WORDS) -> Truth:
    """One task's file: demonstrations in the order of their names, which is not that of their numbers."""
    rng, truth = np.random.default_rng(0), {}
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"problem_name": "x", "language_instruction": words})
        data.attrs["env_args"] = json.dumps({"env_name": "x", "env_kwargs": {"control_freq": 20}})
        data.attrs["num_demos"] = len(LENGTHS)
        for name in sorted(LENGTHS):
            length = LENGTHS[name]
            observed = {
                "agentview_rgb": smooth(rng, length),
                "eye_in_hand_rgb": smooth(rng, length),
                "ee_pos": rng.normal(size=(length, 3)),
                "ee_ori": rng.normal(size=(length, 3)),
                "ee_states": rng.normal(size=(length, 6)),
                "gripper_states": rng.normal(size=(length, 2)),
                "joint_states": rng.normal(size=(length, 7)),
            }
            beside = {
                "actions": rng.uniform(-1, 1, (length, 7)),
                "states": rng.normal(size=(length, 40)),
                "robot_states": rng.normal(size=(length, 9)),
                "rewards": np.eye(1, length, length - 1, dtype=np.uint8)[0],
                "dones": np.eye(1, length, length - 1, dtype=np.uint8)[0],
            }
            for key, values in {**{f"obs/{key}": values for key, values in observed.items()}, **beside}.items():
                data.create_dataset(f"{name}/{key}", data=values)
            truth[name] = observed | beside
    return {name: truth[name] for name in LENGTHS}


def write_robomimic(path: Path) -> Truth:
    rng, truth = np.random.default_rng(1), {}
    with h5py.File(path, "w") as file:
        file.create_group("data").attrs["env_args"] = json.dumps({"env_name": "Lift", "env_kwargs": {"control_freq": 20}})
        for name, length in LENGTHS.items():
            arrays = {
                "obs/agentview_image": smooth(rng, length),
                "obs/robot0_eye_in_hand_image": smooth(rng, length),
                "obs/robot0_eef_pos": rng.normal(size=(length, 3)),
                "obs/robot0_eef_quat": rng.normal(size=(length, 4)),
                "obs/robot0_gripper_qpos": rng.normal(size=(length, 2)),
                "next_obs/robot0_eef_pos": rng.normal(size=(length, 3)),
                "actions": rng.uniform(-1, 1, (length, 7)),
                "dones": np.zeros(length, np.int64),
            }
            for key, values in arrays.items():
                file["data"].create_dataset(f"{name}/{key}", data=values)
            truth[name] = arrays
        file.create_dataset("mask/train", data=np.array(["demo_1", "demo_10"], dtype="S8"))
    return truth


def write_aloha(path: Path, compressed: bool) -> dict[str, np.ndarray]:
    """One episode; compressed pictures are JPEG, filled up with zeros to the length of the longest."""
    rng, length, cameras = np.random.default_rng(2), 5, ("cam_high", "cam_left_wrist")
    arrays = {"qpos": rng.normal(size=(length, 14)), "qvel": rng.normal(size=(length, 14))}
    truth = arrays | {"action": rng.normal(size=(length, 14)), **{camera: smooth(rng, length) for camera in cameras}}
    with h5py.File(path, "w") as file:
        file.attrs["sim"], file.attrs["compress"] = False, compressed
        for name, values in arrays.items():
            file.create_dataset(f"observations/{name}", data=values)
        file.create_dataset("action", data=truth["action"])
        packed = {camera: [encode_image(one, "jpeg", 95) for one in truth[camera]] for camera in cameras}
        longest = max(len(one) for each in packed.values() for one in each)
        for camera in cameras:
            filled = np.stack([np.frombuffer(one.ljust(longest, b"\0"), np.uint8) for one in packed[camera]])
            chunk = {"chunks": (1, longest)} if compressed else {"chunks": (1, *truth[camera].shape[1:])}
            file.create_dataset(f"observations/images/{camera}", data=filled if compressed else truth[camera], **chunk)
        if compressed:
            file.create_dataset("compress_len", data=[[len(one) for one in packed[camera]] for camera in cameras])
    return truth


def read_all(name: str, cameras: int = 2, exclude: ExclusionList | None = None) -> list[Recording]:
    index = EpisodeIndex.build(name, exclude=exclude)
    return list(read_episodes(index, range(cameras), range(len(index))))


def pixels(recording: Recording, camera: int) -> np.ndarray:
    return np.stack([picture.decode() for picture in recording.pictures[camera] if picture is not None])


def test_libero_is_read_by_number_with_the_state_and_the_pictures_of_the_published_policies(tmp_path: Path) -> None:
    truth = write_libero(tmp_path / "task_demo.hdf5")
    name = f"hdf5:{tmp_path}"
    recordings = read_all(name)
    assert [one.length for one in recordings] == list(LENGTHS.values()), "demo_10 comes last"
    for one, own in zip(recordings, truth.values(), strict=True):
        state = np.concatenate([own["ee_pos"], own["ee_ori"], own["gripper_states"]], axis=1)
        assert np.array_equal(one.state, state.astype(np.float32))
        assert np.array_equal(one.action, own["actions"].astype(np.float32))
        assert np.array_equal(pixels(one, 0), own["agentview_rgb"][:, ::-1, ::-1])
        assert np.array_equal(pixels(one, 1), own["eye_in_hand_rgb"][:, ::-1, ::-1])
        assert set(one.prompts) == {WORDS} and one.is_terminal
    assert EpisodeIndex.build(name).layout.metadata.cameras == ("agentview", "wrist")


def test_what_libero_recorded_is_described_as_its_simulator_describes_itself(tmp_path: Path) -> None:
    from paligemma_vla.evaluation.envs.libero import METADATA

    write_libero(tmp_path / "task_demo.hdf5")
    assert EpisodeIndex.build(f"hdf5:{tmp_path}").layout.metadata == METADATA


@pytest.mark.parametrize("words", [list(WORDS), f'"{WORDS}"'], ids=["letters", "quoted"])
def test_an_instruction_is_read_however_it_was_stored(tmp_path: Path, words: Any) -> None:
    write_libero(tmp_path / "task_demo.hdf5", words)
    assert set(read_all(f"hdf5:{tmp_path}")[0].prompts) == {WORDS}


def test_cameras_their_turn_state_and_words_can_be_chosen(tmp_path: Path) -> None:
    truth = write_libero(tmp_path / "task_demo.hdf5")["demo_0"]
    chosen = "cameras=eye_in_hand_rgb&orientation=flipped&state=joint_states+ee_pos&prompt=take the bowl"
    name = f"hdf5:{tmp_path}/task_demo.hdf5?{chosen}"
    one = read_all(name, 1)[0]
    assert np.array_equal(pixels(one, 0), truth["eye_in_hand_rgb"][:, ::-1])
    assert np.array_equal(one.state, np.concatenate([truth["joint_states"], truth["ee_pos"]], axis=1).astype(np.float32))
    assert set(one.prompts) == {"take the bowl"}
    layout = EpisodeIndex.build(name).layout
    assert (layout.metadata.cameras, layout.state_dim, layout.metadata.state_names) == (("wrist",), 10, ())
    assert layout.metadata.image_orientation == "upright: as rendered, flipped ([::-1])"


def test_robomimic_needs_words_and_knows_filters(tmp_path: Path) -> None:
    truth = write_robomimic(tmp_path / "lift.hdf5")
    with pytest.raises(DataError, match=r"say one: \?prompt="):
        EpisodeIndex.build(f"hdf5:{tmp_path}/lift.hdf5")
    recordings = read_all(f"hdf5:{tmp_path}/*.hdf5?prompt=lift the cube&filter=train")
    assert [one.length for one in recordings] == [LENGTHS["demo_1"], LENGTHS["demo_10"]]
    own = truth["demo_10"]
    parts = [own[f"obs/robot0_{name}"] for name in ("eef_pos", "eef_quat", "gripper_qpos")]
    assert np.array_equal(recordings[1].state, np.concatenate(parts, axis=1).astype(np.float32))
    assert np.array_equal(pixels(recordings[1], 0), own["obs/agentview_image"]), "robomimic stores them upright"
    assert not recordings[0].is_terminal
    with pytest.raises(DataError, match="mask/valid, expected a filter that is there \\(train\\)"):
        EpisodeIndex.build(f"hdf5:{tmp_path}/lift.hdf5?prompt=x&filter=valid")


@pytest.mark.parametrize("compressed", [False, True], ids=["raw", "compressed"])
def test_aloha_is_an_episode_a_file(tmp_path: Path, compressed: bool) -> None:
    for number in range(2):
        truth = write_aloha(tmp_path / f"episode_{number}.hdf5", compressed)
    name = f"hdf5:{tmp_path}?prompt=open the drawer"
    recordings, layout = read_all(name), EpisodeIndex.build(name).layout
    assert [one.length for one in recordings] == [5, 5]
    assert np.array_equal(recordings[1].state, truth["qpos"].astype(np.float32))
    assert np.array_equal(recordings[1].action, truth["action"].astype(np.float32))
    shown = np.abs(pixels(recordings[1], 1).astype(int) - truth["cam_left_wrist"])
    assert shown.max() <= (80 if compressed else 0) and shown.mean() < 4, "JPEG blurs the edges"
    assert layout.metadata.cameras == ("cam_high", "cam_left_wrist")
    assert (layout.metadata.state_names[7], layout.metadata.control_hz) == ("right_waist", 50)
    picture = recordings[1].pictures[0][0]
    assert picture is not None and (picture.encoded() is not None) == compressed


def test_it_becomes_episodes_of_our_own_and_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    truth = write_libero(tmp_path / "task_demo.hdf5")
    output = tmp_path / "episodes"
    made = ("data", "convert", "--input", f"hdf5:{tmp_path}/task_demo.hdf5", "--output_dir", output, "--image_format", "png")
    status, out, err = call(capfd, *made)
    assert status == 0, err
    assert "verified" in out and "left behind: " in out and "obs/joint_states" in out
    for one, own in zip(read_all(str(output)), truth.values(), strict=True):
        assert np.array_equal(pixels(one, 1), own["eye_in_hand_rgb"][:, ::-1, ::-1])
        assert np.array_equal(one.action, own["actions"].astype(np.float32))
    assert EpisodeIndex.build(str(output)).layout.metadata.robot == "libero-panda"


def test_the_doctor_finds_the_demonstration_that_was_cut_short_and_the_rest_is_used(tmp_path: Path) -> None:
    write_libero(tmp_path / "task_demo.hdf5")
    with h5py.File(tmp_path / "task_demo.hdf5", "a") as file:
        whole = file["data/demo_1/obs/agentview_rgb"][()]
        del file["data/demo_1/obs/agentview_rgb"], file["data/demo_2/obs/ee_ori"]
        file["data/demo_1/obs/agentview_rgb"] = whole[:-1]
    name = f"hdf5:{tmp_path}"
    diagnosis = diagnose(expand_paths(name, "x"), CheckOptions(), lambda size: None)
    assert [(fault.kind, fault.row, fault.rows) for fault in diagnosis.faults] == [(Kind.GROUP, 5, 3), (Kind.GROUP, 8, 4)]
    assert "got 2 pictures of 3 steps" in str(diagnosis.faults[0])
    exclude = ExclusionList(str(tmp_path / "list.json"), diagnosis.excluded)
    assert [one.length for one in read_all(name, exclude=exclude)] == [LENGTHS["demo_0"], LENGTHS["demo_10"]]


def test_a_run_trains_from_it(tmp_path: Path, tiny_config: ConfigFactory) -> None:
    write_libero(tmp_path / "task_demo.hdf5")
    changes = {
        "data.train_parquet_files": f"hdf5:{tmp_path}/task_demo.hdf5",
        "data.normalization_stats_path": str(tmp_path / "stats.json"),
        "data.state_dim": 8,
        "data.batch_size": 4,
        "data.num_workers": 1,
        "model.action_head_config.per_action_dim": 7,
        "training.max_steps": 2,
    }
    config = tiny_config(changes, cameras=2)
    write_statistics(lambda: config, config.data.normalization_stats_path, Distributed(0, 1, torch.device("cpu")))
    assert train_here(config).step == 2


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("?cameras=front", "got no camera front, expected of agentview, wrist"),
        ("?orientation=left", "got left, expected one of stored, flipped, rotated"),
        ("?camera=wrist", "got 'camera=wrist', expected PATH"),
        ("?action=acts", r"got shape \(\) of data/demo_0/acts, expected \(steps, numbers\); there are"),
        ("?state=pose", "data/demo_0/obs/pose: got none, expected a dataset"),
    ],
)
def test_a_choice_that_is_not_there_is_named(tmp_path: Path, choice: str, message: str) -> None:
    write_libero(tmp_path / "task_demo.hdf5")
    with pytest.raises(DataError, match=message):
        EpisodeIndex.build(f"hdf5:{tmp_path}/task_demo.hdf5{choice}")


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.hdf5").write_bytes(b"no such file" * 100)
    with pytest.raises(DataError, match=r"a\.hdf5: cannot be read as HDF5 .*restore it"):
        EpisodeIndex.build(f"hdf5:{tmp_path}")
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file.create_group("other")
    with pytest.raises(DataError, match=r"got other, expected data/demo_N"):
        EpisodeIndex.build(f"hdf5:{tmp_path}")
    with pytest.raises(DataError, match=r"no file \.hdf5 or \.h5 there"):
        EpisodeIndex.build(f"hdf5:{tmp_path / 'none'}")
