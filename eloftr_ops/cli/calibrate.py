# SPDX-License-Identifier: Apache-2.0
"""``eloftr-ops calibrate``: fit the covariances of matches to the errors of some weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from eloftr_ops.cli.common import Device, Report, Threads, UsageError, Weights, print_line, reported_mistakes
from eloftr_ops.matching import DEFAULT_WEIGHTS

_EVERY = 3  # of so many photographs one is held out


def calibrate(
    images: Annotated[Path, typer.Argument(help="Folder of photographs; every third is held out for the check.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the weights with their calibration.")],
    weights: Weights = DEFAULT_WEIGHTS,
    pairs: Annotated[int, typer.Option(min=2, help="Rendered pairs to fit; half as many to check.")] = 64,
    size: Annotated[tuple[int, int], typer.Option(help="Height and width of the pairs.")] = (320, 416),
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Fit covariances to the errors of matches on rendered pairs, and check them on held-out photographs."""
    from eloftr_ops.data.synthetic import HomographyPairs
    from eloftr_ops.data.textures import PhotoTextures
    from eloftr_ops.matchers import choose_device
    from eloftr_ops.model.matcher import EfficientLoFTR
    from eloftr_ops.training import calibration

    with reported_mistakes():
        if threads is not None:
            torch.set_num_threads(threads)
        console = Report()
        try:
            photographs = PhotoTextures(images).images
            if len(photographs) < _EVERY:
                raise UsageError(f"{images}: expected at least {_EVERY} photographs, got {len(photographs)}.")
            matcher = EfficientLoFTR.from_pretrained(weights, device=choose_device(device))
            errors = []
            for seed, held_out, count in ((1, False, pairs), (2, True, pairs // 2)):
                chosen = [x for k, x in enumerate(photographs) if (k % _EVERY == 0) == held_out]
                render, generator = HomographyPairs(chosen), torch.Generator().manual_seed(seed)
                rendered = (render(1, size, generator) for _ in range(count))
                errors.append(calibration.measure_errors(matcher, rendered))
        except ValueError as error:
            raise UsageError(str(error)) from error
        fitted = calibration.fit_covariances(errors[0])
        matcher.config = matcher.config.replace(covariance_calibration=fitted)
        matcher.save_pretrained(output)
    print_line(console, "calibration", ", ".join(f"{number:g}" for number in fitted))
    for name, part in (("fitted", errors[0]), ("held out", errors[1])):
        report = calibration.calibration_report(calibration.squared_mahalanobis(part, fitted))
        levels = ", ".join(
            f"{100 * level:.0f} %: {ratio:.2f}" for level, ratio in zip(calibration.LEVELS, report.ratios, strict=True)
        )
        print_line(console, name, f"{report.matches} right matches, mean squared error {report.mean:.2f} (law: 2.00)")
        print_line(console, "", f"quantiles by those of the law: {levels}")
    print_line(console, "weights", str(output))
