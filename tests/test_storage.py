# SPDX-License-Identifier: Apache-2.0
"""Saves that are killed, that come from two processes, or go to folders with little permission."""

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from eloftr_ops import storage
from eloftr_ops.io import atomic_write
from eloftr_ops.storage import FolderInUseError, folder_lock, temporary_name, write_file
from eloftr_ops.weights import load_pretrained
from support.weights import randomise, same_weights, tiny_config, tiny_model

SUPPORT = Path(__file__).parent


def two_models():
    """Of one architecture, with other weights and another threshold, so that a mix loads without an error."""
    models = [tiny_model(tiny_config(threshold=threshold)) for threshold in (0.25, 0.75)]
    for seed, model in enumerate(models):
        randomise(model, seed)
    return models


def whole(loaded, models):
    """Weights and configuration are those of one of the models."""
    return any(same_weights(loaded, m) and loaded.config == m.config for m in models)


@pytest.mark.parametrize("layouts", [("eloftr_ops",) * 2, ("transformers",) * 2, ("transformers", "eloftr_ops")])
def test_a_save_that_stops_between_its_two_files_is_never_loaded_as_a_mix(tmp_path, monkeypatch, layouts):
    models, folder = two_models(), tmp_path / "m"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # transformers has no centred_subpixel
        models[0].save_pretrained(folder, layout=layouts[0])

        def write_weights_only(path, content):
            if path.name == "config.json":
                raise KeyboardInterrupt
            write_file(path, content)

        monkeypatch.setattr(storage, "write_file", write_weights_only)
        with pytest.raises(KeyboardInterrupt):
            models[1].save_pretrained(folder, layout=layouts[1])
    with pytest.warns(UserWarning, match="of two saves, of which one was interrupted"):
        loaded = load_pretrained(folder)
    assert same_weights(loaded, models[1])
    assert loaded.config == models[1].config


def test_an_edited_configuration_counts(tmp_path):
    model = two_models()[0]
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"threshold": 0.25', '"threshold": 0.5'))
    assert load_pretrained(tmp_path).config == model.config.replace(threshold=0.5)


SAVE_FOR_EVER = """
import sys
sys.path.insert(0, sys.argv[2])
from test_storage import two_models
models = two_models()
print("ready", flush=True)
while True:
    for model in models:
        model.save_pretrained(sys.argv[1])
"""


def saver(folder):
    command = [sys.executable, "-c", SAVE_FOR_EVER, str(folder), str(SUPPORT)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_writers_that_are_killed_leave_a_whole_model_and_nothing_else(tmp_path):
    models, folder = two_models(), tmp_path / "m"
    models[0].save_pretrained(folder)
    writers = [saver(folder), saver(folder)]
    for process in writers:
        assert process.stdout.readline() == "ready\n"
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        assert whole(load_pretrained(folder), models)
    for process in writers:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert whole(load_pretrained(folder), models)
    models[0].save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert same_weights(load_pretrained(folder), models[0])


def test_leftovers_of_a_dead_process_are_removed_and_those_of_a_living_one_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    living = temporary_name(tmp_path / "x")
    stale = tmp_path / living.name.replace(f"-{os.getpid()}-", f"-{dead.pid}-")
    elsewhere = tmp_path / f".eloftr-ops-{'0' * 8}-1-{'0' * 8}.tmp"
    for path in (living, stale, elsewhere):
        path.write_text("half")
    write_file(tmp_path / "new", b"x")
    assert not stale.exists()
    assert living.exists()
    assert elsewhere.exists()
    os.utime(elsewhere, (0, 0))
    write_file(tmp_path / "new", b"x")
    assert not elsewhere.exists()


def test_temporaries_lie_in_the_folder_itself(tmp_path, monkeypatch):
    """A folder that is a mount point, or whose parent is read-only, can be saved into."""
    folder, made = tmp_path / "m", []
    folder.mkdir()
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, to: made.append(path) or replace(path, to))
    tiny_model().save_pretrained(folder)
    assert {path.parent for path in made} == {folder}


def test_a_link_to_a_folder_and_a_link_to_nothing_yet(tmp_path):
    model = tiny_model()
    for name in ("there", "not-there"):
        target, link = tmp_path / "other" / name, tmp_path / f"link-{name}"
        link.symlink_to(target)
        if name == "there":
            target.mkdir(parents=True)
        model.save_pretrained(link)
        assert link.is_symlink()
        assert same_weights(load_pretrained(target), model)


def test_names_may_be_as_long_as_the_file_system_takes(tmp_path):
    tiny_model().save_pretrained(tmp_path / ("n" * 255))
    write_file(tmp_path / ("f" * 255), b"x")
    with atomic_write(tmp_path / ("m" * 251 + ".npz")) as file:
        file.write(b"x")
    assert sorted(len(path.name) for path in tmp_path.iterdir()) == [255, 255, 255]


def test_a_folder_is_worked_in_by_one_process(tmp_path):
    with (
        folder_lock(tmp_path / "run", "train"),
        pytest.raises(FolderInUseError, match="another process works in this folder"),
        folder_lock(tmp_path / "run", "train"),
    ):
        pytest.fail("both have the lock")
    with folder_lock(tmp_path / "run", "train"):
        assert (tmp_path / "run" / ".lock").exists()
