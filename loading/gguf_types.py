"""The types of GGUF's matrices that are common, widened by torch: several times as fast as gguf.

A row is made of blocks of 32 or 256 numbers. A block has its numbers in pieces, some bits in one
run of bytes and the rest in another, and the scales of its groups. Every function takes rows of
blocks (n, blocks, bytes) and returns numbers and scales; `gguf.dequantize` says the same values.
"""

import numpy as np
import torch
from torch import Tensor

from loading.quantised import Rows

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def half(blocks: Tensor, at: int) -> Tensor:
    """Return the float16 at a byte of every block (n, blocks, 1), in float32."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).float()


def bits(x: Tensor, step: int) -> Tensor:
    """Return each byte's bits, `step` at a time: (..., bytes) to (..., 8 / step, bytes)."""
    shifts = torch.arange(0, 8, step, dtype=torch.uint8)
    return x[..., None, :] >> shifts[:, None] & 2**step - 1


def nibbles(blocks: Tensor, at: int, width: int) -> Tensor:
    """Return 4-bit numbers from a byte on: of each run of bytes the low halves, then the high."""
    runs = blocks[..., at:].contiguous().unflatten(-1, (-1, width))
    return torch.stack((runs & 15, runs >> 4), -2).flatten(-3)


# The bits of every byte, each as 16 in a byte of its own: eight bytes, looked up as one number.
FIFTH = (bits(torch.arange(256, dtype=torch.uint8), 1).T << 4).contiguous().view(torch.int64)[:, 0]


def rows(q: Tensor, scale: Tensor, zero: int = 0, add: Tensor | None = None) -> Rows:
    """Return the rows of q (n, blocks, numbers), scale and add (n, blocks, groups)."""
    return Rows(
        q.flatten(1),
        scale.flatten(1),
        zero=torch.tensor([[zero]]) if zero else None,
        add=None if add is None else add.flatten(1),
    )


def fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """Return the bits of four bytes (n, blocks, 32), as what they add to 4-bit numbers."""
    return FIFTH[blocks[..., at : at + 4].int()].view(torch.uint8)


def scales_6_bits(blocks: Tensor, at: int) -> tuple[Tensor, Tensor]:
    """Return eight scales and eight minima of 6 bits, from twelve bytes (n, blocks, 8)."""
    low, high, rest = blocks[..., at : at + 12].unflatten(-1, (3, 4)).unbind(-2)
    scale = torch.cat((low & 63, rest & 15 | low >> 2 & 48), -1)
    least = torch.cat((high & 63, rest >> 4 | high >> 2 & 48), -1)
    return scale.float(), least.float()


def q4_0(blocks: Tensor) -> Rows:
    return rows(nibbles(blocks, 2, 16), half(blocks, 0), zero=8)


def q4_1(blocks: Tensor) -> Rows:
    return rows(nibbles(blocks, 4, 16), half(blocks, 0), add=half(blocks, 2))


def q5_0(blocks: Tensor) -> Rows:
    q = nibbles(blocks, 6, 16) | fifth_bits(blocks, 2)
    return rows(q, half(blocks, 0), zero=16)


def q5_1(blocks: Tensor) -> Rows:
    q = nibbles(blocks, 8, 16) | fifth_bits(blocks, 4)
    return rows(q, half(blocks, 0), add=half(blocks, 2))


def q8_0(blocks: Tensor) -> Rows:
    return rows(blocks[..., 2:].contiguous().view(torch.int8), half(blocks, 0))


def q4_k(blocks: Tensor) -> Rows:
    scale, least = scales_6_bits(blocks, 4)
    return rows(nibbles(blocks, 16, 32), half(blocks, 0) * scale, add=-(half(blocks, 2) * least))


def q5_k(blocks: Tensor) -> Rows:
    scale, least = scales_6_bits(blocks, 4)
    fifth = bits(blocks[..., 16:48], 1).flatten(-2) << 4
    q = nibbles(blocks, 48, 32) | fifth
    return rows(q, half(blocks, 0) * scale, add=-(half(blocks, 2) * least))


def q6_k(blocks: Tensor) -> Rows:
    low = nibbles(blocks[..., :128], 0, 64)
    high = bits(blocks[..., 128:192].unflatten(-1, (2, 32)), 2).flatten(-3) << 4
    scale = blocks[..., 192:208].contiguous().view(torch.int8).float()
    return rows(low | high, half(blocks, 208) * scale, zero=32)


TYPES = {  # name of a type: (bytes of a block, its function, columns of a group of 4-bit numbers)
    "Q4_0": (18, q4_0, 32),
    "Q4_1": (20, q4_1, 32),
    "Q5_0": (22, q5_0, 0),
    "Q5_1": (24, q5_1, 0),
    "Q8_0": (34, q8_0, 0),
    "Q4_K": (144, q4_k, 32),
    "Q5_K": (176, q5_k, 0),
    "Q6_K": (210, q6_k, 0),
}


def widen(raw: np.ndarray, kind, package) -> Tensor:
    """Return rows (n, K) in float32, from their bytes (n, bytes)."""
    if kind.name in PLAIN:
        return torch.from_numpy(raw).view(PLAIN[kind.name]).float()
    if kind.name in TYPES:
        return split(raw, kind).widen()
    return torch.from_numpy(package.dequantize(raw, kind))


def split(raw: np.ndarray, kind) -> Rows:
    """Return the numbers and scales of rows, for one of TYPES."""
    n_bytes, function, _ = TYPES[kind.name]
    return function(torch.from_numpy(raw).unflatten(1, (-1, n_bytes)))
