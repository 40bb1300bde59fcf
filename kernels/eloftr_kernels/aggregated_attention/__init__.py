# SPDX-License-Identifier: Apache-2.0
"""See ``reference.py`` for the formula."""
