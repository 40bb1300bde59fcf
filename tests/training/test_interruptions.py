# SPDX-License-Identifier: Apache-2.0
"""Signals, kills and damaged side files: a run saves what it can, and goes on from what is there."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from eloftr_ops.cli import app
from eloftr_ops.storage import FolderInUseError, folder_lock
from eloftr_ops.training import loop
from eloftr_ops.training.checkpoints import load_checkpoint
from eloftr_ops.training.config_file import config_to_dict
from eloftr_ops.training.loop import train
from eloftr_ops.training.trainer import Trainer
from support.training_runs import losses, short

LONG = {"checkpoint_every": 1000}


def signals_in_step(monkeypatch: pytest.MonkeyPatch, number: int, step: int, times: int = 1) -> None:
    take_step = Trainer.take_step

    def interrupted(trainer, parts):
        if trainer.step + 1 == step:
            for _ in range(times):
                signal.raise_signal(number)
        return take_step(trainer, parts)

    monkeypatch.setattr(Trainer, "take_step", interrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(tmp_path, monkeypatch, capfd, number):
    before = signal.getsignal(number)
    with monkeypatch.context() as context:
        signals_in_step(context, number, 3)
        stopped = train(short(tmp_path / "cut", run=LONG))
    assert (stopped.step, stopped.finished, stopped.signal) == (3, False, number)
    assert signal.getsignal(number) is before
    assert "stops and saves after this step" in capfd.readouterr().err
    assert load_checkpoint(tmp_path / "cut" / "checkpoints")[0] == 3
    train(short(tmp_path / "cut", run=LONG))
    train(short(tmp_path / "whole", run=LONG))
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_a_second_signal_stops_at_once(tmp_path, monkeypatch):
    signals_in_step(monkeypatch, signal.SIGINT, 2, times=2)
    with pytest.raises(KeyboardInterrupt):
        train(short(tmp_path, run=LONG))
    with folder_lock(tmp_path, "train"):
        pass  # the run has given the folder back


def test_a_run_outside_of_the_main_thread_leaves_signals_alone(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(short(tmp_path, run={"steps": 1}))))
    thread.start()
    thread.join()
    assert results[0].finished


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_says_so_in_one_line_and_in_its_exit_code(tmp_path, monkeypatch, number, code):
    signals_in_step(monkeypatch, number, 2)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config_to_dict(short(tmp_path / "run", run=LONG))))
    result = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml")])
    assert result.exit_code == code
    assert "step 2 of 6: interrupted, stopped and saved; run the same command to go on" in result.output


def test_ctrl_c_reaches_the_workers_too_and_the_run_saves_all_the_same(tmp_path):
    config = config_to_dict(short(tmp_path / "run", run={**LONG, "steps": 100_000}, data={"workers": 1}))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-c", "from eloftr_ops.cli import app; app()", "train", "run.yaml"]
    process = subprocess.Popen(
        [*command, "--threads", "1"],
        cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    for line in process.stderr:
        if line.startswith("step 2 "):
            break
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    step = load_checkpoint(tmp_path / "run" / "checkpoints")[0]
    assert f"step {step} of 100000: interrupted" in output


def test_a_checkpoint_is_due_by_time_before_it_is_by_steps(tmp_path):
    seconds = iter(range(0, 100_000, 10))
    config = short(tmp_path, run={**LONG, "checkpoint_seconds": 60.0})
    train(config, until=5, clock=lambda: float(next(seconds)))
    assert 1 <= load_checkpoint(tmp_path / "checkpoints")[0] < 5


def test_the_start_says_what_there_is_to_train_on_and_how_far_it_goes(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("eloftr_ops.training.report._FIRST_PACE", 0.0)
    train(short(tmp_path, run={"steps": 3, "log_every": 100}))
    lines = capfd.readouterr().err.splitlines()
    start = next(line for line in lines if line.startswith("training in"))
    assert str(tmp_path) in start
    assert "steps 0 to 3" in start
    assert "0 images for training, 0 for validation, 2 textures drawn by chance" in start
    assert any("step 1 of 3" in line and "s a step" in line and line.endswith("left") for line in lines)


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\x00", b"run: {folder: x, of_another_version: 1}\n", b"- 1\n"])
def test_a_damaged_side_file_does_not_end_a_run(tmp_path, capfd, damage):
    train(short(tmp_path), until=4)
    (tmp_path / "training.yaml").write_bytes(damage)
    with (tmp_path / "log.jsonl").open("ab") as log:
        log.write(b"\xff\xfe half a line")
    assert train(short(tmp_path)).finished
    assert "going on from step 4; the earlier configuration is replaced" in capfd.readouterr().err
    assert len(losses(tmp_path)) == 2 * 6


def test_a_kill_while_the_configuration_is_written_leaves_the_old_one(tmp_path, monkeypatch):
    train(short(tmp_path), until=2)
    before = (tmp_path / "training.yaml").read_bytes()

    def killed(path: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            train(short(tmp_path, run={"steps": 7}))
    assert (tmp_path / "training.yaml").read_bytes() == before


def test_two_runs_in_one_folder(tmp_path):
    with folder_lock(tmp_path, "train"), pytest.raises(FolderInUseError, match="or train in another folder"):
        loop.train(short(tmp_path))


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config_to_dict(short(tmp_path / "file" / "run"))))
    result = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml")])
    assert result.exit_code == 2
    assert "Not a directory" in result.output
    assert "Traceback" not in result.output
