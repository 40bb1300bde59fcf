# SPDX-License-Identifier: Apache-2.0
"""What is derived from weights follows them: after loading, after a change in place, in a copy."""

import copy

import pytest
import torch

from eloftr_ops.inference.cpu.winograd import LEAST_CHANNELS, WinogradConv3x3
from support.models import SHALLOW, random_images, tiny_model


def convolution(seed: int) -> torch.nn.Conv2d:
    torch.manual_seed(seed)
    return torch.nn.Conv2d(LEAST_CHANNELS, LEAST_CHANNELS, 3, padding=1).requires_grad_(False)


def load(module: WinogradConv3x3, new: torch.nn.Conv2d) -> None:
    module.conv.load_state_dict(new.state_dict())


def assign(module: WinogradConv3x3, new: torch.nn.Conv2d) -> None:
    module.conv.load_state_dict(new.state_dict(), assign=True)


def copy_in_place(module: WinogradConv3x3, new: torch.nn.Conv2d) -> None:
    for mine, other in zip(module.conv.parameters(), new.parameters(), strict=True):
        mine.copy_(other)


def change_the_bias(module: WinogradConv3x3, new: torch.nn.Conv2d) -> None:
    module.conv.bias.add_(1.0)


@pytest.mark.parametrize("change", [load, assign, copy_in_place, change_the_bias])
@torch.no_grad()
def test_winograd_s_weights_follow_the_convolution_s(change) -> None:
    module, x = WinogradConv3x3(convolution(0)), torch.rand(1, LEAST_CHANNELS, 24, 24)
    before = module(x)
    change(module, convolution(1))
    after = module(x)
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, module.conv(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_copy_of_a_compiled_matcher_uses_its_own_weights() -> None:
    image0, image1 = random_images(2, 64, 64).split(1)
    data = {"image0": image0, "image1": image1}
    compiled = tiny_model(**SHALLOW).optimize_for_inference(compile="eager")
    before = compiled(data)
    copied = copy.deepcopy(compiled)
    for name, parameter in copied.named_parameters():
        if "transformer" in name or "pyramid" in name:
            parameter.mul_(0.5)
    plain = tiny_model(**SHALLOW).optimize_for_inference()
    plain.load_state_dict(copied.state_dict())
    expected, got = plain(data), copied(data)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert any(not torch.equal(got[n], v) for n, v in before.items() if got[n].shape == v.shape) or any(
        got[n].shape != v.shape for n, v in before.items()
    )
    assert all(torch.equal(compiled(data)[name], value) for name, value in before.items())
