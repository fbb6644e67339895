"""The rule that makes every weight and image of the ESCAPE and FMMP vectors from a name; numpy only.

Each tensor is one draw of standard normals from PCG64 seeded with crc32(official name), then scaled by kind.
"""
import re
import zlib

import numpy as np

overrides = [  # pattern, factor, offset
    (r"keypoint_head\.(superkeypoints|keypoints)$", 4.0, 0.0),
    (r"deconv\.deconv_layers\.7\.bias$", 1.0, -0.4),
    (r"predictor\.kpt_branch\.\d+\.mlp\.6\.weight$", 3.0, 0.0)]


def generator(name): return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def fill_tensor(name, shape):
    "The array that stands under the official `name`."
    if name.endswith("num_batches_tracked"): return np.zeros(shape, np.int64)
    draw = np.asarray(generator(name).standard_normal(tuple(shape)), np.float32)
    if name.endswith("running_mean"): out = np.float32(.1) * draw
    elif name.endswith("running_var"): out = np.abs(1 + np.float32(.1) * draw)
    elif len(shape) >= 2: out = draw * np.float32(np.sqrt(1 / np.prod(shape[1:])))
    elif len(shape) == 1 and not name.endswith("weight"): out = np.float32(.1) * draw
    else: out = 1 + np.float32(.1) * draw
    for pattern, factor, offset in overrides:
        if re.search(pattern, name): out = out * np.float32(factor) + np.float32(offset)
    return np.asarray(out, np.float32)


def image(tag, size=256, cells=8, amp=3.0, white=0.3):
    "(3,size,size) float32, as if normalised: colour blocks and noise."
    low = generator(tag + "/lo").standard_normal((3, cells, cells)).astype(np.float32)
    high = generator(tag + "/hi").standard_normal((3, size, size)).astype(np.float32)
    low = np.kron(low, np.ones((1, size // cells, size // cells), np.float32)).astype(np.float32)
    return np.float32(amp) * low + np.float32(white) * high
