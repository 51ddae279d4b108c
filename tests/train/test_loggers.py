"""What TensorBoard and Weights & Biases get of a run, read from the files that they write."""

import json
import struct
import sys
import time
from pathlib import Path

import pytest
from interruption import read_metrics, resumed, stop_after

from stochca.progress import Interrupted
from stochca.train import Trainer, finetune


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Weights & Biases without a network, and with nothing of this machine."""
    import wandb

    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in {"MODE": "offline", "SILENT": "true", "DISABLE_GIT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    yield wandb
    wandb.teardown()


def records_of(path):
    """The records of a file of W&B: a log of LevelDB, in whose blocks each may lie in several parts."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data.startswith(b":W&B")
    position, message, block, header = 7, b"", 2**15, 7
    whole, last = 1, 4
    while position + header <= len(data):
        if block - position % block < header:
            position += block - position % block
        _, size, kind = struct.unpack_from("<IHB", data, position)
        position += header
        message += data[position : position + size]
        position += size
        if kind in (whole, last):
            yield Record.FromString(message)
            message = b""


def logged_by(output):
    """For each time that a run was started, its id, its configuration and the rows that it logged."""
    started = []
    for path in sorted(Path(output).glob("wandb/offline-run-*/*.wandb")):
        rows = []
        for record in records_of(path):
            if record.HasField("run"):
                run = record.run
            elif record.HasField("history"):
                items = {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                assert record.history.step.num == items["step"]
                rows.append({name: value for name, value in items.items() if not name.startswith("_")})
        config = {update.key: json.loads(update.value_json) for update in run.config.update}
        started.append((run, config, rows))
    return started


@pytest.mark.usefixtures("offline")
def test_wandb_gets_the_options_and_every_evaluation(make_options):
    options = make_options(log_wandb=True, wandb_project="birds", losses=["l2_sp"])
    finetune(options)
    ((run, config, rows),) = logged_by(options.output)
    assert (run.project, run.display_name) == ("birds", "run")
    assert {name: config[name] for name in vars(options)} == vars(options)
    assert rows == read_metrics(options.output)
    assert len(rows) == 3
    assert "train_l2_sp" in rows[0]


@pytest.mark.usefixtures("offline")
def test_a_resumed_run_goes_on_in_the_same_run_of_wandb(make_options, monkeypatch, tmp_path):
    options = make_options(log_wandb=True)
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        with pytest.raises(Interrupted):
            finetune(options)
    time.sleep(1.1)  # W&B names folders by the second
    moved = tmp_path / "moved"
    Path(options.output).rename(moved)
    options.output = str(moved)
    finetune(resumed(options))
    (first, _, rows), (second, _, more) = logged_by(moved)
    assert first.run_id == second.run_id
    assert [row["step"] for row in rows] == [4]
    assert [row["step"] for row in more] == [8, 12]
    assert rows + more == read_metrics(moved)
    assert first.project == "stochca"


@pytest.mark.usefixtures("offline")
def test_another_run_in_the_same_folder_is_another_run_of_wandb(make_options):
    options = make_options(log_wandb=True, epochs=1)
    ids = []
    for _ in range(2):
        finetune(options)
        ids.append((Path(options.output) / "wandb_id.txt").read_text())
        for file in Path(options.output).glob("*.*"):
            if file.name != "wandb_id.txt":
                file.unlink()
    assert ids[0] != ids[1]


def test_what_wandb_refuses_is_one_line(make_options, offline, monkeypatch):
    def refuse(**_):
        raise offline.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(offline, "init", refuse)
    with pytest.raises(ValueError, match=r"^--log-wandb: No API key configured\. Use `wandb login`"):
        finetune(make_options(log_wandb=True))


def test_missing_wandb_is_said(make_options, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"^--log-wandb needs .* pip install stochca\[wandb\]"):
        finetune(make_options(log_wandb=True))


def test_tensorboard_of_a_resumed_run_has_each_evaluation_once(make_options, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = make_options(log_tensorboard=True, losses=["l2_sp"])
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Interrupted):
            finetune(options)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save", lambda self: None)  # as a crash after it was logged
        stop_after(patch, 9)
        with pytest.raises(Interrupted):
            finetune(resumed(options))
    finetune(resumed(options))
    events = EventAccumulator(f"{options.output}/tensorboard")
    events.Reload()
    rows = read_metrics(options.output)
    assert set(events.Tags()["scalars"]) == set(rows[0])
    for name in rows[0]:
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert logged == [(row["step"], pytest.approx(row[name])) for row in rows], name
