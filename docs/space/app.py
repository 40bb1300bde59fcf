# SPDX-License-Identifier: Apache-2.0
"""The page as a Hugging Face Space."""

from eloftr_ops.app import serve

if __name__ == "__main__":
    serve()
