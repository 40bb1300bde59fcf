# SPDX-License-Identifier: Apache-2.0
"""Many pairs at once beside the same pairs one by one: seconds.

    python -m benchmarks.bulk FOLDER --images 4 --resize 640

One by one is `match_loaded` on images that are loaded already, all pairs, after a warm-up. At once is `match_pairs`,
reading, journal and file included, with the same weights and threads. The two take turns. The ratio is one by one / at
once: above 0.95 means that what surrounds the matcher costs less than kept features save. Where other programs run, the
time of the processor (user and system, all threads) says more than that of the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from eloftr_ops.images import read_image
from eloftr_ops.matching import load_matcher, match_loaded
from eloftr_ops.reconstruction.bulk import PairChoice, match_pairs
from eloftr_ops.reconstruction.engine import LocalEngine, MatchSettings, choose_devices
from eloftr_ops.reconstruction.pairs import list_images


def main() -> None:
    """Print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--resize", type=int, default=640)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = list_images(arguments.folder)[: arguments.images]
    settings = MatchSettings(resize=arguments.resize)
    matcher = load_matcher(settings.weights, arguments.device)
    engine = LocalEngine(arguments.folder, settings, choose_devices(arguments.device))
    alone, together = _Times(), _Times()
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder) / "pairs.txt"
        pairs.write_text("".join(f"{a}\t{b}\n" for a, b in itertools.combinations(names, 2)))
        for run in range(arguments.runs + 1):
            images = {name: read_image(arguments.folder / name, resize=arguments.resize) for name in names}
            choice = PairChoice(pairs, images=arguments.folder)
            with alone.taken():
                for first, second in itertools.combinations(names, 2):
                    match_loaded(matcher, images[first], images[second])
            with together.taken():
                match_pairs(choice, Path(folder) / "matches.h5", settings, engine=engine, overwrite=True)
            if not run:  # the first one warms up
                alone, together = _Times(), _Times()
    print(f"{len(names)} images, {len(names) * (len(names) - 1) // 2} pairs")
    for name, one, many in (("clock", alone.clock, together.clock), ("processor", alone.processor, together.processor)):
        before, after = statistics.median(one), statistics.median(many)
        print(f"{name}: one by one {before:.2f} s, at once {after:.2f} s, ratio {before / after:.2f}")


class _Times:
    """Seconds of each run, by the clock and of the processor."""

    def __init__(self) -> None:
        self.clock: list[float] = []
        self.processor: list[float] = []

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Take the time of a run."""
        clock, processor = time.perf_counter(), time.process_time()
        yield
        self.clock.append(time.perf_counter() - clock)
        self.processor.append(time.process_time() - processor)


if __name__ == "__main__":
    main()
