# SPDX-License-Identifier: Apache-2.0
"""A safetensors file written tensor by tensor, in any order, by one process or several: memory is one tensor.

NeMo's SALM reads one ``model.safetensors`` and no index of shards, so a large model is streamed into a single file.
"""

import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.int32: "I32",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def create(path: Path, layout: Layout) -> None:
    """A file with room for every tensor of ``layout``; its content is zeros until ``fill``."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in sorted(layout.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)


def fill(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Put tensors into their places; returns the names written.

    Raises:
        ValueError: a tensor that the file has no place for.
    """
    names = set()
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        for name, tensor in tensors:
            found = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape)}
            place = header.get(name, {})
            if any(place.get(key) != value for key, value in found.items()):
                raise ValueError(f"{path}: tensor {name!r} is {found}, expected {place or 'no such tensor'}")
            file.seek(8 + length + place["data_offsets"][0])
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            names.add(name)
    return names
