"""A run that is stopped, anywhere and in any way, ends as if it had not been."""

import errno
import functools
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from image_folder import TINY, write_images
from interruption import assert_same_run, resumed, stop_after

import stochca.checkpoint
import stochca.progress
from stochca.checkpoint import load_state, save_state, save_summary, save_weights, write_atomically
from stochca.config import FinetuneOptions
from stochca.progress import Interrupted, StopRequest
from stochca.train import finetune

# Everything that has a state: dropout, stochastic depth, augmentation, coins, moments, accumulation.
STATEFUL = {
    "model_kwargs": {**TINY, "proj_drop_rate": 0.1},
    "drop_path": 0.2,
    "per": "sample",
    "reprob": 0.3,
    "aa": "rand-m5",
    "grad_accum_steps": 2,
    "batch_size": 3,
}
# 18 images in batches of 3, two to a step, 3 epochs.
STEPS = 9


@pytest.fixture(scope="session")
def uninterrupted(folder, tmp_path_factory):
    """The folder of a run that was left alone, for some options."""
    done: dict[str, str] = {}

    def run(options: FinetuneOptions) -> str:
        key = repr({**vars(options), "output": ""})
        if key not in done:
            done[key] = str(tmp_path_factory.mktemp("uninterrupted") / "run")
            finetune(FinetuneOptions(**{**vars(options), "output": done[key]}))
        return done[key]

    return run


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_run_stopped_after_any_step_ends_bitwise_equal(make_options, uninterrupted, monkeypatch, step):
    options = make_options(**STATEFUL)
    expected = uninterrupted(options)
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(Interrupted, match=f"stopped by SIGTERM after step {step}; continue with"):
            finetune(options)
    assert load_state(Path(options.output) / "trainer_state.pt")["step"] == step
    torch.manual_seed(99)
    finetune(resumed(options))
    assert_same_run(options.output, expected)


def test_a_run_stopped_twice_ends_bitwise_equal_with_another_number_of_workers(
    make_options, uninterrupted, monkeypatch
):
    options = make_options(**STATEFUL)
    for step in (2, 5):
        with monkeypatch.context() as patch:
            stop_after(patch, step, signal.SIGINT)
            with pytest.raises(Interrupted, match="SIGINT"):
                finetune(options)
        options = resumed(options, workers=1)
    finetune(options)
    assert_same_run(options.output, uninterrupted(make_options(**STATEFUL)))


def test_a_run_stopped_in_an_evaluation_evaluates_first_when_resumed(
    make_options, uninterrupted, monkeypatch
):
    options = make_options(**STATEFUL)
    with monkeypatch.context() as patch:
        patch.setattr(
            "stochca.evaluation.evaluate",
            lambda *args, should_stop, **kwargs: os.kill(os.getpid(), signal.SIGTERM) or None,
        )
        with pytest.raises(Interrupted, match="after step 3"):
            finetune(options)
    finetune(resumed(options))
    assert_same_run(options.output, uninterrupted(make_options(**STATEFUL)))


def test_fp16_resumes_with_its_loss_scale(make_options, uninterrupted, monkeypatch):
    options = make_options(amp=True, amp_dtype="float16", epochs=2)
    expected = uninterrupted(options)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            finetune(options)
    assert load_state(Path(options.output) / "trainer_state.pt")["scaler"]["_growth_tracker"] > 0
    finetune(resumed(options))
    assert_same_run(options.output, expected)


class Crash(BaseException):
    """Stands for the end of the process."""


def test_a_crash_at_any_write_leaves_a_run_that_resumes_bitwise_equal(
    make_options, uninterrupted, monkeypatch, tmp_path
):
    replace = os.replace
    short = {"steps": 2, "val_steps": 1}
    expected = uninterrupted(make_options(**short))
    for crash_at in range(1, 100):
        options = make_options(**short, output=str(tmp_path / f"run{crash_at}"))
        writes = 0

        def crashing(source, target, crash_at=crash_at):
            nonlocal writes
            writes += 1
            if writes == crash_at:
                raise Crash
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(stochca.checkpoint.os, "replace", crashing)
            try:
                finetune(options)
            except Crash:
                pass
            else:
                break
        has_state = (Path(options.output) / "trainer_state.pt").exists()
        finetune(resumed(options) if has_state else options)
        assert_same_run(options.output, expected)
    # The options; the state and what follows from it after each of both steps; the summary.
    assert crash_at > 8


def test_a_finished_run_resumes_to_its_summary(make_options):
    options = make_options(epochs=1)
    summary = finetune(options)
    assert finetune(resumed(options)) == summary


def test_the_folder_of_a_run_is_refused_unless_resumed(make_options):
    options = make_options(epochs=1)
    finetune(options)
    with pytest.raises(FileExistsError, match=f"already holds a run .* --resume {options.output}"):
        finetune(options)


def test_resuming_nothing_is_refused(make_options, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing to resume: there is no .*trainer_state.pt"):
        finetune(make_options(resume=str(tmp_path)))


def test_a_resumed_run_keeps_the_options_that_decide_its_result(make_options):
    options = make_options(epochs=1)
    finetune(options)
    with pytest.raises(ValueError, match=r"--p was 0.5, is 0.2; --lr was 0.001, is 0.1"):
        finetune(resumed(options, lr=0.1, p=0.2))


def test_a_resumed_run_may_move_with_its_folder(make_options, tmp_path, uninterrupted, monkeypatch):
    options = make_options(**STATEFUL)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Interrupted):
            finetune(options)
    moved = str(tmp_path / "moved")
    shutil.move(options.output, moved)
    finetune(resumed(options, resume=moved))
    assert_same_run(moved, uninterrupted(make_options(**STATEFUL)))


def test_another_dataset_is_refused(make_options, tmp_path):
    options = make_options(epochs=1)
    finetune(options)
    smaller = write_images(tmp_path / "smaller", {"train": 5, "val": 2})
    with pytest.raises(ValueError, match="has 18 training images, the dataset now has 15"):
        finetune(resumed(options, data_dir=str(smaller)))
    other = write_images(tmp_path / "other", {"train": 6, "val": 2}, classes=("a", "b", "c"))
    with pytest.raises(ValueError, match="other classes than the run to resume"):
        finetune(resumed(options, data_dir=str(other)))


def test_another_source_is_refused(make_options, monkeypatch):
    options = make_options(epochs=1)
    finetune(options)
    monkeypatch.setattr("stochca.train.random_seed", lambda seed: torch.manual_seed(seed + 1))
    with pytest.raises(ValueError, match=r"weights .* starts from are not those of the run to resume"):
        finetune(resumed(options))


def test_a_truncated_state_is_refused(make_options):
    options = make_options(epochs=1)
    finetune(options)
    path = Path(options.output) / "trainer_state.pt"
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a complete trainer state"):
            finetune(resumed(options))


def test_a_full_disk_leaves_the_last_good_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("good")

    def write(file):
        file.write_text("half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, write)
    assert path.read_text() == "good"
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_on_a_full_disk_says_what_is_whole_and_resumes(make_options, uninterrupted, monkeypatch):
    options = make_options(**STATEFUL, recovery_interval=2)
    save, states = torch.save, []

    def full(state, file):
        states.append(state)
        if len(states) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(
            OSError, match=r"state of step 4 in .*, that of step 3 is whole: .* No space left"
        ):
            finetune(options)
    assert load_state(Path(options.output) / "trainer_state.pt")["step"] == 3
    finetune(resumed(options))
    assert_same_run(options.output, uninterrupted(make_options(**STATEFUL)))


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("trainer_state.pt", lambda path: save_state(path, {"model": {"weight": torch.zeros(10_000)}})),
        ("last.safetensors", lambda path: save_weights(path, {"weight": torch.zeros(10_000)}, {})),
        ("summary.json", lambda path: save_summary(path, {"steps": 1})),
    ],
    ids=["state", "weights", "summary"],
)
def test_a_full_disk_is_told_with_the_file_whoever_writes_to_it(tmp_path, name, save):
    (tmp_path / f".{name}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / name}'"):
        save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_for_the_weights_leaves_the_state_of_the_step(make_options, monkeypatch):
    options = make_options(epochs=1)
    with monkeypatch.context() as patch:
        full = functools.partial(os.symlink, "/dev/full", f"{options.output}/.last.safetensors.tmp")
        patch.setattr("stochca.history.History.best_step", property(lambda _: full()))
        with pytest.raises(
            OSError, match=r"weights of step 4, its state is whole: .*last.safetensors'; cont"
        ):
            finetune(options)
    assert load_state(Path(options.output) / "trainer_state.pt")["step"] == 4
    assert finetune(resumed(options))["steps"] == 4


def test_processes_that_torchrun_restarts_go_on_from_the_last_state(make_options, uninterrupted, monkeypatch):
    options = make_options(**STATEFUL)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Interrupted):
            finetune(options)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with pytest.raises(FileExistsError, match="already holds a run"):
        finetune(options)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    finetune(options)
    assert_same_run(options.output, uninterrupted(make_options(**STATEFUL)))


def test_the_same_signal_twice_within_a_second_is_one_request(monkeypatch):
    clock = iter([10.0, 10.5, 11.5])
    monkeypatch.setattr(stochca.progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    # A shell that runs the tests in the background has them ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopRequest() as stop:
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
            assert stop.signum == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_file_is_synced_before_it_gets_its_name_and_the_folder_after(tmp_path, monkeypatch):
    path = tmp_path / "file"
    done = []
    fsync, replace = os.fsync, os.replace

    def recording_fsync(descriptor):
        done.append(("synced", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def recording_replace(source, target):
        done.append(("renamed", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    write_atomically(path, lambda file: file.write_text("new"))
    file, folder = path.stat().st_ino, tmp_path.stat().st_ino
    assert done == [("synced", file), ("renamed", file), ("synced", folder)]
