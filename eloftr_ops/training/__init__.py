# SPDX-License-Identifier: Apache-2.0
"""Ground truth for training, and the training loop."""
