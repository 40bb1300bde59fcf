# SPDX-License-Identifier: Apache-2.0
"""Aggregated attention: ``op.py`` holds the public function, ``naive.py`` the formula."""
