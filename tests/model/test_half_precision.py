# SPDX-License-Identifier: Apache-2.0
"""Half precision finds the matches of float32; ``python -m benchmarks.half_precision`` prints the shares."""

import copy

import pytest
import torch

from benchmarks.golden import golden_model, image
from benchmarks.half_precision import shares
from eloftr_ops import EfficientLoFTR
from eloftr_ops.model.transformer import CoarseTransformer
from support.models import random_images, tiny_model

HALF = [torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def model() -> EfficientLoFTR:
    return golden_model()


@pytest.mark.parametrize(
    ("dtype", "size", "shared", "close"),
    [(torch.float16, 96, 0.99, 0.95), (torch.bfloat16, 192, 0.97, 0.9)],  # a CPU takes its time over float16
)
def test_the_authors_model_under_autocast(
    model: EfficientLoFTR, dtype: torch.dtype, size: int, shared: float, close: float
) -> None:
    same = image("image0", 0)[..., :size, :size]
    with torch.no_grad():
        truth = model({"image0": same, "image1": same})
        with torch.autocast("cpu", dtype):
            found = model({"image0": same, "image1": same})
    assert len(truth["confidence"]) > 50
    share = shares(found, truth)
    assert share.shared >= shared
    assert share.close >= close


@pytest.mark.parametrize("dtype", HALF)
def test_the_transformer_adds_to_float32_maps(dtype: torch.dtype) -> None:
    """A common part that is 100 times what differs costs few of the bits that tell cells apart."""
    torch.manual_seed(0)
    transformer: CoarseTransformer = tiny_model().transformer.eval()
    channels = transformer.config.coarse_channels
    x0, x1 = (torch.randn(1, channels, 8, 8) + 100 * torch.randn(channels, 1, 1) for _ in range(2))
    with torch.no_grad():
        exact = copy.deepcopy(transformer).double()(x0.double(), x1.double())
        half = copy.deepcopy(transformer).to(dtype)(x0, x1)
        with torch.autocast("cpu", dtype):
            cast = transformer(x0, x1)
    for truth, *found in zip(exact, half, cast, strict=True):
        differing = truth - truth.mean((2, 3), keepdim=True)
        for y in found:
            assert y.dtype == torch.float32
            error = y.double() - truth
            error = error - error.mean((2, 3), keepdim=True)
            assert error.norm() < 8 * torch.finfo(dtype).eps * differing.norm()


def test_images_are_read_at_full_precision_under_autocast() -> None:
    model = tiny_model().eval()
    images = random_images(1, 64, 64)
    with torch.no_grad():
        expected = model.backbone.stages[0](images)
        with torch.autocast("cpu", torch.bfloat16):
            seen = []
            handle = model.backbone.stages[0].register_forward_hook(lambda m, i, out: seen.append(out))
            model.backbone(images)
    handle.remove()
    torch.testing.assert_close(seen[0], expected)
