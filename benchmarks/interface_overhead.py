# SPDX-License-Identifier: Apache-2.0
"""What transformers' interface costs over the bare operator, on a CPU; ``python -m benchmarks.interface_overhead``."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

LIMIT = 0.05  # share of the operator's time


def interface_overhead(rounds: int = 9, weights: str = "small") -> dict[str, float]:
    """Medians in seconds of one 640x480 pair, operator and interface in turns, and the median share on top.

    Both get the same pixels; the processor's work, which the operator's caller does otherwise, is not counted. Turns
    alternate their order, and the share is that of each turn, so that a slow spell of the machine hits both.
    """
    from eloftr_ops.integrations.transformers import EfficientLoFTRForKeypointMatching
    from eloftr_ops.io import demo_pair

    pair = demo_pair()
    model = EfficientLoFTRForKeypointMatching.from_pretrained(weights)
    data = {"image0": pair.image0, "image1": pair.image1}
    pixel_values = torch.stack([pair.image0, pair.image1], 1).expand(-1, -1, 3, -1, -1).contiguous()
    ways: list[tuple[str, Callable[[], object]]] = [
        ("operator_s", lambda: model.matcher(data)),
        ("interface_s", lambda: model(pixel_values)),
    ]
    times: dict[str, list[float]] = {name: [] for name, _ in ways}
    with torch.no_grad():
        for _, run in ways:
            run()
        for turn in range(rounds):
            for name, run in ways if turn % 2 == 0 else ways[::-1]:
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
    shares = [b / a - 1 for a, b in zip(times["operator_s"], times["interface_s"], strict=True)]
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {**medians, "overhead": statistics.median(shares), "limit": LIMIT, "rounds": float(rounds)}


def main() -> None:
    """Print the result as JSON; the exit status is 1 above the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    result = interface_overhead(parser.parse_args().rounds)
    print(json.dumps(result, indent=2))
    raise SystemExit(result["overhead"] > LIMIT)


if __name__ == "__main__":
    main()
