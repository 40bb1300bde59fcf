# SPDX-License-Identifier: Apache-2.0
"""``reference.py`` has the formula, ``op.py`` the operator, ``kernel.py`` and ``kernel_backward.py`` its kernels."""
