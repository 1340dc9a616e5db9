"""Tensors of a base model with an adapter's change merged in, computed as they are read.

The arithmetic and its order are PEFT's own, on fp32 weights (``merge`` in ``peft/tuners/lora/layer.py`` and
``variants.py``, PEFT 0.21). Each product is one of torch's matrix products, of a block of rows that depends on nothing
but the shape, on one thread: the bits do not depend on how many threads or jobs there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exporter.tensors import BLOCK_BYTES, DType, LazyTensor, SourceFiles

if TYPE_CHECKING:
    import torch

_ROW_MULTIPLE = 64
"""Blocks have a multiple of so many rows, so that a matrix product cuts them into the same tiles as a whole matrix."""


@dataclass(frozen=True)
class MergedTensor(LazyTensor):
    """A tensor of the base model, in fp32, with something of the adapter merged in."""

    base: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.base.shape

    @property
    def dtype(self) -> DType:  # type: ignore[override]
        return DType.F32

    @property
    def kept_dtype(self) -> DType:
        return self.base.kept_dtype


@dataclass(frozen=True)
class LoraTensor(MergedTensor):
    """``base + scaling * B @ A``, and with DoRA that, each output's weights scaled to ``magnitude``.

    ``a`` is [rank, inputs], ``b`` is [outputs, rank], ``magnitude`` is [outputs]. ``base`` is [outputs, inputs], or
    [inputs, outputs] where it is ``transposed``: the Conv1D of GPT-2, and embeddings, whose inputs are ids.
    """

    a: LazyTensor
    b: LazyTensor
    scaling: float
    transposed: bool
    magnitude: LazyTensor | None = None

    @property
    def sources(self) -> tuple[LazyTensor, ...]:
        return (self.base, self.a, self.b, *([] if self.magnitude is None else [self.magnitude]))

    def blocks(self, files: SourceFiles) -> Iterator[torch.Tensor]:
        if self.magnitude is None:
            for rows in self._sums(files):
                yield rows.flatten()
            return
        magnitude = read_whole(self.magnitude, files)
        factors = magnitude / self._column_norms(files) if self.transposed else None
        start = 0
        for rows in self._sums(files):
            if factors is None:
                rows *= (magnitude[start : start + len(rows)] / _row_norms(rows)).unsqueeze(1)
            else:
                rows *= factors
            yield rows.flatten()
            start += len(rows)

    def _sums(self, files: SourceFiles) -> Iterator[torch.Tensor]:
        """Blocks of rows of base + scaling * B @ A."""
        a, b = read_whole(self.a, files), read_whole(self.b, files)
        start = 0
        for rows in row_blocks(self.base, files):
            stop = start + len(rows)
            with _one_thread():
                product = (b @ a[:, start:stop]).T if self.transposed else b[start:stop] @ a
            rows += product * self.scaling
            yield rows
            start = stop

    def _column_norms(self, files: SourceFiles) -> torch.Tensor:
        """The norm of each output's weights where they are a column, summed in float64 and rounded to float32 once."""
        import torch

        total = torch.zeros(self.shape[1], dtype=torch.float64)
        for rows in self._sums(files):
            total += rows.to(torch.float64).square().sum(dim=0)
        return total.sqrt().to(torch.float32)


@dataclass(frozen=True)
class BiasTensor(MergedTensor):
    """The vector ``base + scaling * bias``."""

    bias: LazyTensor
    scaling: float

    @property
    def sources(self) -> tuple[LazyTensor, ...]:
        return (self.base, self.bias)

    def blocks(self, files: SourceFiles) -> Iterator[torch.Tensor]:
        yield read_whole(self.base, files) + read_whole(self.bias, files) * self.scaling


@dataclass(frozen=True)
class TokensTensor(MergedTensor):
    """The matrix ``base`` with the rows ``indices`` taken from ``rows``, in that order."""

    rows: LazyTensor
    indices: tuple[int, ...]

    @property
    def sources(self) -> tuple[LazyTensor, ...]:
        return (self.base, self.rows)

    def blocks(self, files: SourceFiles) -> Iterator[torch.Tensor]:
        trained = dict(zip(self.indices, read_whole(self.rows, files), strict=True))
        start = 0
        for rows in row_blocks(self.base, files):
            for index in range(start, start + len(rows)):
                if index in trained:
                    rows[index - start] = trained[index]
            yield rows.flatten()
            start += len(rows)


def read_whole(tensor: LazyTensor, files: SourceFiles) -> torch.Tensor:
    """All of a small tensor, in fp32 and in its shape."""
    import torch

    parts = [block.to(torch.float32, copy=True) for block in tensor.blocks(files)]
    return torch.cat(parts).reshape(tensor.shape) if parts else torch.zeros(tensor.shape)


def row_blocks(tensor: LazyTensor, files: SourceFiles) -> Iterator[torch.Tensor]:
    """The matrix ``tensor`` in fp32, some rows at a time, in a buffer that is the caller's until the next block.

    A block has as many rows as go into BLOCK_BYTES, at least one; the last one has what is left.
    """
    import torch

    width = math.prod(tensor.shape[1:])
    count = max(BLOCK_BYTES // (4 * width), 1)
    count -= count % _ROW_MULTIPLE if count > _ROW_MULTIPLE else 0
    buffer, filled = torch.empty(min(count, tensor.shape[0]) * width), 0
    for block in tensor.blocks(files):
        while block.numel():
            part = block[: buffer.numel() - filled]
            buffer[filled : filled + part.numel()] = part
            filled, block = filled + part.numel(), block[part.numel() :]
            if filled == buffer.numel():
                yield buffer.view(-1, width)
                filled = 0
    if filled:
        yield buffer[:filled].view(-1, width)


def _row_norms(rows: torch.Tensor) -> torch.Tensor:
    import torch

    with _one_thread():
        return torch.linalg.norm(rows, dim=1)


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
