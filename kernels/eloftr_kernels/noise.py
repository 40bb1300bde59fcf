# SPDX-License-Identifier: Apache-2.0
"""Noise from counters: what is drawn for an element depends on its seed and its indices alone.

So a draw does not depend on the batch around a pair, on the size of blocks, on the device, or on whether it is
recomputed. Integers are mixed by the finaliser of MurmurHash3 (Austin Appleby, public domain), in int32 that wraps.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 2.0**-32  # of the uniform numbers; the largest Gumbel number is about 22


def mixed(x: Tensor) -> Tensor:
    """int32 of any shape -> int32: a bijection whose every output bit depends on every input bit."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x.mul_(-0x7A143595)  # 0x85EBCA6B
    x.bitwise_xor_((x >> 13).bitwise_and_(0x7FFFF))
    x.mul_(-0x3D4D51CB)  # 0xC2B2AE35
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def keys(seeds: Tensor, stream: Tensor | int = 0) -> Tensor:
    """One int32 key for each int64 seed and stream; ``stream`` broadcasts to ``seeds``."""
    stream = torch.as_tensor(stream, device=seeds.device)
    key = torch.zeros((), dtype=torch.int32, device=seeds.device)
    for part in (seeds, seeds >> 31, stream):
        key = mixed(key + 0x2545F491) ^ (part & 0x7FFFFFFF).to(torch.int32)
    return mixed(key)


def counters(start: int, count: int, device: torch.device) -> Tensor:
    """(count,) int32 keys of the indices from ``start`` on."""
    return mixed(torch.arange(start, start + count, device=device, dtype=torch.int32))


def gumbel(row_keys: Tensor, column_keys: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, one for each pair of keys; the keys broadcast."""
    bits = mixed(row_keys ^ column_keys).bitwise_and_(0x7FFFFFFF)
    uniform = bits.float().mul_(2.0**-31).clamp_(_LEAST, 1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()
