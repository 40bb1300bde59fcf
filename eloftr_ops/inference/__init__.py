# SPDX-License-Identifier: Apache-2.0
"""Other ways to run the weights of a matcher: an optimized copy, CPU inference, fixed shapes, exported graphs."""
