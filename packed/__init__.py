"""The product of rows with a matrix, which may stay packed in memory, in 8 or 4 bits.

    8 bits: one scale a row                      value = q * scale
    4 bits: groups of 32 to 256 columns of a row   value = (q - 8) * scale + zero

A token alone reads every weight once, so a matrix of half or a quarter of the bytes is that much
faster: torch has kernels for it. Many rows, as in a prompt, are bound by arithmetic. There the
matrix is widened once and multiplied as any other, by most CPUs in float32.

torch keeps 4 bits in an order of its own, by device and processor. It is not documented, so it is
measured (`find_layout`): numbers are packed, and their places read. The kernels are private. Where
one is missing or gives another result than the formula, or a shape does not suit it, the matrix is
widened for one row too: as small, but slow.

Shapes: t rows of x, N rows and K columns of a matrix, g columns of a group.
"""

import functools
import platform
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 32  # columns that share a scale where we quantise; larger groups are hardly faster
GROUPS = (32, 64, 128, 256)  # what the kernels take
# Rows up to which a packed product takes less time than widening and a plain product, by bits:
# measured on two cores with AVX-512 and bfloat16, matrices of SmolLM2 and Qwen2.5-0.5B.
FEW_ROWS = {8: 64, 4: 128}
CHUNK = 2**19  # numbers quantised or widened at a time
# Rows from which an x86 CPU without matrix units multiplies half precision faster in float32: on
# two cores with AVX512-BF16 300 GFLOP/s, in bfloat16 173. One row is bound by reading.
MANY_ROWS = 128
PIECE = 2**21  # numbers of a matrix in float32 at a time
TILES = {"cpu": ((64, 1), (32, 1), (16, 1)), "cuda": ((8, 128), (8, 64), (8, 32))}  # of int4
PROBE_COLUMNS = 256


@dataclass(frozen=True)
class Layout:
    """The order of 4-bit numbers: tiles of (rows, columns), one row of tiles after the other.

    A tile's bytes hold first its low, then its high nibbles; `order` (rows * columns) says where
    each number of the tile, row by row, is among them; None: tiles of one column, in order.
    """

    rows: int
    columns: int
    order: Tensor | None

    @property
    def places(self) -> Tensor:
        """Where the numbers of each row are in a tile: (rows, columns)."""
        order = self.order
        if order is None:
            order = torch.arange(self.rows * self.columns)
        return order.view(self.rows, self.columns)


PAIRS = Layout(1, 2, torch.tensor([1, 0]))  # two columns a byte, the first in the high nibble


@dataclass(frozen=True)
class Packed:
    """A matrix (N, K) in 8 bits, or in 4 if there is a `zero`; values are of the scale's dtype."""

    q: Tensor  # int8 (N, K); 4 bits: uint8 (N, K/2), see `pair`, once prepared in a layout's order
    scale: Tensor  # (N,); 4 bits: (N, K/g)
    zero: Tensor | None = None  # (N, K/g)
    layout: Layout = PAIRS
    has_kernel: bool = False  # see `prepare`

    @property
    def bits(self) -> int:
        return 8 if self.zero is None else 4

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.q), self.q.shape[1] * 8 // self.bits

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.shape[1] // (1 if self.zero is None else self.scale.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        return self.scale.dtype

    @property
    def nbytes(self) -> int:
        zero = 0 if self.zero is None else self.zero.nbytes
        return self.q.nbytes + self.scale.nbytes + zero

    def __len__(self) -> int:
        return len(self.q)


def matrix_bytes(shape: tuple[int, int], bits: int, group: int, dtype: torch.dtype) -> int:
    """Return what a matrix (N, K) takes; bits 0: a plain one."""
    n_rows, n_columns = shape
    if bits == 0:
        return n_rows * n_columns * dtype.itemsize
    if bits == 8:
        return n_rows * (n_columns + dtype.itemsize)
    return n_rows * (n_columns // 2 + 2 * n_columns // group * dtype.itemsize)


# ---- making one ---------------------------------------------------------------------------


def empty(n_rows: int, n_columns: int, bits: int, dtype: torch.dtype, group: int = GROUP) -> Packed:
    """Return a matrix for `fill`; raise ValueError if groups do not divide its columns."""
    if bits == 8:
        q = torch.empty(n_rows, n_columns, dtype=torch.int8)
        return Packed(q, torch.empty(n_rows, dtype=dtype))
    check_group(n_columns, group)
    q = torch.empty(n_rows, n_columns // 2, dtype=torch.uint8)
    scale = torch.empty(n_rows, n_columns // group, dtype=dtype)
    return Packed(q, scale, torch.empty_like(scale))


def check_group(n_columns: int, group: int) -> None:
    if group not in GROUPS or n_columns % group:
        raise ValueError(
            f"groups of {group} do not suit {n_columns} columns; they must be of "
            f"{', '.join(map(str, GROUPS))} and divide the columns"
        )


def fill(w: Packed, start: int, values: Tensor) -> int:
    """Quantise values (n, K), which become rows start..start+n-1; return where the next begin.

    The scale is rounded first, so that the numbers make up for it.
    """
    values = values.float()
    rows = slice(start, start + len(values))
    if w.bits == 8:
        scale = w.scale[rows].copy_(values.abs().amax(1) / 127).float()
        w.q[rows] = (values / at_least(scale)[:, None]).round().clamp(-127, 127)
        return rows.stop
    groups = values.unflatten(1, (-1, w.group))  # (n, K/g, g)
    low, high = groups.aminmax(dim=2)
    scale = w.scale[rows].copy_((high - low) / 15).float()
    zero = w.zero[rows].copy_(low + 8 * scale).float()
    q = (groups - zero[..., None]) / at_least(scale)[..., None] + 8
    w.q[rows] = pair(q.round().clamp(0, 15).to(torch.uint8).flatten(1))
    return rows.stop


def put(w: Packed, start: int, q: Tensor, scale: Tensor, zero: Tensor) -> int:
    """Copy 4-bit numbers 0..15 (n, K), scale and zero (n, K/g) to rows from start on.

    Returns where the next begin.
    """
    rows = slice(start, start + len(q))
    w.q[rows] = pair(q)
    w.scale[rows] = scale
    w.zero[rows] = zero
    return rows.stop


def at_least(scale: Tensor) -> Tensor:
    """Return scales to divide by: of a row of zeros, any."""
    return scale.clamp(min=torch.finfo(torch.float32).tiny)


def quantise(matrix: Tensor, bits: int, dtype: torch.dtype, group: int = GROUP) -> Packed:
    """Return a dense matrix (N, K) packed, a few rows at a time."""
    w = empty(*matrix.shape, bits, dtype, group)
    start = 0
    for rows in matrix.split(rows_at_once(w.shape[1])):
        start = fill(w, start, rows)
    return w


def rows_at_once(n_columns: int) -> int:
    """Return how many rows to handle at a time: whole tiles of any layout."""
    return max(1, CHUNK // n_columns // 128) * 128


def pair(q: Tensor) -> Tensor:
    """Put two columns of numbers 0..15 (N, K) in a byte, (N, K/2) uint8."""
    return q[:, ::2] << 4 | q[:, 1::2]


# ---- torch's kernels ----------------------------------------------------------------------


def int8_product(x: Tensor, w: Packed) -> Tensor:
    return torch._weight_int8pack_mm(x.contiguous(), w.q, w.scale)


def int4_product(x: Tensor, w: Packed) -> Tensor:
    scales = w.scale.t()  # views of one tensor (K/g, N, 2), see `prepare`
    scales = scales.as_strided((*scales.shape, 2), (*scales.stride(), 1))
    if w.q.is_cuda:
        n_rows, n_columns = w.shape
        inner = w.layout.columns // 16
        q = w.q.view(torch.int32).view(n_rows // 8, -1, 32, inner // 2)
        return torch._weight_int4pack_mm(x.contiguous(), q, w.group, scales)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), w.q, w.group, scales)


def int4_pack(pairs: Tensor, layout: Layout) -> Tensor:
    """Return the bytes of 4-bit numbers, (N, K/2) in pairs, in the order of torch's kernel."""
    if pairs.is_cuda:
        packed = torch._convert_weight_to_int4pack(pairs, layout.columns // 16)
        return packed.view(torch.uint8).view(pairs.shape)
    q = torch.stack([pairs >> 4, pairs & 15], -1).flatten(1)
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1).view(pairs.shape)


def prepare(w: Packed, device: torch.device) -> Packed:
    """Move a matrix to a device, in the order of torch's kernel where that can be used.

    May overwrite `w`.
    """
    if w.zero is None:
        has_kernel = w.shape[1] % 16 == 0 and has_int8(device.type, w.dtype)  # else it reads beyond
        return Packed(w.q.to(device), w.scale.to(device), has_kernel=has_kernel)
    layout = find_layout(w.shape, w.group, device.type, w.dtype)
    return prepare_in(w, layout or PAIRS, device)


def prepare_in(w: Packed, layout: Layout, device: torch.device) -> Packed:
    """Move a matrix of 4 bits to a device, in a layout, a few rows at a time."""
    n_rows, n_columns = w.shape
    scales = torch.empty(w.scale.shape[1], n_rows, 2, dtype=w.dtype, device=device)
    scales[..., 0] = w.scale.t()
    scales[..., 1] = w.zero.t()
    scale, zero = (part.t() for part in scales.unbind(2))  # views, (N, K/g)
    if layout is PAIRS:
        return Packed(w.q.to(device), scale, zero)
    q = w.q if w.q.device == device else torch.empty_like(w.q, device=device)
    few = rows_at_once(n_columns)
    for rows, pairs in zip(q.split(few), w.q.split(few)):
        rows.copy_(int4_pack(pairs.to(device), layout))
    return Packed(q, scale, zero, layout, has_kernel=True)


def find_layout(shape: tuple, group: int, device: str, dtype: torch.dtype) -> Layout | None:
    """Return the order of torch's int4 kernel for a shape; None where it cannot be used."""
    for rows, columns in TILES.get(device, ()):
        if group in GROUPS and shape[0] % rows == 0 and shape[1] % columns == 0:
            layout = measure_layout(rows, columns, device, dtype)
            if layout is not None:
                return layout
    return None


@functools.cache
def measure_layout(rows: int, columns: int, device: str, dtype: torch.dtype) -> Layout | None:
    """Return torch's layout in tiles of a size, or None: its tiles have another, or it has none."""
    try:
        order = measure_order(rows, columns, device)
        layout = Layout(rows, columns, order)
        return layout if int4_works(layout, device, dtype) else None
    except (RuntimeError, AttributeError):
        return None


def measure_order(rows: int, columns: int, device: str) -> Tensor | None:
    """Return where each number of a tile is packed: each tells its own place, 4 bits at a time."""
    n = rows * columns
    own = torch.arange(n, device=device)
    found = torch.zeros_like(own)
    shape = Layout(rows, columns, None)
    for shift in range(0, n.bit_length(), 4):
        q = torch.zeros(rows, PROBE_COLUMNS, dtype=torch.uint8, device=device)
        q[:, :columns] = (own >> shift & 15).view(rows, columns)
        tile = int4_pack(pair(q), shape).flatten()[: n // 2]
        found += torch.cat([tile & 15, tile >> 4]).long() << shift
    order = found.argsort()
    return None if columns == 1 and torch.equal(order, own) else order


def int4_works(layout: Layout, device: str, dtype: torch.dtype) -> bool:
    """Return whether the kernel's product of random numbers is that of the formula."""
    rng = torch.Generator().manual_seed(0)
    n_rows = 2 * layout.rows
    q = torch.randint(16, (n_rows, PROBE_COLUMNS), generator=rng, dtype=torch.uint8)
    scale, zero = torch.rand(2, n_rows, PROBE_COLUMNS // GROUP, generator=rng).to(dtype)
    w = prepare_in(Packed(pair(q), scale, zero), layout, torch.device(device))
    x = torch.randn(3, PROBE_COLUMNS, generator=rng).to(device, dtype)
    return is_close(int4_product(x, w), x, w) and torch.equal(unpack(w, 0, n_rows).cpu(), q.t())


@functools.cache
def has_int8(device: str, dtype: torch.dtype) -> bool:
    """Return whether torch's int8 kernel is there, and right."""
    rng = torch.Generator().manual_seed(0)
    q = torch.randint(-127, 128, (64, 64), generator=rng, dtype=torch.int8).to(device)
    w = Packed(q, torch.rand(64, generator=rng).to(device, dtype))
    x = torch.randn(3, 64, generator=rng).to(device, dtype)
    try:
        return is_close(int8_product(x, w), x, w)
    except (RuntimeError, AttributeError):
        return False


def is_close(out: Tensor, x: Tensor, w: Packed) -> bool:
    exact = x.double() @ widen(w).double().t()
    return bool((out - exact).abs().max() <= 0.02 * exact.abs().max())


# ---- using one ----------------------------------------------------------------------------


def linear(x: Tensor, w: Tensor | Packed, bias: Tensor | None = None) -> Tensor:
    """Return x (t, K) times w (N, K), transposed, plus bias (N,): (t, N)."""
    w = opened(w, len(x))
    if isinstance(w, Packed):
        product = int8_product if w.zero is None else int4_product
        out = product(x, w)
        return out if bias is None else out.add_(bias)
    if w.is_mkldnn:  # in oneDNN's blocks (loading/weights.py)
        return torch.ops.mkldnn._linear_pointwise.default(x, w, bias, "none", [], "")
    if not in_float32(x, len(x)):
        return F.linear(x, w, bias)
    wide = x.float()
    out = x.new_empty(len(x), len(w))
    for rows in pieces(w):
        of_bias = None if bias is None else bias[rows].float()
        out[:, rows] = F.linear(wide, w[rows].float(), of_bias)
    return out


def opened(w: Tensor | Packed, n_rows: int, chunk: int | None = None) -> Tensor | Packed:
    """Return a matrix as it is best for the product with n_rows rows: as it is, or plain.

    chunk: rows at a time, if the product is made in several.
    """
    if isinstance(w, Tensor):
        at_once = n_rows if chunk is None else min(n_rows, chunk)
        return w.to_dense() if w.is_mkldnn and in_float32(w, at_once) else w
    if w.has_kernel and n_rows <= FEW_ROWS[w.bits]:
        return w
    return widen(w)


def in_float32(x: Tensor, n_rows: int) -> bool:
    """Return whether products of n_rows rows in the dtype of x are computed in float32."""
    return n_rows >= MANY_ROWS and prefers_float32(x.device.type, x.dtype)


@functools.cache
def prefers_float32(device: str, dtype: torch.dtype) -> bool:
    """Return whether a device multiplies many rows faster in float32 than in a dtype."""
    if device != "cpu" or dtype.itemsize != 2 or platform.machine() not in ("x86_64", "AMD64"):
        return False
    has_units = {
        torch.bfloat16: torch.cpu._is_amx_tile_supported,
        torch.float16: torch.cpu._is_amx_fp16_supported,
    }
    return not has_units[dtype]()


def pieces(w: Tensor) -> list[slice]:
    """Return the rows of a matrix that are widened to float32 at a time."""
    n_rows = max(1, PIECE // w.shape[1])
    return [slice(start, start + n_rows) for start in range(0, len(w), n_rows)]


def widen(w: Packed) -> Tensor:
    """Return a packed matrix as a plain one (N, K), which may be laid out by columns."""
    if w.zero is None:
        return torch.empty_like(w.q, dtype=w.dtype).copy_(w.q).mul_(w.scale[:, None])
    n_rows, n_columns = w.shape
    wide = torch.empty(n_columns, n_rows, dtype=w.dtype, device=w.q.device)  # by columns
    scale = w.scale.t().float()  # (K/g, N)
    zero = w.zero.t().float() - 8 * scale
    few = rows_at_once(n_columns)
    for start in range(0, n_rows, few):
        rows = slice(start, start + few)
        q = unpack(w, start, start + few).float().unflatten(0, (-1, w.group))  # (K/g, g, n)
        q.mul_(scale[:, None, rows]).add_(zero[:, None, rows])
        wide[:, rows] = q.flatten(0, 1)
    return wide.t()


def unpack(w: Packed, start: int, stop: int) -> Tensor:
    """Return the numbers 0..15 of some rows of 4 bits, by columns: (K, n)."""
    tile = w.layout
    n_columns = w.shape[1]
    q = w.q[start:stop].view(-1, n_columns // tile.columns, tile.rows * tile.columns // 2)
    q = torch.cat([q & 15, q >> 4], -1)
    if tile.order is not None:
        q = q[..., tile.order.to(q.device)]
    q = q.unflatten(-1, (tile.rows, tile.columns))  # (N/rows, K/columns, rows, columns)
    return q.permute(1, 3, 0, 2).reshape(n_columns, -1)


def add_product(x: Tensor, out: Tensor, w: Tensor | Packed) -> None:
    """Add out (t, K) times w (N, K), transposed, to x (t, N) in place."""
    w = opened(w, len(out))
    if isinstance(w, Packed):
        x.add_(linear(out, w))
    elif w.is_mkldnn:
        x.copy_(torch.ops.mkldnn._linear_pointwise.binary(out, x, w, None, "add"))
    elif in_float32(out, len(out)):
        wide = out.float()
        for rows in pieces(w):
            x[:, rows] += wide @ w[rows].float().t()
    else:
        x.addmm_(out, w.t())


def rows_of(w: Tensor | Packed, ids: Tensor) -> Tensor:
    """Return some rows (t, K) of an embedding."""
    if isinstance(w, Tensor):
        return w[ids]
    if w.zero is None:
        return w.q[ids].to(w.dtype) * w.scale[ids, None]
    q = numbers_of(w, ids).float().unflatten(1, (-1, w.group))  # (t, K/g, g)
    scale = w.scale[ids].float()[..., None]
    zero = w.zero[ids].float()[..., None] - 8 * scale
    return (q * scale + zero).flatten(1).to(w.dtype)


def numbers_of(w: Packed, ids: Tensor) -> Tensor:
    """Return the numbers 0..15 (t, K) of some rows of 4 bits."""
    tile = w.layout
    half = tile.rows * tile.columns // 2
    tiles = w.q.view(len(w) // tile.rows, -1, half)
    places = tile.places.to(ids.device)[ids % tile.rows][:, None]  # (t, 1, columns)
    across = torch.arange(tiles.shape[1], device=ids.device)[None, :, None]
    bytes_of = tiles[(ids // tile.rows)[:, None, None], across, places % half]
    return torch.where(places < half, bytes_of & 15, bytes_of >> 4).flatten(1)
