# SPDX-License-Identifier: Apache-2.0
"""One module per op: the launches whose kernels ``benchmarks.compile_table`` compiles."""
