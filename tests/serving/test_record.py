"""`serve --record`, on a real socket: what was seen and done comes back as episodes that train, or as a log that does not."""

from __future__ import annotations

import base64
import errno
import io
import json
import time
from dataclasses import asdict

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from websockets.sync.client import connect

from observations import draw
from paligemma_vla.cli.main import main
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.data.loader import VLADataset
from paligemma_vla.data.writer import EpisodeWriter
from paligemma_vla.errors import DataError
from paligemma_vla.schema import LOG_SUFFIX
from paligemma_vla.serving import record as module
from paligemma_vla_client import ActionChunkBroker, PolicyClient, pack, unpack
from support import call


def ask(connection, message):
    connection.send(pack(message))
    reply = connection.recv()
    return reply if isinstance(reply, str) else unpack(reply)


def walk(connection, policy, steps, *, actor="policy", success=None, each=1):
    """An episode of our own client: views of `steps`, and the actions between them, `each` at a time."""
    messages = [draw(policy, seed) for seed in range(steps)]
    actions = np.random.default_rng(steps).normal(size=(steps, each, policy.metadata["action_dim"])).astype(np.float32)
    for number, message in enumerate(messages):
        told = {"record": {"executed": actions[number - 1], "actor": actor}} if number else {}
        assert "actions" in ask(connection, message | told)
    last = {"executed": actions[-1], "actor": actor} | ({} if success is None else {"success": success})
    assert ask(connection, {"endpoint": "reset", "record": last}) == "reset successful"
    return messages, actions


def rows(folder):
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def logged(folder):
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in sorted(folder.glob(f"*{LOG_SUFFIX}"))]


def test_steps_of_a_client_become_episodes_that_check_and_train_read(serve, policy, tiny_config, tmp_path, capfd):
    server, began = serve(record=tmp_path / "D"), time.time()
    with connect(server.url) as connection:
        connection.recv()
        first, done = walk(connection, policy, 5, success=True)
        walk(connection, policy, 3, actor="intervention")
    server.close()
    found = rows(tmp_path / "D")
    assert [row["is_first"] for row in found] == [True, *[False] * 4, True, *[False] * 2]
    assert [row["is_terminal"] for row in found] == [*[False] * 4, True, *[False] * 3]
    assert [(row["actor"], row["success"]) for row in found] == [("policy", True)] * 5 + [("intervention", None)] * 3
    assert began < found[0]["time"] <= found[-1]["time"] < time.time() and found[0]["time"] < found[4]["time"]
    for row, message, actions in zip(found, first, done, strict=False):
        np.testing.assert_array_equal(row["action"], actions[0])
        np.testing.assert_allclose(row["state"], message["state"], rtol=1e-6)
        assert row["prompt"] == message["prompt"]
        seen = np.asarray(Image.open(io.BytesIO(row["image_2_bytes"])), np.int16)
        assert np.abs(seen - message["image_2"]).mean() < 12  # noise, after JPEG
    assert not list((tmp_path / "D").glob(f"*{LOG_SUFFIX}"))
    assert call(capfd, "data", "check", str(tmp_path / "D"), "--exclusion_list", str(tmp_path / "none.json"))[0] == 0
    index = EpisodeIndex.build(str(tmp_path / "D"))
    assert asdict(index.layout.metadata) | {"extra": {}} == asdict(policy.robot) | {"extra": {}}
    assert index.layout.metadata.extra["fingerprint"] == server.service.contract["fingerprint"]
    data = VLADataset(str(tmp_path / "D"), policy.preprocessor, tiny_config(cameras=2))
    assert len(data) == 8


def test_one_view_for_several_actions_is_a_log_and_no_episodes(serve, policy, tmp_path, capfd, checkpoint):
    server, folder = serve(record=tmp_path / "D", seed=5), tmp_path / "D"
    with connect(server.url) as connection:  # a stock client
        connection.recv()
        message = draw(policy)
        actions = [ask(connection, message)["actions"] for _ in range(2)]
    with connect(server.url) as connection:  # ours, which executes two of each chunk
        connection.recv()
        _, done = walk(connection, policy, 3, each=2, success=False)
    server.close()
    assert rows(folder) == []
    (head, *stock), (_, *ours) = logged(folder)
    assert "no episodes" in head["what"] and head["metadata"]["robot"] == policy.robot.robot
    assert [entry.get("executed") for entry in stock] == [None, None, None] and stock[2]["episode_ends"]
    np.testing.assert_array_equal(np.float32(stock[1]["sent"]), actions[1])
    assert Image.open(io.BytesIO(base64.b64decode(stock[0]["image_1"]))).size == (50, 40)
    np.testing.assert_array_equal(np.float32([entry["executed"] for entry in ours[:3]]), done)
    assert ours[3] == {"episode_ends": True, "success": False}
    for command in (["data", "check"], ["data", "info"]):
        code, _, err = call(capfd, *command, str(folder))
        assert code == 2 and "log-00000.chunks.jsonl: a log of served chunks" in err
    with pytest.raises(DataError, match="it holds no episodes"):
        EpisodeIndex.build(str(folder / f"log-00001{LOG_SUFFIX}"))


def test_broker_shows_every_step_and_says_who_acted(serve, policy, tmp_path):
    server, done = serve(record=tmp_path / "D"), []
    with PolicyClient(server.url) as client:
        broker = ActionChunkBroker(client, execute=3, record=True)
        for episode in range(2):
            broker.reset(success=None if episode == 0 else True)
            for step in range(5):
                if step == 3:
                    done.append(np.float32([0.25, -0.25]))
                    broker.intervene(draw(policy, step), done[-1])
                else:
                    done.append(broker.step(draw(policy, step)))
        broker.reset(success=False)
        assert (
            server.service.metrics.registry.get_sample_value("paligemma_vla_latency_seconds_count", {"protocol": "openpi"}) == 4
        )
    server.close()
    found = rows(tmp_path / "D")
    np.testing.assert_array_equal(np.float32([row["action"] for row in found]), done)
    np.testing.assert_allclose(found[4]["state"], draw(policy, 4)["state"], rtol=1e-6)
    assert [row["actor"] for row in found] == [*["policy"] * 3, "intervention", "policy"] * 2
    assert [(row["is_last"], row["success"]) for row in found[4::5]] == [(True, True), (True, False)]


@pytest.mark.parametrize("execute", [None, 1, 3])
def test_vla_evals_episodes_are_recorded_whatever_is_played_of_a_chunk(serve, policy, tmp_path, execute):
    server, played = serve(record=tmp_path / "D", execute=execute), []
    with connect(server.url + "/vla-eval") as connection:

        def send(kind, payload):
            connection.send(pack({"type": kind, "payload": payload, "seq": 1, "timestamp": 0.0}, "vla-eval"))

        for number, success in enumerate((True, False)):
            send("episode_start", {"task": {}})
            for step in range(5):
                drawn = draw(policy, 5 * number + step)
                images = {"agentview": drawn["image_1"], "wrist": drawn["image_2"]}
                send("observation", {"images": images, "states": drawn["state"], "task_description": drawn["prompt"]})
                played.append((drawn["state"], unpack(connection.recv())["payload"]["actions"]))
            send("episode_end", {"metrics": {"success": success}, "steps": 5})
        send("observation", {})  # answered, so the end has arrived
        connection.recv()
    server.close()
    found = rows(tmp_path / "D")
    np.testing.assert_allclose([row["state"] for row in found], [state for state, _ in played], rtol=1e-6)
    np.testing.assert_array_equal(np.float32([row["action"] for row in found]), [action for _, action in played])
    assert [row["success"] for row in found] == [True] * 5 + [False] * 5
    assert [number for number, row in enumerate(found) if row["is_terminal"]] == [4]
    assert logged(tmp_path / "D") == []


def test_intervention_is_recorded_without_an_answer_and_what_is_missing_ends_an_episode(serve, policy, tmp_path):
    server = serve(record=tmp_path / "D")
    action = {"executed": np.float32([0.5, 0.5])}
    with connect(server.url) as connection:
        connection.recv()
        ask(connection, draw(policy, 0))
        told = action | {"actor": "intervention"}
        assert ask(connection, draw(policy, 1) | {"endpoint": "record", "record": action})["recorded"] is True
        assert ask(connection, draw(policy, 2) | {"endpoint": "record", "record": told})["recorded"] is True
        ask(connection, draw(policy, 3) | {"record": told})
        wrong = ask(connection, draw(policy, 4) | {"record": action, "prompt": ""})
        assert "empty instruction" in wrong  # nobody knows what followed view 3
        ask(connection, draw(policy, 5) | {"record": action})
        ask(connection, draw(policy, 6) | {"record": action})
        ask(connection, draw(policy, 7) | {"record": action, "prompt": "close the drawer"})
        ask(connection, draw(policy, 8) | {"record": action, "prompt": "close the drawer"})
    server.close()
    found = rows(tmp_path / "D")
    states = [draw(policy, seed)["state"] for seed in (0, 1, 2, 5, 6, 7)]
    np.testing.assert_allclose([row["state"] for row in found], states, rtol=1e-6)
    assert [row["actor"] for row in found] == ["policy", "intervention", "intervention", *["policy"] * 3]
    assert [row["is_first"] for row in found] == [True, False, False, True, False, True]
    assert logged(tmp_path / "D") == []  # nor is the last view, after which the client left without a word


def test_a_full_disk_ends_the_record_with_a_word_and_not_the_server(serve, policy, tmp_path, monkeypatch, caplog):
    server, write = serve(record=tmp_path / "D"), EpisodeWriter.write

    def full(self, episode):
        if self.episodes_written == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, episode)

    monkeypatch.setattr(EpisodeWriter, "write", full)
    with connect(server.url) as connection:
        connection.recv()
        for _ in range(3):
            walk(connection, policy, 2)
        until = time.monotonic() + 10
        while "paligemma_vla_recording 1.0" in server.service.metrics.text().decode() and time.monotonic() < until:
            time.sleep(0.01)
        walk(connection, policy, 2)
    server.close()
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [
        f"--record {tmp_path / 'D'}: recording ends after 1 episodes: [Errno 28] No space left on device; serving goes on"
    ]
    assert len(rows(tmp_path / "D")) == 2


def test_a_slow_disk_delays_no_answer_and_what_is_left_out_is_counted(serve, policy, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "QUEUED_VIEWS", 2)
    encode = module.encode_image
    monkeypatch.setattr(module, "encode_image", lambda *arguments: time.sleep(0.2) or encode(*arguments))
    server = serve(record=tmp_path / "D")
    with connect(server.url) as connection:
        connection.recv()
        began = time.monotonic()
        walk(connection, policy, 10)
        assert time.monotonic() - began < 10 * 0.4
    left_out = server.service.metrics.registry.get_sample_value("paligemma_vla_not_recorded_total")
    server.close()
    assert 0 < left_out <= 8 and "too slow; views are left out" in caplog.text
    assert len(rows(tmp_path / "D")) + 10 - left_out > 0
    with EpisodeWriter(tmp_path / "D", policy.robot) as writer:
        assert writer.episodes_written == sum(row["is_first"] for row in rows(tmp_path / "D"))


def test_record_into_a_folder_of_other_episodes_is_refused_at_the_start(serve, two_camera_dir):
    with pytest.raises(DataError, match="columns differ from the episodes already written"):
        serve(record=two_camera_dir)
    assert main(["data", "info", str(two_camera_dir)]) == 0
