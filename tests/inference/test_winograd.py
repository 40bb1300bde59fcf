# SPDX-License-Identifier: Apache-2.0
"""Winograd's algorithm gives the convolution, to rounding; where it does not pay the convolution itself runs."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from eloftr_ops.inference.cpu import winograd
from eloftr_ops.inference.cpu.winograd import WinogradConv3x3, pays, transforms, use_winograd
from support.golden import golden_model
from support.models import tiny_model
from support.ops import spy

EPS = torch.finfo(torch.float32).eps


def convolution(channels_in: int = 96, channels_out: int = 96, *, bias: bool = True, seed: int = 0) -> nn.Conv2d:
    torch.manual_seed(seed)
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=bias).requires_grad_(False)


def relative_error(got: Tensor, x: Tensor, conv: nn.Conv2d) -> float:
    exact = conv.double()(x.double())
    conv.float()
    return float((got - exact).norm() / exact.norm())


def by_winograd(fast: WinogradConv3x3, x: Tensor) -> Tensor:
    """The result, and proof of where it comes from: with a graph to record it would be the convolution's."""
    with torch.no_grad(), spy(WinogradConv3x3, "_of_tiles") as calls:
        y = fast(x)
    assert calls["_of_tiles"] > 0
    return y


def test_transforms_correlate() -> None:
    """Every pair of unit vectors, so by linearity every input and kernel."""
    a, g, b = transforms()
    for i, k in itertools.product(range(6), range(3)):
        d, kernel = torch.eye(6, dtype=torch.float64)[i], torch.eye(3, dtype=torch.float64)[k]
        expected = d.unfold(0, 3, 1) @ kernel
        torch.testing.assert_close(a.mT @ ((g @ kernel) * (b.mT @ d)), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", [(16, 16), (60, 80), (17, 30), (1, 70), (33, 9)])
@pytest.mark.parametrize("bias", [True, False])
def test_is_the_convolution(size: tuple[int, int], bias: bool) -> None:
    """Sizes that tiles fit and others; the tiles of one strip, and of several."""
    conv = convolution(96, 128, bias=bias)
    x = torch.randn(2, 96, *size).relu().to(memory_format=torch.channels_last)
    got = by_winograd(WinogradConv3x3(conv), x)
    assert got.is_contiguous(memory_format=torch.channels_last)
    # 64 channels are summed at a time, in an order of the library's own: sqrt(64) roundings, and the transforms grow
    # rounding by less than three.
    assert relative_error(got, x, conv) < 3 * 64**0.5 * EPS


def test_rounding_is_that_of_the_convolution() -> None:
    conv = convolution(256, 256)
    x = torch.randn(1, 256, 24, 32).relu().to(memory_format=torch.channels_last)
    conv.to(memory_format=torch.channels_last)
    by_convolution = relative_error(conv(x), x, conv)
    assert relative_error(by_winograd(WinogradConv3x3(conv), x), x, conv) < 5 * max(by_convolution, EPS)


def test_other_layouts_and_empty_batches() -> None:
    conv = convolution()
    fast = WinogradConv3x3(conv)
    x = torch.randn(1, 96, 24, 24)
    wide = torch.randn(1, 96, 24, 48)[..., ::2]
    for given in (x, wide):
        torch.testing.assert_close(by_winograd(fast, given), conv(given), rtol=0, atol=1e-5)
    with torch.no_grad():
        assert fast(x[:0]).shape == (0, 96, 24, 24)


def test_where_it_does_not_pay_the_convolution_runs() -> None:
    conv = convolution()
    fast = WinogradConv3x3(conv)

    def takes_it(x: Tensor) -> bool:
        with spy(WinogradConv3x3, "_of_tiles") as calls:
            fast(x)
        return calls["_of_tiles"] > 0

    x = torch.randn(1, 96, 24, 24)
    with torch.no_grad():
        assert takes_it(x)
        assert not takes_it(x[..., :8, :8])
        with torch.autocast("cpu", torch.bfloat16):
            assert not takes_it(x)
    assert not takes_it(x)  # a graph may be recorded
    with torch.no_grad():
        fast.double()
        assert not takes_it(x.double())


def test_which_convolutions_it_stands_in_for() -> None:
    assert pays(convolution())
    others = [
        nn.Conv2d(96, 96, 3, padding=1, stride=2),
        nn.Conv2d(96, 96, 3),
        nn.Conv2d(96, 96, 1),
        nn.Conv2d(96, 96, 3, padding=1, groups=2),
        nn.Conv2d(96, 96, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(96, 96, 3, padding=2, dilation=2),
        nn.Conv2d(winograd.LEAST_CHANNELS - 1, 96, 3, padding=1),
    ]
    assert not any(pays(conv) for conv in others)
    with pytest.raises(ValueError, match="conv: expected a convolution that Winograd"):
        WinogradConv3x3(others[0])
    parent = nn.Sequential(*others, nn.Sequential(convolution()))
    use_winograd(parent)
    use_winograd(parent)  # what is replaced stays
    kinds = [type(module) for module in (*parent[:-1], parent[-1][0])]
    assert kinds == [nn.Conv2d] * len(others) + [WinogradConv3x3]


def test_the_optimized_full_model_uses_it_in_float32_only() -> None:
    plain = golden_model()
    fast = plain.optimize_for_inference()
    names = [name for name, module in fast.named_modules() if isinstance(module, WinogradConv3x3)]
    # Three 128-wide and thirteen 256-wide blocks keep their resolution; the pyramid's last convolution is too narrow.
    assert sum(name.startswith("backbone") for name in names) == 16
    assert sum(name.startswith("pyramid") for name in names) == 3
    for other in (
        plain.optimize_for_inference(dtype=torch.bfloat16),
        plain,
        tiny_model().optimize_for_inference(),
    ):
        assert not any(isinstance(module, WinogradConv3x3) for module in other.modules())
