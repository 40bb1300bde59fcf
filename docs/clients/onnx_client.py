# SPDX-License-Identifier: Apache-2.0
"""Match two images with an exported graph: ``python onnx_client.py model.onnx left.jpg right.jpg matches.csv``.

Needs numpy, pillow and onnxruntime.
"""

import sys

import numpy as np
import onnxruntime
from PIL import Image


def load(path: str, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The image as the graph takes it, (1, 1, height, width) in [0, 1], and its scale (x, y) to the file's pixels."""
    image = Image.open(path).convert("L")
    scale = np.array([image.width / width, image.height / height])
    pixels = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS), dtype=np.float32)
    return pixels[None, None] / np.float32(255), scale


def main(model: str, path0: str, path1: str, output: str) -> None:
    """Match the two images, and write x0, y0, x1, y1 and confidence of each match."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (image0, scale0), (image1, scale1) = (
        load(path, *value.shape[2:]) for path, value in zip((path0, path1), session.get_inputs(), strict=True)
    )
    names = ["keypoints0", "keypoints1", "confidence", "valid"]
    keypoints0, keypoints1, confidence, valid = session.run(names, {"image0": image0, "image1": image1})
    found = valid[0]  # the other rows are padding
    columns = [keypoints0[0, found] * scale0, keypoints1[0, found] * scale1, confidence[0, found, None]]
    np.savetxt(output, np.hstack(columns), delimiter=",", header="x0,y0,x1,y1,confidence", comments="")


if __name__ == "__main__":
    main(*sys.argv[1:])
