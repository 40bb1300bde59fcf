# SPDX-License-Identifier: Apache-2.0
"""Where to look next: a plan that asks for looks, and learns from what they find."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import NamedTuple

from eloftr_ops.efforts import Effort
from eloftr_ops.guided.looks import Found, Look, Setting, Support, support_of
from eloftr_ops.guided.straighten import differs, straightened
from eloftr_ops.guided.views import stages
from eloftr_ops.guided.warps import scaling

__all__ = ["Chain", "Plan", "plan"]

_STRAIGHTENED = {"fast": 0, "normal": 2, "thorough": 3}  # times, after the first look
_STRAIGHTENED_HINT = 3  # times, after a simulated view, which shows less
_HINTS = 4  # views of a stage that are followed up, the best ones
_LEAST_HINT = 0.3  # evidence; the best view of a stage is followed up with any
_ENOUGH = Support(inliers=80, evidence=40.0)  # no search then
_LOST = 0.7  # a look that keeps a smaller share of the inliers, and less evidence, went astray


class Chain(NamedTuple):
    """A look, and those that followed from it."""

    looks: tuple[Look, ...]
    found: tuple[Found, ...]
    support: Support  # the best of them

    def extended(self, look: Look, found: Found, support: Support) -> Chain:
        """The chain and one look more."""
        best = support if support.beats(self.support) else self.support
        return Chain((*self.looks, look), (*self.found, found), best)

    def suffices(self) -> bool:
        """Whether the matches agree so well that no search is needed."""
        return self.support.evidence >= _ENOUGH.evidence and self.support.inliers >= _ENOUGH.inliers


Plan = Generator[list[Look], list[Found], Chain]
"""Asks for looks, is sent what they found, and ends with the best chain."""


def plan(effort: Effort, setting: Setting, expired: Callable[[], bool]) -> Plan:
    """The looks of one pair.

    Args:
        effort: ``fast``: one look. ``normal``: straightened looks after it, where they change something. ``thorough``:
            simulated views, too, where the first look finds little.
        setting: sizes.
        expired: whether the time is spent; asked before every look but the first.
    """
    whole = [scaling(size, size) for size in setting.sizes]
    first = Look(whole[0], whole[1], "as they are")
    [found] = yield [first]
    chain = _chain(first, found)
    chain = yield from _straighten(chain, setting, expired, _STRAIGHTENED[effort])
    if effort == "thorough" and not chain.suffices():
        chain = yield from _search(chain, setting, expired)
    return chain


def _chain(look: Look, found: Found) -> Chain:
    return Chain((look,), (found,), support_of(look, found))


def _straighten(
    chain: Chain, setting: Setting, expired: Callable[[], bool], times: int, *, rough: bool = False
) -> Plan:
    """Look again through the warp that the last look gives, as long as that changes something.

    Args:
        chain: what was seen so far.
        setting: sizes.
        expired: whether the time is spent.
        times: looks, at most.
        rough: the last look was at a reduced size, so that looking again pays in any case.
    """
    for number in range(times):
        look = None if expired() else straightened(chain.looks[-1], chain.found[-1], setting)
        if look is None or not ((rough and number == 0) or differs(look, chain.looks[-1])):
            break
        [found] = yield [look]
        support = support_of(look, found)
        if support.inliers < _LOST * chain.support.inliers and not support.beats(chain.support):
            break
        chain = chain.extended(look, found, support)
    return chain


def _search(best: Chain, setting: Setting, expired: Callable[[], bool]) -> Plan:
    """Look through simulated views, and straighten what the best of them hint at, until the matches suffice."""
    for looks in stages(setting):
        hints: list[Chain] = []
        for start in range(0, len(looks), setting.at_once):
            if expired() or any(hint.suffices() for hint in hints):
                break
            asked = looks[start : start + setting.at_once]
            all_found = yield asked
            hints += [_chain(look, found) for look, found in zip(asked, all_found, strict=True)]
        hints.sort(key=lambda chain: (-chain.support.evidence, -chain.support.inliers))
        for rank, hint in enumerate(hints[:_HINTS]):
            if rank and hint.support.evidence < _LEAST_HINT:
                break
            chain = yield from _straighten(hint, setting, expired, _STRAIGHTENED_HINT, rough=True)
            if chain.support.beats(best.support):
                best = chain
            if best.suffices():
                return best
    return best
