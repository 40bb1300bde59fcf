# SPDX-License-Identifier: Apache-2.0
"""The model of the paper, one file per stage: backbone, transformer, coarse, fine, matcher."""
