# SPDX-License-Identifier: Apache-2.0
"""Without a GPU the kernels run in Triton's interpreter, which is chosen when their modules are imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from support.ops import interpret_bfloat16_as_gpus_do

    interpret_bfloat16_as_gpus_do()
