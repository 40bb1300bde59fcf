# SPDX-License-Identifier: Apache-2.0
"""Matching the pairs of a folder of images into one file, so that nothing is lost and nothing is done twice.

What is matched goes to a journal beside the output, pair by pair. When all pairs are through, the output is written
from it in one step, in the order of the names, and the journal is removed. So a run that was killed goes on where it
ended, and the output does not tell how often that happened.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import filelock

from eloftr_ops.errors import ArgumentError, FileError
from eloftr_ops.io import check_output, write_matches
from eloftr_ops.model.matcher import EfficientLoFTR
from eloftr_ops.reconstruction.engine import LocalEngine, MatchSettings, Outcome, choose_devices
from eloftr_ops.reconstruction.features import file_state
from eloftr_ops.reconstruction.journal import Journal, PairMatches, SettingsError
from eloftr_ops.reconstruction.match_file import MatchFile, require_h5py, write_match_file
from eloftr_ops.reconstruction.pairs import (
    Pair,
    PairList,
    RefusedPair,
    check_keys,
    exhaustive_pairs,
    list_images,
    pair_key,
    read_pair_file,
    sequential_pairs,
)
from eloftr_ops.reconstruction.retrieval import retrieval_pairs
from eloftr_ops.storage import write_file

__all__ = ["BulkReport", "Engine", "PairChoice", "PairMode", "match_pairs"]

PairMode = Literal["exhaustive", "sequential", "retrieval", "file"]
Watch = Callable[[Iterable[Outcome], int, int], Iterable[Outcome]]
_SYNC_SECONDS = 5.0


class Engine(Protocol):
    """What matches pairs."""

    @property
    def matcher(self) -> EfficientLoFTR:
        """One with the weights that are used."""

    def run(self, pairs: Sequence[Pair]) -> Iterator[Outcome]:
        """The outcome of each pair, once, in no particular order."""


@dataclass(frozen=True)
class PairChoice:
    """Which pairs of a folder are matched.

    Attributes:
        source: a folder of images, or a text file of pairs.
        mode: "exhaustive", "sequential", "retrieval", or "file", which a file is anyway.
        images: folder that the names in a file of pairs belong to; None: the folder of that file.
        window: for "sequential": the images behind an image that it is matched with.
        neighbours: for "retrieval": the most similar images that an image is matched with.
    """

    source: Path
    mode: PairMode = "exhaustive"
    images: Path | None = None
    window: int = 10
    neighbours: int = 20

    def __post_init__(self) -> None:
        if self.mode not in get_args(PairMode):
            raise ArgumentError("pairs", f"expected one of {', '.join(get_args(PairMode))}, got {self.mode!r}.")
        if self.mode == "file" and not self.source.is_file():
            raise FileError(f"{self.source}: expected a text file of pairs.")
        for name in ("window", "neighbours"):
            if getattr(self, name) < 1:
                raise ArgumentError(name, f"expected at least 1 image, got {getattr(self, name)}.")

    @property
    def folder(self) -> Path:
        """That the names of the images belong to."""
        if self.source.is_file():
            return self.images or self.source.parent
        return self.source


@dataclass(frozen=True)
class BulkReport:
    """What :func:`match_pairs` did."""

    output: Path
    matched: int  # pairs matched in this run
    reused: int  # pairs that an earlier run had matched
    matches: int  # of all pairs together
    seconds: float  # of this run
    refused: list[RefusedPair] = field(default_factory=list)
    refused_list: Path | None = None  # text file that lists them


def match_pairs(
    choice: PairChoice,
    output: Path,
    settings: MatchSettings | None = None,
    *,
    devices: str = "auto",
    engine: Engine | None = None,
    npz: Path | None = None,
    overwrite: bool = False,
    watch: Watch | None = None,
) -> BulkReport:
    """Match pairs of images and write one HDF5 file; see `eloftr_ops.reconstruction.match_file` for its layout.

    A run that was ended goes on with the pairs that are missing, and so does a run on a folder that has more images
    now. A pair whose image files were written since is matched again. Images and pairs that cannot be matched are
    listed in the report and in ``OUTPUT.refused.txt``; they are tried again by the next run.

    Convention:
        The file is in hloc's frame, and `MatchFile` gives the project's: pixels of the upright original images, the
        centre of pixel (x, y) at (x + 0.5, y + 0.5).

    Args:
        choice: which pairs.
        output: file to write, ``.h5``.
        settings: how to match; the defaults if left out.
        devices: "auto", or names of devices with commas between them; of the local engine.
        engine: what matches; None: this machine. See `eloftr_ops.reconstruction.ray_engine.RayEngine`.
        npz: folder for one ``.npz`` file per pair, too, as `eloftr_ops.io.write_matches` writes them.
        overwrite: begin anew, whatever is there.
        watch: takes the outcomes, how many there will be and how many are there already, and gives the outcomes on:
            a progress bar.

    Raises:
        FileError: no image, a place that cannot be written, an output of other settings, or no pair could be matched.
        ArgumentError: arguments that cannot be used.
    """
    start = time.perf_counter()
    settings = settings or MatchSettings()
    require_h5py()
    check_output(output, (".h5", ".hdf5"))
    with _alone(output):
        if engine is None:
            engine = LocalEngine(choice.folder, settings, choose_devices(devices))
        asked = _pairs_of(choice, engine, settings)
        check_keys(dict.fromkeys(itertools.chain(*asked.pairs)))
        with _Results(output, _identity(engine.matcher, settings), overwrite) as results:
            missing = results.missing(asked.pairs, choice.folder)
            outcomes: Iterable[Outcome] = engine.run(missing)
            if watch is not None:
                outcomes = watch(outcomes, len(asked.pairs), len(asked.pairs) - len(missing))
            refused = asked.refused + _collect(outcomes, results, npz)
            count = results.finish(len(refused))
    reused = len(asked.pairs) - len(missing)
    listed = _list_refused(output, refused)
    if refused and not reused and len(refused) >= len(asked.pairs) + len(asked.refused):
        raise FileError(f"{output}: no pair could be matched. {refused[0].reason} All are in {listed}.")
    matched = len(asked.pairs) + len(asked.refused) - len(refused) - reused
    return BulkReport(output, matched, reused, count, time.perf_counter() - start, refused, listed)


class _Results:
    """What is matched so far: the output of an earlier run, if there is one, and the journal."""

    def __init__(self, output: Path, identity: dict[str, Any], overwrite: bool) -> None:
        self._output, self._identity = output, identity
        path = output.with_name(output.name + ".journal")
        if overwrite:
            path.unlink(missing_ok=True)
            output.unlink(missing_ok=True)
        self._before = MatchFile(output) if output.exists() else None
        if self._before is not None and self._before.settings != identity:
            raise SettingsError(
                f"{output}: it holds matches of other settings ({_changes(self._before.settings, identity)}). "
                "Pass those settings, another output, or --overwrite."
            )
        self.journal = Journal(path, identity)

    def __enter__(self) -> _Results:
        return self

    def __exit__(self, *_: object) -> None:
        self.journal.close()
        if self._before is not None:
            self._before.__exit__()

    def missing(self, pairs: Sequence[Pair], folder: Path) -> list[Pair]:
        """The pairs that are not there, or whose images changed since."""
        states = {} if self._before is None else self._before.states()
        states |= self.journal.pairs()
        now = {name: file_state(folder / name) for name in dict.fromkeys(itertools.chain(*pairs))}
        missing = [pair for pair in pairs if states.get(pair) != (now[pair[0]], now[pair[1]])]
        for pair in missing:
            self.journal.forget(pair)
            if pair in states and self._before is not None:
                self._before.forget(pair)
        return missing

    def finish(self, refused: int) -> int:
        """Write the output; how many matches it holds."""
        before = set() if self._before is None else set(self._before.pairs())
        new = set(self.journal.pairs())
        count = 0

        def read() -> Iterator[PairMatches]:
            nonlocal count
            for pair in sorted(before | new):
                inside = pair in new or self._before is None
                found = self.journal.read(pair) if inside else self._before.read(pair)  # type: ignore[union-attr]
                count += len(found.confidence)
                yield found

        write_match_file(self._output, read(), self._identity, failed_pairs=refused)
        self.journal.path.unlink(missing_ok=True)
        return count


def _pairs_of(choice: PairChoice, engine: Engine, settings: MatchSettings) -> PairList:
    if choice.source.is_file():
        return read_pair_file(choice.source)
    names = list_images(choice.source)
    if choice.mode == "sequential":
        return PairList(sequential_pairs(names, choice.window), [])
    if choice.mode == "retrieval":
        return retrieval_pairs(engine.matcher, choice.source, names, choice.neighbours, settings)
    return PairList(exhaustive_pairs(names), [])


def _collect(outcomes: Iterable[Outcome], results: _Results, npz: Path | None) -> list[RefusedPair]:
    """Keep what is matched as it comes; give what is not."""
    refused, synced = [], time.monotonic()
    for outcome in outcomes:
        if isinstance(outcome, RefusedPair):
            refused.append(outcome)
            continue
        if npz is not None:  # first: a pair in the journal is never looked at again
            _write_npz(npz, outcome)
        results.journal.append(outcome)
        if time.monotonic() - synced > _SYNC_SECONDS:
            results.journal.sync()
            synced = time.monotonic()
    results.journal.sync()
    return refused


def _write_npz(folder: Path, found: PairMatches) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{folder}: the folder cannot be made: {error.strerror}.") from error
    write_matches(
        folder / (pair_key(found.pair).replace("/", "__") + ".npz"),
        found.keypoints0,
        found.keypoints1,
        found.confidence,
        size0_wh=found.size0_wh,
        size1_wh=found.size1_wh,
    )


def _list_refused(output: Path, refused: list[RefusedPair]) -> Path | None:
    path = output.with_name(output.name + ".refused.txt")
    if not refused:
        path.unlink(missing_ok=True)
        return None
    lines = [f"{first}\t{second}\t{reason}\n" for (first, second), reason in refused]
    write_file(path, "".join(sorted(lines)).encode())
    return path


def _identity(matcher: EfficientLoFTR, settings: MatchSettings) -> dict[str, Any]:
    """What must be equal for matches to belong together; the weights by their values."""
    digest = hashlib.sha256()
    for name, value in sorted(matcher.transformer.state_dict().items()):
        digest.update(name.encode() + value.cpu().float().numpy().tobytes())
    return {
        "weights": digest.hexdigest()[:16],
        "resize": settings.resize,
        "threshold": matcher.config.threshold,
    }


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    return ", ".join(f"{key} was {before.get(key)}, is {now[key]}" for key in now if before.get(key) != now[key])


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[None]:
    """No second run on this output; the system gives the lock back when the process ends, however it ends.

    The lock's file stays: removing it would let a run that waits for it and a later run both go on.
    """
    lock = filelock.FileLock(output.with_name(f".{output.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise FileError(f"{output}: another run writes this file. Wait for its end, or pass another output.") from error
    try:
        yield
    finally:
        lock.release()
