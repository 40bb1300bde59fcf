# SPDX-License-Identifier: Apache-2.0
"""What ``kernels benchmark`` runs: each op at the size of a 640 x 480 pair, checked against PyTorch first."""

import torch
from kernels.benchmark import Benchmark

CHANNELS, ROWS, COLUMNS = 256, 60, 80


class EfficientLoFTR(Benchmark):
    """``benchmark_X`` runs the kernel, ``verify_X`` gives what it must give."""

    seed = 0

    def setup(self) -> None:
        """Inputs of the coarse stage: half precision on a GPU, float32 on a CPU."""
        dtype = torch.float32 if self.device == "cpu" else torch.float16
        options = {"device": self.device, "dtype": dtype}
        cells, C = ROWS * COLUMNS, CHANNELS

        def square(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, **options) / columns**0.5

        self.x, self.source = (torch.randn(1, C, ROWS, COLUMNS, **options) for _ in range(2))
        self.features0, self.features1 = (torch.randn(1, cells, C, **options) / C**0.25 for _ in range(2))
        ones, zeros = torch.ones(C, **options), torch.zeros(C, **options)
        self.attention = self.kernel.AttentionWeights(
            aggregate=torch.randn(C, 1, 4, 4, **options) / 4,
            norm=ones,
            norm_bias=zeros,
            **{name: square(C, C) for name in ("q", "k", "v", "merge")},
        )
        self.mlp = self.kernel.MlpWeights(
            expand=square(2 * C, 2 * C), contract=square(C, 2 * C), norm=ones, norm_bias=zeros
        )

    def _attention(self) -> torch.Tensor:
        return self.kernel.aggregated_attention(self.x, self.source, self.attention, num_heads=8)

    def _coarse_layer(self) -> torch.Tensor:
        return self.kernel.upsample_mlp(self.x, self._attention(), self.mlp)

    def _dual_softmax(self) -> torch.Tensor:
        row, column = self.kernel.dual_softmax_lse(self.features0, self.features1, temperature=0.1)
        return torch.stack([row, column])

    def _reference(self, run):  # type: ignore[no-untyped-def]
        with self.kernel.backend("reference"):
            return run()

    def benchmark_aggregated_attention(self) -> None:
        self.out = self._attention()

    def verify_aggregated_attention(self) -> torch.Tensor:
        return self._reference(self._attention)

    def benchmark_coarse_layer(self) -> None:
        self.out = self._coarse_layer()

    def verify_coarse_layer(self) -> torch.Tensor:
        return self._reference(self._coarse_layer)

    def benchmark_dual_softmax_lse(self) -> None:
        self.out = self._dual_softmax()

    def verify_dual_softmax_lse(self) -> torch.Tensor:
        return self._reference(self._dual_softmax)
