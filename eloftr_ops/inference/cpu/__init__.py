# SPDX-License-Identifier: Apache-2.0
"""How a CPU runs the stages of a matcher without gradient."""
