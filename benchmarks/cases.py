# SPDX-License-Identifier: Apache-2.0
"""What is measured: one table per suite. Sizes are (height, width); cells are the coarse map's, 1/8 of the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.ops import ANYWHERE, CELLS, GPU, OPS, KernelCase


def _cases(
    preset: str, batch: int, devices: tuple[str, ...], side: int = 0, ops: Sequence[str] = tuple(OPS)
) -> tuple[KernelCase, ...]:
    cells = (side, side) if side else CELLS
    return tuple(
        KernelCase(
            op,
            preset,
            batch,
            cells,
            cells,
            OPS[op].modes,
            devices,
            preset == "full" or op == "attention_layer",
        )
        for op in ops
    )


def _uneven(preset: str, cells0: tuple[int, int], cells1: tuple[int, int], batch: int = 2) -> tuple[KernelCase, ...]:
    """Sizes that are no multiple of the tiles, with masks where the op takes them."""
    return tuple(
        KernelCase(
            op,
            preset,
            batch,
            cells0,
            cells1 if op in _STREAMED else cells0,
            OPS[op].modes,
            compiled=False,
            masked=not OPS[op].windows,
        )
        for op in OPS
    )


_STREAMED = ("dual_softmax_lse", "mutual_best")
KERNELS = (
    *_cases("full", 1, ANYWHERE),
    *_uneven("full", (29, 37), (23, 41)),
    *_cases("full", 16, GPU),
    *_cases("full", 1, GPU, 128, _STREAMED),
    *_cases("full", 1, GPU, 256, _STREAMED),
    *_cases("small", 1, ANYWHERE),
    *_cases("small", 16, GPU),
)
QUICK_KERNELS = (
    *(KernelCase(op, "small", 1, (4, 8), (4, 8), OPS[op].modes) for op in OPS),
    *_uneven("small", (5, 7), (3, 6), batch=1),
)


class PairCase(NamedTuple):
    """Work on whole images."""

    kind: str  # pair, many, batch, curve, convolution, training, import or command
    size: tuple[int, int]
    entries: tuple[str, ...]  # names in MATCHERS; none: all of the suite
    repeats: int
    batch: int = 1
    warm: bool = True  # an untimed run first; the largest cases go without, after smaller ones of the same code
    alike: bool = False  # the image with itself, where random weights find many matches too
    channels: int = 0  # of a convolution

    @property
    def name(self) -> str:
        """Kind, size and batch."""
        size = f"{self.size[1]}x{self.size[0]}"
        first = self.entries[0] if self.entries else ""
        return {
            "many": f"{first}: 4 images of {size}, all to all",
            "batch": f"{first}: {self.batch} pairs of {size}, together or one by one",
            "curve": f"stages at {size}",
            "convolution": f"3x3 convolution of {self.channels} channels at {size}",
            "training": f"training step, batch {self.batch} of {size}",
            "import": "import time beyond torch and kornia",
            "command": "the command line, whole process",
        }.get(self.kind, self._pairs(size))

    def _pairs(self, size: str) -> str:
        name = f"pair of {size}" if self.batch == 1 else f"{self.batch} pairs of {size}"
        return f"{name}, an image with itself" if self.alike else name


_EVERYBODY: tuple[str, ...] = ()  # all matchers of the suite
_PEERS = ("transformers", "kornia LoFTR")
_FULL = ("eloftr_ops full fp32", "eloftr_ops full bf16", *_PEERS)
_FP32 = ("eloftr_ops full fp32", "eloftr_ops small fp32")

MATCHER = (
    PairCase("pair", (480, 640), _EVERYBODY, 20),
    PairCase("pair", (480, 640), _EVERYBODY, 10, batch=16),
)
CPU = (
    PairCase("pair", (480, 640), _EVERYBODY, 5),
    PairCase("pair", (480, 640), _FULL, 3, alike=True),
    PairCase("pair", (1024, 1024), _EVERYBODY, 1, warm=False),
    PairCase("many", (480, 640), ("eloftr_ops small fp32",), 3),
    PairCase("many", (480, 640), ("eloftr_ops full fp32",), 2, warm=False),
    PairCase("batch", (480, 640), ("eloftr_ops small fp32",), 5, batch=4),
    PairCase("batch", (480, 640), ("eloftr_ops full fp32",), 4, batch=4, warm=False),
    *(PairCase("curve", (side, side), ("eloftr_ops full fp32",), 2) for side in (320, 480, 640)),
    PairCase("curve", (1024, 1024), ("eloftr_ops full fp32",), 2, warm=False),
    *(
        PairCase("convolution", size, (), 15, channels=channels)
        for size, channels in (((60, 80), 256), ((120, 160), 128), ((60, 80), 96))
    ),
    PairCase("import", (0, 0), (), 3),
    PairCase("command", (480, 640), (), 3),
    PairCase("pair", (2048, 2048), _FP32, 1, warm=False),
    PairCase("curve", (2048, 2048), ("eloftr_ops full fp32",), 1, warm=False),
    PairCase("training", (480, 480), ("eloftr_ops small fp32",), 3, batch=4),  # last: it keeps all memory
)
_TINY = (96, 128)
_DOORS = ("eloftr_ops small fp32, plain", "eloftr_ops small fp32, plain, transformers' interface")
QUICK_MATCHER = (PairCase("pair", _TINY, ("eloftr_ops full", "eloftr_ops small, CUDA graph", *_PEERS), 1),)
EXPORTED = "eloftr_ops small fp32, onnxruntime"
QUICK_CPU = (
    PairCase("pair", _TINY, ("eloftr_ops small fp32", "eloftr_ops small bf16", *_DOORS, EXPORTED), 1),
    PairCase("many", _TINY, ("eloftr_ops small fp32",), 1),
    PairCase("batch", _TINY, ("eloftr_ops small fp32",), 1, batch=2),
    PairCase("curve", _TINY, ("eloftr_ops small fp32",), 1),
    PairCase("convolution", (16, 16), (), 1, channels=96),
    PairCase("training", _TINY, ("eloftr_ops small fp32",), 1, batch=1),
)
