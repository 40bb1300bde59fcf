# SPDX-License-Identifier: Apache-2.0
"""3x3 convolutions with a quarter of the multiplications, for inference in float32 on a CPU.

Lavin and Gray: "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, section 4; the bilinear algorithm is
Toom and Cook's, its points are chosen for float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eloftr_kernels.dispatch import is_cpu_inference

OUTPUTS = 4  # positions per side of a tile of the result
INPUTS = OUTPUTS + 2  # that they are computed from
# Where the polynomials are evaluated, beside infinity. With 2 in place of 3/2 and 1 in place of 3/4, the textbook's
# choice, rounding is twice as large.
POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)
LEAST_CHANNELS = 96  # below it the transforms take what the products save
LEAST_TILES = 16  # below it reading the weights does
_TILES_AT_ONCE = 240  # what they hold stays in the caches
_SUMMED = 64  # channels in one go: the rounding of long sums is most of the error


class WinogradConv3x3(nn.Module):
    r"""What a 3x3 convolution with padding 1 and stride 1 gives, sooner.

    With :math:`A, G, B` of :func:`transforms`, a tile :math:`d` of 6x6 inputs and a kernel :math:`g`, the 4x4 results
    are

    .. math:: A^\top \Bigl[\sum_c (G g_c G^\top) \odot (B^\top d_c B)\Bigr] A:

    36 products for 16 results instead of 144, as 36 matrix products over the channels. The result differs from the
    convolution's by rounding, about twice that of the convolution itself (1e-6 of the norm with 256 channels).

    Everywhere else than in float32 on a CPU without gradient, and on small maps, it is the convolution.

    Args:
        conv: that it stands in for; its weights are shared.
    """

    weight: Tensor  # (36, C_in, C_out), transformed
    bias: Tensor  # (C_out,)
    of_inputs: Tensor  # (36, 36), along both axes of a tile at once: larger matrices are faster
    of_products: Tensor  # (16, 36)

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        if not pays(conv):
            raise ValueError(f"conv: expected a convolution that Winograd's algorithm makes faster, got {conv}.")
        self.conv = conv
        a, _, b = transforms()
        buffers = {
            "weight": torch.empty(0),
            "bias": torch.empty(0),
            "of_inputs": torch.kron(b, b).mT,
            "of_products": torch.kron(a, a).mT,
        }
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor.to(conv.weight).contiguous(), persistent=False)
        self._transform()

    def _transform(self) -> None:
        """Compute what is derived from the convolution's weights, and note from which."""
        conv, g = self.conv, transforms()[1]
        with torch.no_grad():
            g = g.to(conv.weight.device)
            transformed = torch.einsum("ia,jb,ocab->ijco", g, g, conv.weight.double()).flatten(0, 1)
            self.weight = transformed.to(conv.weight).contiguous()
            self.bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.clone()
        self._made_of = _versions(conv)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H, W), channels last in memory."""
        height, width = x.shape[-2:]
        rows, columns = -(-height // OUTPUTS), -(-width // OUTPUTS)
        if (
            not is_cpu_inference(x)
            or not x.dtype == self.weight.dtype == torch.float32
            or torch.is_autocast_enabled("cpu")
            or rows * columns < LEAST_TILES
        ):
            return self.conv(x)  # type: ignore[no-any-return]
        if self._made_of != _versions(self.conv):  # load_state_dict, an assignment, a copy
            self._transform()
        edges = (0, 0, 1, 1 + columns * OUTPUTS - width, 1, 1 + rows * OUTPUTS - height)
        padded = F.pad(x.permute(0, 2, 3, 1), edges)
        result = x.new_empty((len(x), rows, OUTPUTS, columns, OUTPUTS, self.weight.shape[2]))
        step = max(1, _TILES_AT_ONCE // columns)
        for image, whole in zip(padded, result, strict=True):
            tiles = image.unfold(0, INPUTS, OUTPUTS).unfold(1, INPUTS, OUTPUTS)  # (rows, columns, C_in, 6, 6)
            for some, out in zip(tiles.split(step), whole.split(step), strict=True):
                torch.add(self._of_tiles(some), self.bias, out=out)
        return result.flatten(1, 2).flatten(2, 3)[:, :height, :width].contiguous().permute(0, 3, 1, 2)

    def _of_tiles(self, tiles: Tensor) -> Tensor:
        """(R, T, C_in, 6, 6) -> (R, 4, T, 4, C_out), without the bias."""
        tiles = tiles.permute(0, 1, 3, 4, 2)
        inputs = (self.of_inputs @ tiles.reshape(-1, INPUTS**2, tiles.shape[-1])).transpose(0, 1)
        first, *others = zip(inputs.split(_SUMMED, 2), self.weight.split(_SUMMED, 1), strict=True)
        products = torch.bmm(*first)
        for some, weight in others:
            products.baddbmm_(some, weight)
        outputs = self.of_products @ products.transpose(0, 1)
        return outputs.view(*tiles.shape[:2], OUTPUTS, OUTPUTS, -1).transpose(1, 2)


def _versions(conv: nn.Conv2d) -> list[tuple[int, int]]:
    """Where the weights lie and how often they were changed in place."""
    tensors = [conv.weight] if conv.bias is None else [conv.weight, conv.bias]
    return [(x.data_ptr(), -1 if x.is_inference() else x._version) for x in tensors]


def transforms() -> tuple[Tensor, Tensor, Tensor]:
    r"""A (6, 4), G (6, 3) and B (6, 6), float64: :math:`y = A^\top [(G g) \odot (B^\top d)]` correlates 6 d with 3 g.

    Polynomials of 4 and of 3 coefficients are multiplied by way of their values at six points, the last being infinity;
    the transpose of that is the correlation.
    """
    a, g, values = (_values_at_points(coefficients) for coefficients in (OUTPUTS, 3, INPUTS))
    return a, g, torch.linalg.inv(values)


def pays(conv: nn.Conv2d) -> bool:
    """Whether a convolution has a form and as many channels as this is made for."""
    form = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    plain = form == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
    return plain and min(conv.in_channels, conv.out_channels) >= LEAST_CHANNELS


def use_winograd(module: nn.Module) -> None:
    """Replace, in place, every convolution inside ``module`` that this pays for."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d) and not isinstance(parent, WinogradConv3x3) and pays(child):
                setattr(parent, name, WinogradConv3x3(child))


def _values_at_points(coefficients: int) -> Tensor:
    """(6, coefficients): values of the monomials; at infinity, of the highest alone."""
    points = torch.tensor(POINTS, dtype=torch.float64)
    values = points[:, None] ** torch.arange(coefficients)
    highest = F.one_hot(torch.tensor([coefficients - 1]), coefficients).double()
    return torch.cat([values, highest])
