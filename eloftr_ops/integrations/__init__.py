# SPDX-License-Identifier: Apache-2.0
"""Interfaces of other libraries; each needs its library, an extra of this package."""
