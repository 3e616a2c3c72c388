"""Matrices that a checkpoint holds in few bits: read some rows at a time, widened on the way.

FORMATS says for each format which tensors make one matrix, and which function reads its rows. All
of them come down to one formula: a column belongs to a group, and

    value = (q - zero) * scale + add        q of each number, the others of its group in the row

Sources: vLLM's compressed-tensors, AutoAWQ, AutoGPTQ and GPTQModel, bitsandbytes, transformers.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CHUNK = 2**20  # numbers that are widened at a time, 4 MiB in float32
FLOATS = ("F64", "F32", "F16", "BF16")
EXACT = (32, 64, 128, 256)  # columns of a group that torch's 4-bit products take
UNREAD = re.compile(  # scales of activations and of the KV, which we keep in the dtype of the run
    r".*\.((input|output|activation|k|v)_(scale|zero_point)|weight_shape)"
)
HELP = (
    "only FP8, compressed-tensors (pack-, int-, float-quantized), AWQ (gemm), GPTQ and "
    "bitsandbytes nf4 are read, and weights that are not quantised; take a checkpoint in one of "
    "these"
)


@dataclass(frozen=True)
class Scheme:
    """How the matrices of a checkpoint are quantised, from its config.json."""

    format: str  # of FORMATS
    bits: int = 8
    group: int = 0  # columns that share a scale; 0: all of a row
    tile: tuple[int, int] | None = None  # rows and columns that share a scale
    plus: int = 0  # what GPTQ's first version takes off the zeros that it stores


@dataclass(frozen=True)
class Rows:
    """Some rows (n, K) of a matrix: value = (q - zero) * scale + add."""

    q: Tensor  # (n, K)
    scale: Tensor  # (n, G)
    zero: Tensor | None = None  # (n, G)
    group_of: Tensor | None = None  # (K,) of each column; None: groups of equal width
    add: Tensor | None = None  # (n, G)

    def widen(self) -> Tensor:
        """Return the values (n, K) in float32."""
        values = self.q.float()
        if self.group_of is None:
            values = values.unflatten(1, (self.scale.shape[1], -1))  # (n, G, K/G)
        if self.zero is not None:
            values -= self.of_columns(self.zero)
        values *= self.of_columns(self.scale)
        if self.add is not None:
            values += self.of_columns(self.add)
        return values.flatten(1)

    def of_columns(self, x: Tensor) -> Tensor:
        """Return a number of each group (n, G) so that it fits the numbers of the group."""
        return x.float()[..., None] if self.group_of is None else x.float()[:, self.group_of]

    def in_4_bits(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return q of 0..15, scale and zero with value = (q - 8) * scale + zero."""
        scale = self.scale.float()
        zero = torch.zeros_like(scale) if self.add is None else self.add.float()
        zero = zero + (8 - (0 if self.zero is None else self.zero.float())) * scale
        return self.q.to(torch.uint8), scale, zero


@dataclass(frozen=True)
class Matrix:
    """A matrix of a file, not read yet; it takes the place of a plain tensor.

    widen(start, stop) returns these rows in float32, with all their columns.
    """

    kind: str  # for people, such as "Q4_K"
    shape: tuple[int, ...]  # (rows, columns) or (numbers,), as stored
    widen: Callable[[int, int], Tensor]
    group: int = 0  # columns of a group, if `split` gives numbers of 4 bits; else 0
    split: Callable[[int, int], tuple[Tensor, Tensor, Tensor]] | None = None
    rows: tuple[slice, ...] | None = None  # of a part: which rows, in this order; None: all
    columns: slice | None = None  # of a part: which columns

    def __len__(self) -> int:
        return self.shape[0] if self.rows is None else sum(s.stop - s.start for s in self.rows)

    def __getitem__(self, rows: slice) -> Tensor:
        return self.widen(*rows.indices(self.shape[0])[:2])

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return self.kind

    def cut(self, dim: int, pieces: list[slice]) -> "Matrix":
        """Return a part: some rows (dim 0), or one run of columns (dim 1)."""
        if dim == 0:
            return replace(self, rows=tuple(pieces))
        (columns,) = pieces
        return replace(self, columns=columns)

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield from where to where rows are to be read, some at a time."""
        width = self.shape[1] if len(self.shape) == 2 else 1
        step = max(1, CHUNK // width)
        for piece in self.rows or (slice(0, self.shape[0]),):
            for start in range(piece.start, piece.stop, step):
                yield start, min(start + step, piece.stop)

    def chunks(self) -> Iterator[Tensor]:
        """Yield the rows in float32, some at a time."""
        for start, stop in self.spans():
            dense = self.widen(start, stop)
            yield dense if self.columns is None else dense[:, self.columns]

    def groups(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield q (n, K) of 0..15, scale and zero (n, K/group): value = (q - 8) * scale + zero.

        Exact, some rows at a time; for a `group` that is not 0.
        """
        for start, stop in self.spans():
            q, scale, zero = self.split(start, stop)
            if self.columns is not None:
                first = self.columns.start // self.group
                last = self.columns.stop // self.group
                q = q[:, self.columns]
                scale = scale[:, first:last]
                zero = zero[:, first:last]
            yield q, scale, zero


@dataclass
class Held:
    """A matrix in place of the open file that holds it; made anew each time that it is read."""

    make: Callable[[], Matrix]

    def __post_init__(self):
        self.aliases = {}  # as of a MappedFile, and without effect: there is one tensor here

    def get_slice(self, name: str) -> Matrix:
        return self.make()

    get_tensor = get_slice


def copy_rows(target: Tensor, source) -> None:
    """Write a tensor or a Matrix to rows of another tensor."""
    if isinstance(source, Tensor):
        target.copy_(source)
        return
    start = 0
    for dense in source.chunks():
        target[start : start + len(dense)].copy_(dense)
        start += len(dense)


# ---- what config.json says ------------------------------------------------------------------


def read_scheme(given, where: str) -> Scheme | None:
    """Return the scheme of a quantization_config, None if there is none; refuse those not read."""
    if given is None:
        return None
    given = given if isinstance(given, dict) else {}
    method = given.get("quant_method")
    if method not in METHODS:
        raise ValueError(f"{where} is of kind {method!r:.40}; {HELP}")
    try:
        return METHODS[method](given)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} of kind {method!r}: {error!s:.200}; {HELP}") from None


def must(given: dict, key: str, *allowed, default=None):
    """Return a value; raise ValueError unless it is one of those allowed."""
    value = given.get(key, default)
    if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
        known = ", ".join(repr(one) for one in allowed)
        raise ValueError(f"{key} is {value!r:.60}, and only {known} can be read")
    return value


def group_size(value) -> int:
    """Return the columns of a group; 0 for a whole row, which is written as null or -1."""
    if value in (None, -1):
        return 0
    if type(value) is not int or not 0 < value < 2**20:
        raise ValueError(f"group_size is {value!r:.60}, no number of columns")
    return value


def fp8_scheme(given: dict) -> Scheme:
    return Scheme("fp8", tile=tile_of(given.get("weight_block_size")))


def tile_of(tile) -> tuple[int, int] | None:
    if tile is None:
        return None
    if len(tile) != 2 or not all(type(n) is int and n > 0 for n in tile):
        raise ValueError(f"tiles are {tile!r:.40}, no two numbers")
    return tuple(tile)


def awq_scheme(given: dict) -> Scheme:
    must({"version": str(given.get("version", "gemm")).lower()}, "version", "gemm")
    must(given, "zero_point", True, default=True)
    must(given, "bits", 4)
    return Scheme("awq", 4, group_size(given.get("group_size")))


def gptq_scheme(given: dict) -> Scheme:
    version = must(given, "checkpoint_format", "gptq", "gptq_v2", default="gptq")
    if given.get("dynamic"):
        raise ValueError("dynamic gives some matrices other bits")
    bits = must(given, "bits", 4, 8)
    return Scheme("gptq", bits, group_size(given.get("group_size")), plus=int(version == "gptq"))


def nf4_scheme(given: dict) -> Scheme:
    must(given, "load_in_4bit", True)
    must(given, "bnb_4bit_quant_type", "nf4")
    must(given, "bnb_4bit_quant_storage", "uint8", default="uint8")
    return Scheme("nf4", 4)


def compressed_scheme(given: dict) -> Scheme:
    """Return the one scheme of all groups of layers; which matrices have it, their tensors say."""
    if given.get("transform_config"):
        raise ValueError("transform_config rotates weights")
    sparse = given.get("sparsity_config") or {}
    must(sparse, "format", "dense", default="dense")
    schemes = set()
    groups = given.get("config_groups")
    if not isinstance(groups, dict):
        raise ValueError(f"config_groups is {groups!r:.60}")
    for group in groups.values():
        kind = group.get("format") or given.get("format")
        schemes.add(compressed_group(kind, group["weights"]))
    if len(schemes) != 1:
        raise ValueError(f"config_groups has {len(schemes)} schemes, and only one can be read")
    return schemes.pop()


def compressed_group(kind: str, weights: dict) -> Scheme:
    known = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
    must({"format": kind}, "format", *known)
    strategy = must(weights, "strategy", "group", "channel", "tensor", "block")
    group = group_size(weights.get("group_size")) if strategy == "group" else 0
    tile = tile_of(weights.get("block_structure")) if strategy == "block" else None
    if kind == "pack-quantized":
        must(weights, "type", "int", default="int")
        return Scheme("pack-quantized", must(weights, "num_bits", 4, 8), group)
    must(weights, "num_bits", 8)
    kind = must(weights, "type", "int", "float", default="int")
    return Scheme(f"{kind}-quantized", 8, group, tile)


METHODS = {
    "fp8": fp8_scheme,
    "compressed-tensors": compressed_scheme,
    "awq": awq_scheme,
    "gptq": gptq_scheme,
    "bitsandbytes": nf4_scheme,
}


# ---- what the files hold --------------------------------------------------------------------


def gather(tensors: dict, shapes: dict[str, tuple], scheme: Scheme | None) -> list[str]:
    """Put one Matrix in place of the tensors that make it; return what is wrong with them.

    tensors: {name: open file}, changed. shapes: of all tensors that the model needs.
    """
    if scheme is None:
        return []
    format = FORMATS[scheme.format]
    problems = []
    for name, shape in shapes.items():
        stem = name.removesuffix("weight")
        if len(shape) == 2 and any(stem + mark in tensors for mark in format.marks):
            problems += gather_one(tensors, name, shape, scheme)
            drop_empty_bias(tensors, shapes, f"{stem}bias")
    for name in [name for name in tensors if UNREAD.fullmatch(name)]:
        del tensors[name]
    return problems


def drop_empty_bias(tensors: dict, shapes: dict, name: str) -> None:
    """Forget a bias of zeros that the model does not have; AutoGPTQ writes them."""
    if name in tensors and name not in shapes and not tensors[name].get_tensor(name).any():
        del tensors[name]


def gather_one(tensors: dict, name: str, shape: tuple[int, int], scheme: Scheme) -> list[str]:
    """Do so for one matrix."""
    format = FORMATS[scheme.format]
    stem = name.removesuffix("weight")
    group = scheme.group or shape[1]
    if shape[1] % group:
        return [f"{name}: groups of {group} do not divide its {shape[1]} columns"]
    parts = {}
    problems = []
    for part, (wanted, kinds) in format.parts(shape, scheme).items():
        optional = part.endswith("?")
        part = part.removesuffix("?")
        if optional and stem + part not in tensors:
            continue
        problems += tensor_problem(stem + part, tensors, wanted, kinds)
        parts[part] = tensors.get(stem + part)
    if problems:
        return problems
    for part in parts:
        del tensors[stem + part]

    def make() -> Matrix:
        read = {part: file.get_tensor(stem + part) for part, file in parts.items()}
        return matrix(format, read, shape, scheme)

    tensors[name] = Held(make)
    return []


def tensor_problem(name: str, tensors, shape: tuple, kinds: tuple[str, ...]) -> list[str]:
    """Return what is wrong with a tensor, or nothing; shape: one, a list of them, None: any."""
    if name not in tensors:
        return [f"missing {name}"]
    part = tensors[name].get_slice(name)
    found = tuple(part.get_shape())
    possible = shape if isinstance(shape, list) else [found if shape is None else shape]
    if found not in possible:
        return [f"{name} has shape {found}, config.json asks for {possible[-1]}"]
    if part.get_dtype() not in kinds and not isinstance(part, Matrix):
        return [f"{name} has dtype {part.get_dtype()}, but only {', '.join(kinds)} can be read"]
    return []


def matrix(format: "Format", parts: dict[str, Tensor], shape, scheme: Scheme) -> Matrix:
    """Return a matrix of a format, from its mapped tensors."""

    def read(start: int, stop: int) -> Rows:
        return format.read(parts, start, stop, shape, scheme)

    def widen(start: int, stop: int) -> Tensor:
        return read(start, stop).widen()

    def split(start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        return read(start, stop).in_4_bits()

    kind = f"{scheme.format}, {scheme.bits} bits"
    exact = scheme.bits == 4 and scheme.group in EXACT and scheme.format != "nf4"
    if not exact or ordered_groups(parts, shape, scheme) is not None:
        return Matrix(kind, shape, widen)
    return Matrix(kind, shape, widen, scheme.group, split)


# ---- the formats ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    marks: tuple[str, ...]  # tensors that only a quantised matrix has; one is enough
    # (shape, scheme) to {tensor: (its shape or those possible, dtypes)}; "?": it may be missing
    parts: Callable[[tuple[int, int], Scheme], dict]
    read: Callable[..., Rows]  # (tensors, start, stop, shape, scheme)


def unpack(packed: Tensor, bits: int, dim: int) -> Tensor:
    """Return the numbers in int32s, the first in the lowest bits, along a dimension."""
    packed = packed.unsqueeze(dim + 1)
    steps = torch.arange(0, 32, bits, dtype=torch.int32)
    steps = steps[:, None] if dim == 0 else steps
    return (packed >> steps & 2**bits - 1).flatten(dim, dim + 1)


def ordered_groups(parts: dict[str, Tensor], shape, scheme: Scheme) -> Tensor | None:
    """Return the group (K,) of each column, or None if groups are runs of columns.

    Raises ValueError for a group that has no scale.
    """
    given = parts.get("g_idx", parts.get("weight_g_idx"))
    if given is None or scheme.group == 0:
        return None
    n_groups = shape[1] // scheme.group
    if torch.equal(given.long(), torch.arange(shape[1]) // scheme.group):
        return None
    if not bool(((given >= 0) & (given < n_groups)).all()):
        raise ValueError(f"a g_idx names a group outside 0..{n_groups - 1}; download it again")
    return given.long()


def tiled_scale(scale: Tensor, start: int, stop: int, shape, tile) -> tuple[Tensor, Tensor | None]:
    """Return the scales (n, G) of rows, and the group of each column if they are of unequal width.

    scale: one of all (1,) or (), one a row (N,) or (N, 1), one a group (N, G), or one a tile.
    """
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(stop - start, 1), None
    scale = scale.reshape(len(scale), -1)
    if tile is None:
        return scale[start:stop], None
    height, width = tile
    scale = scale[torch.arange(start, stop) // height]
    if shape[1] % width == 0:
        return scale, None
    return scale, torch.arange(shape[1]) // width  # the last tile is a piece


def float_parts(shape, scheme: Scheme) -> dict:
    scales = scale_shapes(shape, scheme)
    return {
        "weight": (shape, ("F8_E4M3",)),
        "weight_scale?": (scales, FLOATS),
        "weight_scale_inv?": (scales, FLOATS),
    }


def scale_shapes(shape, scheme: Scheme) -> list[tuple]:
    """Return the shapes that scales may have: of tiles, groups, rows or the whole matrix."""
    if scheme.tile:
        return [tuple(math.ceil(n / size) for n, size in zip(shape, scheme.tile))]
    if scheme.group:
        return [(shape[0], shape[1] // scheme.group)]
    return [(), (1,), (1, 1), (shape[0],), (shape[0], 1)]


def read_float(parts: dict, start: int, stop: int, shape, scheme: Scheme) -> Rows:
    scale = parts.get("weight_scale", parts.get("weight_scale_inv"))
    scale, group_of = tiled_scale(scale, start, stop, shape, scheme.tile)
    return Rows(parts["weight"][start:stop], scale, group_of=group_of)


def int_parts(shape, scheme: Scheme) -> dict:
    scales = scale_shapes(shape, scheme)
    return {
        "weight": (shape, ("I8",)),
        "weight_scale": (scales, FLOATS),
        "weight_zero_point?": (scales, ("I8", "I32", "I64")),
        "weight_g_idx?": ((shape[1],), ("I32", "I64")),
    }


def read_int(parts: dict, start: int, stop: int, shape, scheme: Scheme) -> Rows:
    scale, group_of = tiled_scale(parts["weight_scale"], start, stop, shape, scheme.tile)
    zero = parts.get("weight_zero_point")
    if zero is not None:
        zero, _ = tiled_scale(zero, start, stop, shape, scheme.tile)
    if group_of is None:
        group_of = ordered_groups(parts, shape, scheme)
    return Rows(parts["weight"][start:stop], scale, zero, group_of)


def packed_parts(shape, scheme: Scheme) -> dict:
    n_rows, n_columns = shape
    scales = scale_shapes(shape, scheme)
    n_groups = n_columns // scheme.group if scheme.group else 1
    return {
        "weight_packed": ((n_rows, math.ceil(n_columns * scheme.bits / 32)), ("I32",)),
        "weight_scale": (scales, FLOATS),
        "weight_zero_point?": ((math.ceil(n_rows * scheme.bits / 32), n_groups), ("I32",)),
        "weight_g_idx?": ((n_columns,), ("I32", "I64")),
    }


def read_packed(parts: dict, start: int, stop: int, shape, scheme: Scheme) -> Rows:
    """Numbers lie along a row, those of zeros along a column; all have half their range added."""
    bits = scheme.bits
    q = unpack(parts["weight_packed"][start:stop], bits, 1)[:, : shape[1]]
    scale, _ = tiled_scale(parts["weight_scale"], start, stop, shape, None)
    zero = torch.full_like(scale, 2 ** (bits - 1))
    if "weight_zero_point" in parts:
        per = 32 // bits
        first = start // per
        words = parts["weight_zero_point"][first : -(-stop // per)]
        zero = unpack(words, bits, 0)[start - first * per : stop - first * per]
    return Rows(q, scale, zero, ordered_groups(parts, shape, scheme))


def awq_parts(shape, scheme: Scheme) -> dict:
    n_rows, n_columns = shape
    n_groups = n_columns // (scheme.group or n_columns)
    return {
        "qweight": ((n_columns, math.ceil(n_rows / 8)), ("I32",)),
        "qzeros": ((n_groups, math.ceil(n_rows / 8)), ("I32",)),
        "scales": ((n_groups, n_rows), FLOATS),
    }


AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where the eight numbers of an int32 lie in it


def read_awq(parts: dict, start: int, stop: int, shape, scheme: Scheme) -> Rows:
    """Stored by columns; the numbers of eight rows share an int32, in an order of their own."""
    first = start // 8
    words = slice(first, -(-stop // 8))
    rows = slice(start - first * 8, stop - first * 8)

    def numbers(packed: Tensor) -> Tensor:
        found = unpack(packed[:, words], 4, 1).unflatten(1, (-1, 8))
        return found[..., AWQ_ORDER].flatten(1)[:, rows].T

    return Rows(
        numbers(parts["qweight"]), parts["scales"][:, start:stop].T, numbers(parts["qzeros"])
    )


def gptq_parts(shape, scheme: Scheme) -> dict:
    n_rows, n_columns = shape
    per = 32 // scheme.bits
    n_groups = n_columns // (scheme.group or n_columns)
    return {
        "qweight": ((math.ceil(n_columns / per), n_rows), ("I32",)),
        "qzeros": ((n_groups, math.ceil(n_rows / per)), ("I32",)),
        "scales": ((n_groups, n_rows), FLOATS),
        "g_idx?": ((n_columns,), ("I32", "I64")),
    }


def read_gptq(parts: dict, start: int, stop: int, shape, scheme: Scheme) -> Rows:
    """Stored by columns: numbers of one row share an int32, zeros of neighbouring rows do."""
    bits = scheme.bits
    per = 32 // bits
    first = start // per
    q = unpack(parts["qweight"][:, start:stop], bits, 0)[: shape[1]].T
    zero = unpack(parts["qzeros"][:, first : -(-stop // per)], bits, 1)
    zero = zero[:, start - first * per : stop - first * per].T
    zero = zero + scheme.plus & 2**bits - 1
    scale = parts["scales"][:, start:stop].T
    return Rows(q, scale, zero, ordered_groups(parts, shape, scheme))


NF4_BLOCK = 64  # numbers that share a scale
NF4_OUTER = 256  # scales that share a scale of their own


def nf4_parts(shape, scheme: Scheme) -> dict:
    n_rows, n_columns = shape
    n_blocks = n_rows * n_columns // NF4_BLOCK
    n_outer = math.ceil(n_blocks / NF4_OUTER)
    return {
        "weight": ((n_rows * n_columns // 2, 1), ("U8",)),
        "weight.absmax": ((n_blocks,), ("U8", "F32")),
        "weight.quant_map": ((16,), ("F32",)),
        "weight.nested_absmax?": ((n_outer,), ("F32",)),
        "weight.nested_quant_map?": ((256,), ("F32",)),
        "weight.quant_state.bitsandbytes__nf4": (None, ("U8",)),
    }


def read_nf4(parts: dict, start: int, stop: int, shape, scheme: Scheme) -> Rows:
    """Numbers are looked up in a map, the first in a byte's high half; so are their scales."""
    state = json.loads(bytes(parts["weight.quant_state.bitsandbytes__nf4"].tolist()))
    must(state, "blocksize", NF4_BLOCK)
    per_row = shape[1] // NF4_BLOCK
    if per_row * NF4_BLOCK != shape[1]:
        raise ValueError(f"nf4: blocks of {NF4_BLOCK} do not divide {shape[1]} columns")
    blocks = torch.arange(start * per_row, stop * per_row)
    scale = parts["weight.absmax"][blocks[0] : blocks[-1] + 1]
    if scale.dtype == torch.uint8:
        must(state, "nested_blocksize", NF4_OUTER)
        outer = parts["weight.nested_absmax"][blocks // NF4_OUTER]
        scale = parts["weight.nested_quant_map"][scale.int()] * outer + state["nested_offset"]
    half = shape[1] // 2
    pairs = parts["weight"][start * half : stop * half].view(stop - start, half)
    numbers = torch.stack((pairs >> 4, pairs & 15), dim=2).flatten(1)
    return Rows(parts["weight.quant_map"][numbers.int()], scale.view(stop - start, per_row))


EIGHT_BITS = Format(("weight_scale", "weight_scale_inv"), float_parts, read_float)
FORMATS = {
    "fp8": EIGHT_BITS,
    "float-quantized": EIGHT_BITS,
    "int-quantized": Format(("weight_scale",), int_parts, read_int),
    "pack-quantized": Format(("weight_packed",), packed_parts, read_packed),
    "awq": Format(("qweight",), awq_parts, read_awq),
    "gptq": Format(("qweight",), gptq_parts, read_gptq),
    "nf4": Format(("weight.absmax",), nf4_parts, read_nf4),
}
