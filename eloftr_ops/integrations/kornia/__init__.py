# SPDX-License-Identifier: Apache-2.0
"""The model as a patch for kornia; see README.md."""
