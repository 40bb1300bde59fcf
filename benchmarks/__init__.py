# SPDX-License-Identifier: Apache-2.0
"""Measurements; ``python -m benchmarks.cpu`` and its neighbours print what the docs quote."""
