# SPDX-License-Identifier: Apache-2.0
"""The interface of ``transformers``' EfficientLoFTR, computed by this package; ``docs/transformers.md`` is its guide.

Change one import and keep the rest of the code: ``from eloftr_ops.integrations.transformers import ...``. Needs the
extra ``transformers``.
"""

from eloftr_ops.integrations.transformers._requirement import check_transformers

check_transformers()

from eloftr_ops.integrations.transformers.auto import (  # noqa: E402 - the check comes first
    AutoImageProcessor,
    AutoModel,
    AutoModelForKeypointMatching,
    register,
    unregister,
)
from eloftr_ops.integrations.transformers.configuration import EfficientLoFTRConfig  # noqa: E402
from eloftr_ops.integrations.transformers.image_processing import (  # noqa: E402
    EfficientLoFTRImageProcessor,
    EfficientLoFTRImageProcessorPil,
)
from eloftr_ops.integrations.transformers.modeling import (  # noqa: E402
    EfficientLoFTRForKeypointMatching,
    EfficientLoFTRModel,
    EfficientLoFTRPreTrainedModel,
)
from eloftr_ops.integrations.transformers.outputs import EfficientLoFTRKeypointMatchingOutput  # noqa: E402
from eloftr_ops.integrations.transformers.pipelines import KeypointMatchingPipeline, pipeline  # noqa: E402

__all__ = [
    "AutoImageProcessor",
    "AutoModel",
    "AutoModelForKeypointMatching",
    "EfficientLoFTRConfig",
    "EfficientLoFTRForKeypointMatching",
    "EfficientLoFTRImageProcessor",
    "EfficientLoFTRImageProcessorPil",
    "EfficientLoFTRKeypointMatchingOutput",
    "EfficientLoFTRModel",
    "EfficientLoFTRPreTrainedModel",
    "KeypointMatchingPipeline",
    "pipeline",
    "register",
    "unregister",
]
