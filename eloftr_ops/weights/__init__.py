# SPDX-License-Identifier: Apache-2.0
"""Loading and saving weights: the embedded model, the authors' checkpoints, transformers' folders, the Hub.

No code in a file is executed: files are safetensors or JSON, or are read by ``torch.load(weights_only=True)``.
"""

from eloftr_ops.weights.files import WeightsNotFoundError
from eloftr_ops.weights.loading import embedded_names, load_pretrained
from eloftr_ops.weights.saving import save_pretrained, write_embedded

__all__ = ["WeightsNotFoundError", "embedded_names", "load_pretrained", "save_pretrained", "write_embedded"]
