# SPDX-License-Identifier: Apache-2.0
"""From a folder of photographs to a reconstruction: pairs, matches in bulk, tracks, a sparse model."""
