"""Matrices that a file holds in few bits, widened some rows at a time as they are read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

CHUNK = 2**20  # numbers that are widened at a time, 4 MiB in float32


@dataclass(frozen=True)
class Matrix:
    """A tensor of a file, not read yet; it takes the place of a plain one.

    widen(start, stop) returns these rows in float32, with all their columns.
    """

    kind: str  # for people, such as "Q4_K"
    shape: tuple[int, ...]  # (rows, columns) or (numbers,), as stored
    widen: Callable[[int, int], Tensor]
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

    def chunks(self) -> Iterator[Tensor]:
        """Yield the rows in float32, some at a time."""
        width = self.shape[1] if len(self.shape) == 2 else 1
        step = max(1, CHUNK // width)
        for piece in self.rows or (slice(0, self.shape[0]),):
            for start in range(piece.start, piece.stop, step):
                dense = self.widen(start, min(start + step, piece.stop))
                yield dense if self.columns is None else dense[:, self.columns]


@dataclass
class Held:
    """A matrix in place of the open file that holds it."""

    matrix: Matrix

    def __post_init__(self):
        self.aliases = {}  # as of a MappedFile, and without effect: there is one tensor here

    def get_slice(self, name: str) -> Matrix:
        return self.matrix

    def get_tensor(self, name: str) -> Matrix:
        return self.matrix


def copy_rows(target: Tensor, source) -> None:
    """Write a tensor or a Matrix to rows of another tensor."""
    if isinstance(source, Tensor):
        target.copy_(source)
        return
    start = 0
    for dense in source.chunks():
        target[start : start + len(dense)].copy_(dense)
        start += len(dense)
