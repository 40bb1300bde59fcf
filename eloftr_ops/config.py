# SPDX-License-Identifier: Apache-2.0
"""The one description of a model: a frozen, validated dataclass with three presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

GradientMode = Literal["hard", "straight_through", "soft"]
ScoreKind = Literal["dual_softmax", "similarity"]
WeightLayout = Literal["eloftr_ops", "authors", "transformers"]


_ARCHITECTURE = ("stage_channels", "stage_blocks", "num_layers", "num_heads")  # what shapes the weights
_WIDEST = 63  # cells of the soft neighbourhood; memory grows with the square
_LARGEST_SCALE = 1e6
_STEEPEST = 8  # exponents of the calibration of covariances


def check_choice(name: str, value: Any, choices: Any) -> Any:
    """The value, which is one of a ``Literal``'s.

    Raises:
        ValueError: it is not.
    """
    if value not in get_args(choices):
        raise ValueError(f"{name}: expected one of {', '.join(get_args(choices))}, got {value!r}.")
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class EfficientLoFTRConfig:
    """Architecture and matching parameters of :class:`EfficientLoFTR`.

    The defaults are the authors' ``full`` model (Wang et al., CVPR 2024, section 3 and the released settings).
    What the method fixes is not a field: strides 2, 1, 2, 2, aggregation over 4x4 cells, 8x8 windows.

    Args:
        stage_channels: widths of the four RepVGG stages (1/2, 1/2, 1/4, 1/8 of the image). The last is the coarse
            width C, a multiple of ``4 * num_heads``; the second is the fine width.
        stage_blocks: RepVGG blocks per stage.
        num_layers: (self, cross) attention pairs.
        num_heads: attention heads.
        position_scale: factors on rotary (row, column) positions, for images larger than those of training.
        round_rotary: round the rotary cos/sin tables to float16, as the released weights were trained.
        score: ``dual_softmax`` (confidence is a probability) or ``similarity`` (the authors' *optimized* inference:
            no softmax, confidence is the raw scaled similarity).
        temperature: of the coarse similarities.
        threshold: matches score above it.
        border_removal: cells next to the image border, or to masked cells, that take part in no match.
        subpixel_channels: last channels of the fine features, kept for the sub-pixel stage.
        subpixel_temperature: of the 3x3 soft-argmax.
        centred_subpixel: put that 3x3 neighbourhood around the matched pixel. The released weights were trained with
            one that lies a pixel up and left of it (and wraps around at the window's edge), hence the default.
        gradient_mode: default of the matcher's ``mode``: how keypoints depend on features, see
            ``docs/differentiability.md``.
        soft_temperature: of the joint window probability whose expectation the soft positions are.
        soft_neighbourhood: odd side, in cells, of the coarse expectation of the soft positions; 1 leaves it out.
        covariance_calibration: seven numbers that fit the covariances of ``forward(covariance=True)`` to errors, see
            :func:`eloftr_ops.model.covariance.calibrated_covariances`. The default leaves the windows' moments as they
            are; ``eloftr-ops calibrate`` fits them to weights.

    Raises:
        ValueError: a value outside its domain; the message names the field.
        TypeError: a value of another type.
    """

    stage_channels: tuple[int, int, int, int] = (64, 64, 128, 256)
    stage_blocks: tuple[int, int, int, int] = (1, 2, 4, 14)
    num_layers: int = 4
    num_heads: int = 8
    position_scale: tuple[float, float] = (1.0, 1.0)
    round_rotary: bool = True
    score: ScoreKind = "dual_softmax"
    temperature: float = 0.1
    threshold: float = 0.2
    border_removal: int = 2
    subpixel_channels: int = 8
    subpixel_temperature: float = 10.0
    centred_subpixel: bool = False
    gradient_mode: GradientMode = "hard"
    soft_temperature: float = 1.0
    soft_neighbourhood: int = 3
    covariance_calibration: tuple[float, ...] = (0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0)

    def __post_init__(self) -> None:
        for name, length, kind in (
            ("stage_channels", 4, int),
            ("stage_blocks", 4, int),
            ("position_scale", 2, float),
        ):
            object.__setattr__(self, name, _positive_tuple(name, getattr(self, name), length, kind))
        object.__setattr__(self, "covariance_calibration", _calibration(self.covariance_calibration))
        for name in ("num_layers", "num_heads", "subpixel_channels", "soft_neighbourhood"):
            _check_int(name, getattr(self, name), minimum=1)
        _check_int("border_removal", self.border_removal, minimum=0)
        for name in ("temperature", "subpixel_temperature", "soft_temperature"):
            _check_scale(name, getattr(self, name))
        check_choice("score", self.score, ScoreKind)
        check_choice("gradient_mode", self.gradient_mode, GradientMode)
        for name in ("round_rotary", "centred_subpixel"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {getattr(self, name)!r}.")
        self._check_relations()

    def _check_relations(self) -> None:
        if self.coarse_channels % (4 * self.num_heads):
            raise ValueError(
                f"stage_channels[3]: expected a multiple of 4 * num_heads = {4 * self.num_heads}, "
                f"got {self.coarse_channels}."
            )
        if self.subpixel_channels >= self.fine_channels:
            raise ValueError(
                f"subpixel_channels: expected fewer than the fine channels, stage_channels[1] = {self.fine_channels}, "
                f"got {self.subpixel_channels}."
            )
        if self.soft_neighbourhood % 2 == 0 or self.soft_neighbourhood > _WIDEST:
            raise ValueError(
                f"soft_neighbourhood: expected an odd number of at most {_WIDEST}, got {self.soft_neighbourhood}."
            )
        threshold = _number("threshold", self.threshold)
        if threshold != threshold or (self.score == "dual_softmax" and not 0 <= threshold <= 1):
            raise ValueError(f"threshold: expected a probability in [0, 1] with dual_softmax, got {threshold!r}.")

    @property
    def coarse_channels(self) -> int:
        """Width C of the coarse map."""
        return self.stage_channels[3]

    @property
    def fine_channels(self) -> int:
        """Width D of the fine map."""
        return self.stage_channels[1]

    @classmethod
    def preset(cls, name: str) -> EfficientLoFTRConfig:
        """``full`` (the authors' model), ``optimized`` (the same without softmax) or ``small`` (the embedded one).

        Raises:
            ValueError: unknown name.
        """
        if name not in _PRESETS:
            raise ValueError(f"name: expected one of {', '.join(_PRESETS)}, got {name!r}.")
        return cls(**_PRESETS[name])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EfficientLoFTRConfig:
        """Build from plain data, as :meth:`to_dict` gives it; lists become tuples.

        Raises:
            ValueError: an unknown field, named with the known ones.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"Unknown configuration field(s) {', '.join(unknown)}; known: {', '.join(known)}.")
        return cls(**dict(values))

    def to_dict(self) -> dict[str, Any]:
        """Plain data that :meth:`from_dict` and JSON take."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}

    def architecture_changes(self, other: EfficientLoFTRConfig) -> list[str]:
        """Names of the fields that shape the weights and differ in ``other``."""
        return [name for name in _ARCHITECTURE if getattr(self, name) != getattr(other, name)]

    def replace(self, **changes: Any) -> EfficientLoFTRConfig:
        """Copy with some fields changed, validated again; unknown fields are refused."""
        return self.from_dict({**self.to_dict(), **changes})


_PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "optimized": {"score": "similarity", "threshold": 25.0},
    "small": {
        "stage_channels": (24, 24, 48, 96),
        "stage_blocks": (1, 1, 2, 7),
        "num_heads": 6,
        "centred_subpixel": True,
    },
}


def _positive_tuple(name: str, value: Any, length: int, kind: type) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, (tuple, list)) or len(value) != length:
        raise ValueError(f"{name}: expected {length} numbers, got {value!r}.")
    if kind is int:
        for item in value:
            _check_int(name, item, minimum=1)
    else:
        for item in value:
            _check_scale(name, item)
    return tuple(kind(item) for item in value)


def _calibration(value: Any) -> tuple[float, ...]:
    """Seven numbers whose exponentials neither overflow nor vanish; the last is a weight."""
    name = "covariance_calibration"
    if isinstance(value, str) or not isinstance(value, (tuple, list)) or len(value) != 7:
        raise ValueError(f"{name}: expected 7 numbers, got {value!r}.")
    numbers = tuple(_number(name, item) for item in value)
    if not all(abs(item) <= _STEEPEST for item in numbers) or numbers[-1] < 0:
        raise ValueError(f"{name}: expected numbers in [-{_STEEPEST}, {_STEEPEST}], the last >= 0, got {value!r}.")
    return numbers


def _check_int(name: str, value: Any, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {value!r}.")
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}.")


def _check_scale(name: str, value: Any) -> None:
    """A positive number that neither overflows nor vanishes when scores or positions are multiplied by it."""
    if not 1 / _LARGEST_SCALE <= _number(name, value) <= _LARGEST_SCALE:
        raise ValueError(
            f"{name}: expected a positive number in [{1 / _LARGEST_SCALE:g}, {_LARGEST_SCALE:g}], got {value!r}."
        )


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}.")
    return float(value)
