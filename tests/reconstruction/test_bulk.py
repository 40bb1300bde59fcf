# SPDX-License-Identifier: Apache-2.0
"""Many pairs into one file: the same matches as one by one, kills, broken files, and hloc's layout."""

import itertools
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import filelock
import h5py
import numpy as np
import pytest
import torch

from eloftr_ops.errors import FileError
from eloftr_ops.images import read_image
from eloftr_ops.matching import load_matcher, match_loaded
from eloftr_ops.reconstruction.bulk import PairChoice, match_pairs
from eloftr_ops.reconstruction.engine import LocalEngine, MatchSettings, Outcome, PairWorker
from eloftr_ops.reconstruction.journal import Journal, PairMatches, SettingsError
from eloftr_ops.reconstruction.match_file import MatchFile, write_match_file
from support.models import random_images, tiny_model
from support.pair_files import save_image

COUNT = 5


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("weights")
    tiny_model(border_removal=0).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five parts of one picture, one of another size and one larger than it is matched."""
    images = tmp_path / "images"
    picture = random_images(1, 200, 200)[0, 0]
    sizes = [(64, 96), (64, 96), (64, 96), (96, 64), (128, 192)]
    for number, (height, width) in enumerate(sizes):
        save_image(images / f"{number}.png", picture[8 * number :, 4 * number :][:height, :width])
    return images


@pytest.fixture
def settings(weights: str) -> MatchSettings:
    return MatchSettings(weights, resize=96, batch=2)


def match(folder: Path, output: Path, settings: MatchSettings, **options: object) -> int:
    return match_pairs(PairChoice(folder), output, settings, devices="cpu", **options).matched  # type: ignore[arg-type]


def test_the_matches_are_those_of_the_pairs_one_by_one(folder: Path, tmp_path: Path, settings: MatchSettings) -> None:
    report = match_pairs(PairChoice(folder), tmp_path / "m.h5", settings, devices="cpu", npz=tmp_path / "npz")
    assert (report.matched, report.reused, report.refused) == (10, 0, [])
    matcher = load_matcher(settings.weights, "cpu")
    with MatchFile(report.output) as file:
        assert file.pairs() == [(f"{i}.png", f"{j}.png") for i, j in itertools.combinations(range(COUNT), 2)]
        for pair in (("0.png", "1.png"), ("1.png", "4.png"), ("3.png", "4.png")):
            found = file.read(pair)
            alone = match_loaded(matcher, *(read_image(folder / name, resize=96) for name in pair))
            assert len(found.confidence) == len(alone) > 0
            # Stored half a pixel off, in float32: half a unit in the last place of 192.
            np.testing.assert_allclose(found.keypoints0, alone.keypoints0.numpy(), atol=2e-5)
            np.testing.assert_allclose(found.keypoints1, alone.keypoints1.numpy(), atol=2e-5)
            assert found.confidence.tolist() == alone.confidence.tolist()
            saved = np.load(tmp_path / "npz" / f"{pair[0]}__{pair[1]}.npz")
            np.testing.assert_array_equal(saved["keypoints1"], alone.keypoints1.numpy())
        assert found.size1_wh == (184, 128)


def test_the_file_is_in_hlocs_layout_and_frame(folder: Path, tmp_path: Path, settings: MatchSettings) -> None:
    match(folder, tmp_path / "m.h5", settings)
    with h5py.File(tmp_path / "m.h5") as raw, MatchFile(tmp_path / "m.h5") as file:
        group = raw["0.png/1.png"]
        assert set(group) == {"keypoints0", "keypoints1", "scores"}
        ours = file.read(("0.png", "1.png"))
        # hloc adds 0.5 to what is in the file and has COLMAP's frame, which is ours.
        np.testing.assert_allclose(group["keypoints0"][()] + 0.5, ours.keypoints0, atol=1e-5)
        assert raw.attrs["pixel_centers"] == 0.0


def test_features_are_made_once_per_image_within_the_memory(folder: Path, settings: MatchSettings) -> None:
    worker = PairWorker(load_matcher(settings.weights, "cpu"), folder, settings)
    pairs = [(f"{i}.png", f"{j}.png") for i, j in itertools.combinations(range(COUNT), 2)]
    assert len(list(worker.match(pairs))) == 10
    assert worker.store.extracted == COUNT
    worker.close()
    small = MatchSettings(settings.weights, resize=96, memory=1)
    worker = PairWorker(load_matcher(settings.weights, "cpu"), folder, small)
    assert len(list(worker.match(pairs))) == 10
    assert len(worker.store._kept) == 2  # a pair is always kept
    worker.close()


def test_two_workers_match_every_pair_once(folder: Path, settings: MatchSettings) -> None:
    engine = LocalEngine(folder, settings, [torch.device("cpu")] * 2)
    pairs = [(f"{i}.png", f"{j}.png") for i, j in itertools.combinations(range(COUNT), 2)]
    assert sorted(outcome.pair for outcome in engine.run(pairs)) == pairs


def test_broken_images_are_listed_and_tried_again(folder: Path, tmp_path: Path, settings: MatchSettings) -> None:
    good = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(good[:100])
    save_image(folder / "small.png", torch.rand(20, 20))
    save_image(folder / "blank.png", torch.full((64, 96), 0.5))
    report = match_pairs(PairChoice(folder), tmp_path / "m.h5", settings, devices="cpu")
    # 7 images: 1.png is broken and small.png too small, so that 5 of 7 go on.
    assert (report.matched, len(report.refused)) == (10, 11)
    listed = report.refused_list.read_text().splitlines()
    assert len(listed) == 11
    assert all("1.png" in line or "small.png" in line for line in listed)
    with MatchFile(report.output) as file:
        assert file.failed_pairs == 11
        assert len(file.read(("0.png", "blank.png")).confidence) == 0
    (folder / "1.png").write_bytes(good)
    (folder / "small.png").unlink()
    again = match_pairs(PairChoice(folder), tmp_path / "m.h5", settings, devices="cpu")
    assert (again.matched, again.reused, again.refused, again.refused_list) == (5, 10, [], None)
    assert not report.refused_list.exists()


def test_a_changed_image_is_matched_again_and_a_new_one_added(
    folder: Path, tmp_path: Path, settings: MatchSettings
) -> None:
    assert match(folder, tmp_path / "m.h5", settings) == 10
    assert match(folder, tmp_path / "m.h5", settings) == 0
    save_image(folder / "0.png", random_images(1, 64, 96, seed=9)[0, 0])
    assert match(folder, tmp_path / "m.h5", settings) == 4
    save_image(folder / "5.png", random_images(1, 64, 96, seed=8)[0, 0])
    assert match(folder, tmp_path / "m.h5", settings) == 5
    match(folder, tmp_path / "fresh.h5", settings)
    assert (tmp_path / "m.h5").read_bytes() == (tmp_path / "fresh.h5").read_bytes()


def test_other_settings_are_refused(folder: Path, tmp_path: Path, settings: MatchSettings) -> None:
    match(folder, tmp_path / "m.h5", settings)
    other = MatchSettings(settings.weights, resize=64)
    with pytest.raises(SettingsError, match="resize was 96, is 64"):
        match(folder, tmp_path / "m.h5", other)
    assert match(folder, tmp_path / "m.h5", other, overwrite=True) == 10


def test_nothing_that_can_be_read_is_an_error(tmp_path: Path, settings: MatchSettings) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(b"no image")
    with pytest.raises(FileError, match="no pair could be matched"):
        match(folder, tmp_path / "m.h5", settings)


def test_a_second_run_on_one_output_is_refused(folder: Path, tmp_path: Path, settings: MatchSettings) -> None:
    with (
        filelock.FileLock(tmp_path / ".m.h5.lock"),
        pytest.raises(FileError, match="another run writes this file"),
    ):
        match(folder, tmp_path / "m.h5", settings)


CHILD = """
import sys, time
from pathlib import Path
from eloftr_ops.reconstruction.bulk import PairChoice, match_pairs
from eloftr_ops.reconstruction.engine import MatchSettings
folder, output, weights = sys.argv[1:]
def stop_after_four(outcomes, total, done):
    for number, outcome in enumerate(outcomes):
        if number == 4:
            Path(output + ".four").touch()
            time.sleep(600)
        yield outcome
settings = MatchSettings(weights, resize=96, batch=1)
match_pairs(PairChoice(Path(folder)), Path(output), settings, devices="cpu", watch=stop_after_four)
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_file(
    folder: Path, tmp_path: Path, settings: MatchSettings
) -> None:
    output = tmp_path / "m.h5"
    process = subprocess.Popen([sys.executable, "-c", CHILD, str(folder), str(output), settings.weights])
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "m.h5.four").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()  # SIGKILL: nothing can be done in reply
        process.wait()
    assert not output.exists()
    again = match_pairs(PairChoice(folder), output, settings, devices="cpu")
    assert (again.matched, again.reused) == (6, 4)
    match(folder, tmp_path / "fresh.h5", settings)
    assert output.read_bytes() == (tmp_path / "fresh.h5").read_bytes()
    assert not (tmp_path / "m.h5.journal").exists()


def test_an_interrupted_run_keeps_what_is_matched(folder: Path, tmp_path: Path, settings: MatchSettings) -> None:
    def interrupted(outcomes: Iterable[Outcome], total: int, done: int) -> Iterator[Outcome]:
        yield from itertools.islice(outcomes, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        match(folder, tmp_path / "m.h5", settings, watch=interrupted)
    assert match(folder, tmp_path / "m.h5", settings) == 7


def _pair(number: int) -> PairMatches:
    values = np.full((3, 2), number, np.float32)
    return PairMatches(("a", str(number)), values, values + 1, values[:, 0], (9, 8), (7, 6), ("s", "t"))


def test_a_journal_cut_anywhere_keeps_its_whole_records(tmp_path: Path) -> None:
    whole = Journal(tmp_path / "whole", {"resize": 1})
    ends = []
    for number in range(3):
        whole.append(_pair(number))
        ends.append(whole.path.stat().st_size)
    whole.close()
    content = whole.path.read_bytes()
    for cut in range(0, len(content) + 1, 7):
        path = tmp_path / "cut"
        path.write_bytes(content[:cut])
        journal = Journal(path, {"resize": 1})
        kept = sum(end <= cut for end in ends)
        assert len(journal.pairs()) == kept
        journal.append(_pair(5))
        journal.close()
        reopened = Journal(path, {"resize": 1})
        assert len(reopened.pairs()) == kept + 1
        found = reopened.read(("a", "5"))
        assert found.files == ("s", "t")
        np.testing.assert_array_equal(found.keypoints1, _pair(5).keypoints1)
        reopened.close()


def test_a_damaged_record_ends_the_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", {})
    journal.append(_pair(0))
    end = journal.path.stat().st_size
    journal.append(_pair(1))
    journal.close()
    content = bytearray(journal.path.read_bytes())
    content[end + 20] ^= 1
    journal.path.write_bytes(content)
    assert list(Journal(journal.path, {}).pairs()) == [("a", "0")]


def test_a_full_disk_leaves_the_journal_whole(tmp_path: Path) -> None:
    """A disk that takes no more is played by a limit on the size of files, which the system enforces."""
    journal = Journal(tmp_path / "j", {})
    journal.append(_pair(0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.path.stat().st_size + 50, limits[1]))
    try:
        with pytest.raises(FileError, match="cannot be written: File too large"):
            journal.append(_pair(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(journal.pairs()) == [("a", "0")]
    journal.append(_pair(2))
    journal.close()
    assert list(Journal(journal.path, {}).pairs()) == [("a", "0"), ("a", "2")]


def test_a_disk_that_fills_up_while_the_file_is_written_is_an_error(tmp_path: Path) -> None:
    """HDF5 alone would end the process when it closes the file."""
    many = _pair(0)._replace(
        keypoints0=np.zeros((3000, 2), np.float32),
        keypoints1=np.zeros((3000, 2), np.float32),
        confidence=np.zeros(3000, np.float32),
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (100, 5_000, 40_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises(FileError, match="cannot be written: File too large"):
                write_match_file(tmp_path / "m.h5", [many], {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert list(tmp_path.iterdir()) == []
    write_match_file(tmp_path / "m.h5", [many], {})
    with MatchFile(tmp_path / "m.h5") as file:
        assert len(file.read(many.pair).confidence) == 3000
