# SPDX-License-Identifier: Apache-2.0
"""How many pairs that show the same scene are among those that `--pairs retrieval` chooses.

    python -m benchmarks.retrieval INDEX.json

The index is of the form that `eloftr_ops.data.JsonPairs` reads, with the scene of each pair. All images of all scenes
are thrown together. Recall is the share of the index's pairs that are chosen; an index that lists only some of the
pairs of a scene says nothing about the others. Chance is what as many pairs drawn at random would reach.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from eloftr_ops.matching import load_matcher
from eloftr_ops.reconstruction.engine import MatchSettings
from eloftr_ops.reconstruction.retrieval import describe_images, nearest_pairs


def main() -> None:
    """Print a table, one row per number of neighbours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path)
    parser.add_argument("--resize", type=int, default=640)
    parser.add_argument("--neighbours", type=int, nargs="*", default=[5, 10, 20, 40])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pairs = json.loads(arguments.index.read_text())["pairs"]
    scene = {pair[image]: pair["scene"] for pair in pairs for image in ("image0", "image1")}
    true = {frozenset((pair["image0"], pair["image1"])) for pair in pairs}
    settings = MatchSettings(resize=arguments.resize)
    matcher = load_matcher(settings.weights, arguments.device)
    found = describe_images(matcher, arguments.index.parent, sorted(scene), settings)
    count = len(found.names)
    print(f"{count} images of {len(set(scene.values()))} scenes, {len(true)} pairs")
    print("| neighbours | pairs | recall | chance | of one scene |")
    print("|---|---|---|---|---|")
    for neighbours in arguments.neighbours:
        chosen = nearest_pairs(found.names, found.values, neighbours)
        recall = len(true & {frozenset(pair) for pair in chosen}) / len(true)
        same = sum(scene[first] == scene[second] for first, second in chosen) / len(chosen)
        chance = len(chosen) / (count * (count - 1) / 2)
        print(f"| {neighbours} | {len(chosen)} | {recall:.3f} | {chance:.3f} | {same:.3f} |")


if __name__ == "__main__":
    main()
