# SPDX-License-Identifier: Apache-2.0
"""The name tables: one name there for one name here, over whole models."""

import pytest
import torch
from transformers import EfficientLoFTRConfig as TheirConfig
from transformers import EfficientLoFTRForKeypointMatching as TheirModel

from eloftr_ops import EfficientLoFTR, EfficientLoFTRConfig
from eloftr_ops.weights.names import from_layout, to_layout
from support.golden import reference


def names(*, fused: bool = False) -> list[str]:
    with torch.device("meta"):
        return list(EfficientLoFTR(EfficientLoFTRConfig(), fused=fused).state_dict())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("layout", ["eloftr_ops", "authors", "transformers"])
def test_names_survive_the_way_there_and_back(layout, fused):
    ours = names(fused=fused)
    theirs = [to_layout(name, layout) for name in ours]
    assert len(set(theirs)) == len(ours)
    assert [from_layout(name, layout) for name in theirs] == ours


def test_the_reference_statistics_are_all_ours():
    recorded = {key.removeprefix("bn/") for key in reference() if key.startswith("bn/")}
    statistics = {n for n in names() if n.endswith(("running_mean", "running_var"))}
    assert len(recorded) == 124
    assert {to_layout(name, "authors") for name in statistics} == recorded


def test_authors_names_of_both_forms():
    assert to_layout("backbone.stages.0.0.conv3x3.bn.weight", "authors") == "backbone.layer0.rbr_dense.bn.weight"
    assert to_layout("backbone.stages.3.13.fused.bias", "authors") == "backbone.layer3.13.rbr_reparam.bias"
    assert from_layout("loftr_coarse.layers.7.mlp.2.weight", "authors") == (
        "transformer.layers.3.cross_attention.contract.weight"
    )


def test_transformers_has_the_same_parameters_of_the_same_shapes():
    with torch.device("meta"):
        ours, theirs = EfficientLoFTR(EfficientLoFTRConfig()), TheirModel(TheirConfig())
    mine = {to_layout(name, "transformers"): tuple(t.shape) for name, t in ours.state_dict().items()}
    assert mine == {name: tuple(t.shape) for name, t in theirs.state_dict().items()}
