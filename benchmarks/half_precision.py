# SPDX-License-Identifier: Apache-2.0
"""Share of the float32 matches that half precision finds again: ``python -m benchmarks.half_precision``."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.golden import golden_model, image
from eloftr_ops import EfficientLoFTR
from eloftr_ops.io import demo_pair

_Matches = dict[str, Tensor]
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
CELL, CLOSE = 8.0, 0.1  # pixels


class Shares(NamedTuple):
    """Of the matches that float32 finds."""

    shared: float  # found again: both keypoints within a coarse cell
    close: float  # found again, both keypoints within 0.1 px


def shares(found: _Matches, truth: _Matches) -> Shares:
    """Of the matches of one pair; one to one, by the nearest match."""
    if not len(found["confidence"]) or not len(truth["confidence"]):
        return Shares(0.0, 0.0)
    # Exact distances: those by way of a matrix product lose a tenth of a pixel at coordinates of some hundred pixels.
    distances = [
        torch.cdist(truth[key].double(), found[key].double(), compute_mode="donot_use_mm_for_euclid_dist")
        for key in ("keypoints0", "keypoints1")
    ]
    nearest = torch.maximum(*distances).amin(1)
    return Shares(*((nearest < limit).double().mean().item() for limit in (CELL, CLOSE)))


def ways(
    model: EfficientLoFTR, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Callable[..., _Matches]]]:
    """The ways to run ``model`` in half precision."""

    def autocast(data: _Matches) -> _Matches:
        with torch.autocast(device.type, dtype):
            return model(data)

    half = copy.deepcopy(model).to(dtype)
    yield "autocast", autocast
    yield (
        f"matcher.to({str(dtype).removeprefix('torch.')})",
        lambda data: half({k: x.to(dtype) for k, x in data.items()}),
    )
    yield "optimize_for_inference(dtype=...)", model.optimize_for_inference(dtype=dtype)


def main(arguments: list[str] | None = None, show: Callable[[str], None] = print) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    device = torch.device(parser.parse_args(arguments).device)
    first, second, _ = demo_pair()
    same = image("image0", 0)
    cases = {
        "small, the bundled pair": (EfficientLoFTR.from_pretrained("small"), first, second),
        "full with the weights of the parity tests, an image and itself": (golden_model(), same, same),
    }
    show("| case | dtype | way | matches | found again | within 0.1 px |")
    show("| --- | --- | --- | --- | --- | --- |")
    with torch.no_grad():
        for case, (model, image0, image1) in cases.items():
            data = {"image0": image0.to(device), "image1": image1.to(device)}
            truth = model.eval().to(device)(data)
            for name, dtype in _DTYPES.items():
                for way, run in ways(model, dtype, device):
                    found = run(data)
                    share = shares(found, truth)
                    counts = f"{len(found['confidence'])} of {len(truth['confidence'])}"
                    show(f"| {case} | {name} | {way} | {counts} | {share.shared:.1%} | {share.close:.1%} |")


if __name__ == "__main__":
    main()
