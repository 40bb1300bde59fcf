# SPDX-License-Identifier: Apache-2.0
"""What is measured: one table per suite. Sizes are (height, width); cells are the coarse map's, 1/8 of the image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

CELLS = (60, 80)  # of a 640x480 image
BOTH = ("forward", "forward+backward")
ANYWHERE, GPU = ("cuda", "cpu"), ("cuda",)


class Widths(NamedTuple):
    """What the ops see of a preset."""

    channels: int
    heads: int
    fine: int
    subpixel: int = 8


PRESETS = {"full": Widths(256, 8, 64), "small": Widths(96, 6, 24)}


class KernelCase(NamedTuple):
    """An op at the shapes that it has in the matcher."""

    op: str
    preset: str
    batch: int
    cells0: tuple[int, int] = CELLS
    cells1: tuple[int, int] = CELLS
    measures: tuple[str, ...] = BOTH
    devices: tuple[str, ...] = ANYWHERE  # elsewhere the case would take minutes
    compiled: bool = True  # beside torch.compile, which takes longer to compile than all else takes together

    @property
    def name(self) -> str:
        """Op, preset, batch and shape."""
        cells = self.cells0[0] * self.cells0[1]
        return f"{self.op} {self.preset} batch {self.batch}, {cells} cells"


OPS = (
    "attention_layer",  # aggregated_attention, then upsample_mlp
    "dual_softmax_lse",
    "aggregated_attention",
    "upsample_mlp",
    "mutual_best",
    "window_match",
    "window_match soft",  # with the expectations that training needs
)
_MEASURES = {"mutual_best": ("forward",), "window_match": ("forward",)}


def _cases(
    preset: str, batch: int, devices: tuple[str, ...], side: int = 0, ops: Sequence[str] = OPS
) -> Iterator[KernelCase]:
    for op in ops:
        cells = (side, side) if side else CELLS
        compiled = preset == "full" or op == "attention_layer"
        yield KernelCase(op, preset, batch, cells, cells, _MEASURES.get(op, BOTH), devices, compiled)


# What matters most comes first: a run that spends its minutes leaves the last cases out.
_STREAMED = ("dual_softmax_lse", "mutual_best")
KERNELS = (
    *_cases("full", 1, ANYWHERE),
    *_cases("full", 16, GPU),
    *_cases("full", 1, GPU, 128, _STREAMED),
    *_cases("full", 1, GPU, 256, _STREAMED),
    *_cases("small", 1, ANYWHERE),
    *_cases("small", 16, GPU),
)
QUICK_KERNELS = tuple(
    KernelCase(op, "small", 1, (8, 12), (8, 12), _MEASURES.get(op, BOTH), ANYWHERE) for op in OPS
)


class MatcherSpec(NamedTuple):
    """A whole matcher: whose, with which weights, how run."""

    owner: str  # eloftr_ops, transformers or kornia
    preset: str = "full"
    dtype: str | None = None  # None: the run's
    mode: str = "eager"  # eager, compile, reduce-overhead or graph


MATCHERS = {
    "eloftr_ops full": MatcherSpec("eloftr_ops"),
    "eloftr_ops full, torch.compile": MatcherSpec("eloftr_ops", mode="compile"),
    "eloftr_ops full, reduce-overhead": MatcherSpec("eloftr_ops", mode="reduce-overhead"),
    "eloftr_ops full, CUDA graph": MatcherSpec("eloftr_ops", mode="graph"),
    "eloftr_ops small": MatcherSpec("eloftr_ops", "small"),
    "eloftr_ops small, torch.compile": MatcherSpec("eloftr_ops", "small", mode="compile"),
    "eloftr_ops small, CUDA graph": MatcherSpec("eloftr_ops", "small", mode="graph"),
    "eloftr_ops full fp32": MatcherSpec("eloftr_ops", dtype="fp32"),
    "eloftr_ops full bf16": MatcherSpec("eloftr_ops", dtype="bf16"),
    "eloftr_ops small fp32": MatcherSpec("eloftr_ops", "small", "fp32"),
    "eloftr_ops small bf16": MatcherSpec("eloftr_ops", "small", "bf16"),
    "transformers": MatcherSpec("transformers"),
    "kornia LoFTR": MatcherSpec("kornia"),
}


class PairCase(NamedTuple):
    """Work on whole images."""

    kind: str  # pair, many, batch, curve, convolution, training, import or command
    size: tuple[int, int]
    contenders: tuple[str, ...]  # names in MATCHERS; none for import and command
    repeats: int
    batch: int = 1
    warm: bool = (
        True  # an untimed run first; the largest cases do without, after smaller ones of the same code
    )
    alike: bool = False  # the image with itself, where random weights find many matches too
    channels: int = 0  # of a convolution

    @property
    def name(self) -> str:
        """Kind, size and batch."""
        size = f"{self.size[1]}x{self.size[0]}"
        first = self.contenders[0] if self.contenders else ""
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


_OURS = tuple(name for name, spec in MATCHERS.items() if spec.owner == "eloftr_ops" and spec.dtype is None)
_PEERS = ("transformers", "kornia LoFTR")
_CPU_OURS = ("eloftr_ops full fp32", "eloftr_ops full bf16", "eloftr_ops small fp32", "eloftr_ops small bf16")
_FP32 = ("eloftr_ops full fp32", "eloftr_ops small fp32")

MATCHER = (
    PairCase("pair", (480, 640), (*_OURS, *_PEERS), 20),
    PairCase("pair", (480, 640), (*_OURS, *_PEERS), 10, batch=16),
)
CPU = (
    PairCase("pair", (480, 640), (*_CPU_OURS, *_PEERS), 5),
    PairCase("pair", (480, 640), (*_CPU_OURS[:2], *_PEERS), 3, alike=True),
    PairCase("pair", (1024, 1024), (*_CPU_OURS, *_PEERS), 1, warm=False),
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
QUICK_MATCHER = (PairCase("pair", _TINY, ("eloftr_ops full", "eloftr_ops small, CUDA graph", *_PEERS), 1),)
QUICK_CPU = (
    PairCase("pair", _TINY, ("eloftr_ops small fp32", "eloftr_ops small bf16"), 1),
    PairCase("many", _TINY, ("eloftr_ops small fp32",), 1),
    PairCase("batch", _TINY, ("eloftr_ops small fp32",), 1, batch=2),
    PairCase("curve", _TINY, ("eloftr_ops small fp32",), 1),
    PairCase("convolution", (16, 16), (), 1, channels=96),
    PairCase("training", _TINY, ("eloftr_ops small fp32",), 1, batch=1),
)
