# SPDX-License-Identifier: Apache-2.0
"""Measurements: ``python -m benchmarks.run`` takes them, ``python -m benchmarks.report`` writes what the docs show."""
