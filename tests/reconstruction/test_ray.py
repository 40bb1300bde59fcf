# SPDX-License-Identifier: Apache-2.0
"""The Ray engine on a cluster of two workers on this machine, one of which is killed."""

import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from eloftr_ops.reconstruction.bulk import PairChoice, match_pairs
from eloftr_ops.reconstruction.engine import MatchSettings, Outcome
from eloftr_ops.reconstruction.pairs import RefusedPair
from eloftr_ops.reconstruction.ray_engine import _ATTEMPTS, RayEngine, _after_a_death, _Chunk
from support.models import random_images, tiny_model
from support.pair_files import save_image


def test_a_killed_worker_loses_nothing_and_nothing_comes_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six images, one of them broken, in chunks of one; the file is that of the local engine."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # it is 15, which starves on a machine with other work
    tiny_model(border_removal=0).save_pretrained(tmp_path / "weights")
    picture = random_images(1, 120, 120)[0, 0]
    names = [f"{number}.png" for number in range(6)]
    for number, name in enumerate(names):
        save_image(tmp_path / "images" / name, picture[8 * number :, :][:64, :96])
    settings = MatchSettings(str(tmp_path / "weights"), resize=96)
    engine = RayEngine(tmp_path / "images", settings, workers=2, chunk=1)
    killed = []

    def kill_one(outcomes: Iterable[Outcome], total: int, done: int) -> Iterator[Outcome]:
        for number, outcome in enumerate(outcomes):
            if number == 3:
                killed.append(engine.processes()[0])
                os.kill(killed[0], signal.SIGKILL)
            yield outcome
        assert killed[0] not in engine.processes()  # another one took its place

    try:
        (tmp_path / "images" / "broken.png").write_bytes(b"no image")
        choice = PairChoice(tmp_path / "images")
        report = match_pairs(choice, tmp_path / "ray.h5", settings, engine=engine, watch=kill_one)
    finally:
        engine.close()
    assert len(killed) == 1
    assert (report.matched, len(report.refused)) == (15, 6)
    local = match_pairs(choice, tmp_path / "local.h5", settings, devices="cpu")
    assert local.matches == report.matches > 0
    assert (tmp_path / "ray.h5").read_bytes() == (tmp_path / "local.h5").read_bytes()


def test_a_pair_that_kills_its_workers_is_refused_and_the_others_are_not() -> None:
    pairs = [("a", str(number)) for number in range(3)]
    waiting, refused, tried = [_Chunk(pairs)], [], []
    while waiting:
        chunk = waiting.pop(0)
        if ("a", "1") not in chunk.pairs:
            tried += chunk.pairs
            continue
        gone, again = _after_a_death(chunk)
        refused += gone
        waiting += again
    assert sorted(tried) == [("a", "0"), ("a", "2")]
    assert [pair for pair, _ in refused] == [("a", "1")]
    assert isinstance(refused[0], RefusedPair)
    assert f"died {_ATTEMPTS} times" in refused[0].reason
