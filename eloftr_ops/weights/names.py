# SPDX-License-Identifier: Apache-2.0
"""Parameter names of the authors' checkpoints and of transformers, and ours: one table, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from eloftr_ops.config import WeightLayout

# (theirs, ours): the first pair that fits the head of a name renames it; {n} stands for a number.
_AUTHORS_HEADS = (
    ("backbone.layer0.", "backbone.stages.0.0."),
    ("backbone.layer{n}.{n}.", "backbone.stages.{n}.{n}."),
    ("fine_preprocess.layer3_outconv.", "pyramid.coarse_projection."),
    ("fine_preprocess.layer2_outconv.", "pyramid.quarter_projection."),
    ("fine_preprocess.layer2_outconv2.", "pyramid.quarter_fusion."),
    ("fine_preprocess.layer1_outconv.", "pyramid.half_projection."),
    ("fine_preprocess.layer1_outconv2.", "pyramid.half_fusion."),
)
_AUTHORS_TAILS = (
    ("rbr_dense.", "conv3x3."),
    ("rbr_1x1.", "conv1x1."),
    ("rbr_identity.", "identity."),
    ("rbr_reparam.", "fused."),
    ("mlp.0.", "expand."),
    ("mlp.2.", "contract."),
    ("norm1.", "token_norm."),
    ("norm2.", "update_norm."),
)
_TRANSFORMERS_HEADS = (
    ("efficientloftr.backbone.stages.{n}.blocks.{n}.", "backbone.stages.{n}.{n}."),
    ("efficientloftr.local_feature_transformer.layers.{n}.", "transformer.layers.{n}."),
    ("refinement_layer.out_conv.", "pyramid.coarse_projection."),
    ("refinement_layer.out_conv_layers.0.out_conv1.", "pyramid.quarter_projection."),
    ("refinement_layer.out_conv_layers.0.out_conv2.", "pyramid.quarter_fusion.0."),
    ("refinement_layer.out_conv_layers.0.batch_norm.", "pyramid.quarter_fusion.1."),
    ("refinement_layer.out_conv_layers.0.out_conv3.", "pyramid.quarter_fusion.3."),
    ("refinement_layer.out_conv_layers.1.out_conv1.", "pyramid.half_projection."),
    ("refinement_layer.out_conv_layers.1.out_conv2.", "pyramid.half_fusion.0."),
    ("refinement_layer.out_conv_layers.1.batch_norm.", "pyramid.half_fusion.1."),
    ("refinement_layer.out_conv_layers.1.out_conv3.", "pyramid.half_fusion.3."),
)
_TRANSFORMERS_TAILS = (
    ("conv1.conv.", "conv3x3.conv."),
    ("conv1.norm.", "conv3x3.bn."),
    ("conv2.conv.", "conv1x1.conv."),
    ("conv2.norm.", "conv1x1.bn."),
    ("aggregation.q_aggregation.", "aggregate."),
    ("aggregation.norm.", "token_norm."),
    ("attention.o_proj.", "merge."),
    ("attention.{w}_proj.", "{w}_proj."),
    ("mlp.fc1.", "expand."),
    ("mlp.fc2.", "contract."),
    ("mlp.layer_norm.", "update_norm."),
)
_TABLES: dict[WeightLayout, tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]] = {
    "eloftr_ops": ((), ()),
    "authors": (_AUTHORS_HEADS, _AUTHORS_TAILS),
    "transformers": (_TRANSFORMERS_HEADS, _TRANSFORMERS_TAILS),
}


def from_layout(name: str, layout: WeightLayout) -> str:
    """Our name of a parameter that ``layout`` calls ``name``; a name the table does not know comes back as it is."""
    if layout == "authors":
        name = re.sub(r"^loftr_coarse\.layers\.(\d+)\.", _attention_from_index, name)
    return _rename(name, layout, forward=True)


def to_layout(name: str, layout: WeightLayout) -> str:
    """The name that ``layout`` gives to our parameter ``name``."""
    name = _rename(name, layout, forward=False)
    if layout == "authors":
        name = re.sub(r"^transformer\.layers\.(\d+)\.(self|cross)_attention\.", _attention_to_index, name)
    return name


def _attention_from_index(match: re.Match[str]) -> str:
    index = int(match[1])
    return f"transformer.layers.{index // 2}.{'cross' if index % 2 else 'self'}_attention."


def _attention_to_index(match: re.Match[str]) -> str:
    return f"loftr_coarse.layers.{2 * int(match[1]) + (match[2] == 'cross')}."


def _rename(name: str, layout: WeightLayout, *, forward: bool) -> str:
    heads, tails = _TABLES[layout]
    name = _first_rule(name, heads, forward, lambda pattern: "^" + pattern)
    return _first_rule(name, tails, forward, lambda pattern: r"(?<=\.)" + pattern)


def _first_rule(name: str, rules: Iterable[tuple[str, str]], forward: bool, anchor: Callable[[str], str]) -> str:
    for theirs, ours in rules:
        source, target = (theirs, ours) if forward else (ours, theirs)
        pattern = re.escape(source).replace(r"\{n\}", r"(\d+)").replace(r"\{w\}", r"(\w)")
        match = re.search(anchor(pattern), name)
        if match:
            for group in match.groups():
                target = target.replace("{n}" if "{n}" in target else "{w}", group, 1)
            return name[: match.start()] + target + name[match.end() :]
    return name
