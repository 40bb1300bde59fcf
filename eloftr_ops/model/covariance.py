# SPDX-License-Identifier: Apache-2.0
"""From the second moments of fine windows to covariances that fit the errors of the matches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eloftr_kernels.window_match.moments import WindowMoments

ROUNDNESS = 0.1  # of an ellipse, whatever the moments: its axes differ by a factor of 4.6 at most
LEAST_VARIANCE = 0.01  # pixels squared, added to the mean variance of a window


def calibrated_covariances(
    moments: WindowMoments, calibration: Sequence[float] | Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    r"""Covariances (M, 2, 2) of the keypoints of image 0 and image 1, pixels squared.

    With a window's second moment :math:`S` (in image 1 of the pixel plus :math:`u` times that of the 3x3
    neighbourhood), its mean variance :math:`t = \mathrm{tr}(S) / 2` and the mass :math:`m` of the joint probability,

    .. math:: \Sigma = e^{a} (t + t_0)^{g} m^{-k} \bigl((S + t_0 1) / (t + t_0) + \rho 1\bigr) / (1 + \rho).

    The calibration, ``config.covariance_calibration``, holds :math:`a, g, k` of image 0, of image 1, and :math:`u`. The
    shape of the ellipse is the window's; its size follows from how wide the window's probability is, and of how many
    pixels have a partner. Symmetric, positive definite and finite for every window; differentiable.
    """
    a0, g0, k0, a1, g1, k1, subpixel = calibration
    moment1 = moments.pixel1 + subpixel * moments.subpixel1
    return (
        _calibrated(moments.pixel0, moments.log_mass, (a0, g0, k0)),
        _calibrated(moment1, moments.log_mass, (a1, g1, k1)),
    )


def _calibrated(moment: Tensor, log_mass: Tensor, numbers: tuple[float | Tensor, ...]) -> Tensor:
    with torch.autocast(moment.device.type, enabled=False):
        eye = torch.eye(2, dtype=moment.dtype, device=moment.device)
        moment = moment + LEAST_VARIANCE * eye
        variance = moment.diagonal(dim1=-2, dim2=-1).mean(-1)
        shape = (moment / variance[:, None, None] + ROUNDNESS * eye) / (1 + ROUNDNESS)
        offset, power, mass = numbers
        size = (offset + power * variance.log() - mass * log_mass).exp()
        return size[:, None, None] * shape
