"""Computes inner products of a step's vectors (sketches), from their Gram matrix or from columns of the vectors.

Shapes: B vectors, one per sequence; P prompts, G sequences of one prompt; K numbers of a vector; M, N sums of vectors.

The Gram matrix (B, B) of a large step takes more memory than its vectors: 268 MB in float32 for 8192 sequences. The
metrics need only tensors of at most (P, P) or (P, G, G). If every rank holds some columns of all vectors, each of these
tensors is the sum over ranks of the same tensor made from a rank's columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

PIECE = 4 << 20  # bytes of a temporary tensor

Reduce = Callable[[torch.Tensor], torch.Tensor]  # returns the sum of a tensor over ranks


def sum_rows(values_BN: torch.Tensor, row_B: torch.Tensor, n_rows: int) -> torch.Tensor:
    """Returns the sums (P, ...) over each prompt's rows of (B, ...); ``row_B`` is the prompt of each row."""
    return values_BN.new_zeros(n_rows, *values_BN.shape[1:]).index_add_(0, row_B, values_BN)


def squared_norms(values_BK: torch.Tensor) -> torch.Tensor:
    """Returns (B,) float64 squared norms, without a float64 copy of all values."""
    step = max(1, PIECE // (8 * max(values_BK.shape[1], 1)))
    return torch.cat([rows.double().square().sum(1) for rows in values_BK.split(step)])


class MatrixProducts:
    """Inner products of vectors z_i from their Gram matrix ``gram_BB`` (B, B), floating and symmetric.

    All methods return float64. In their arguments, ``row_B`` (B,) is the prompt of each vector in [0, P), and
    ``n_rows`` is P.
    """

    def __init__(self, gram_BB: torch.Tensor) -> None:
        self.gram_BB = gram_BB.double()

    def __len__(self) -> int:
        return len(self.gram_BB)

    def squares(self) -> torch.Tensor:
        """Returns (B,) |z_i|^2."""
        return self.gram_BB.diagonal()

    def within(self, index_PG: torch.Tensor) -> torch.Tensor:
        """Returns (P, G, G) <z_i, z_j> of the vectors with the indices ``index_PG``."""
        return self.gram_BB[index_PG[:, :, None], index_PG[:, None, :]]

    def along(self, row_B: torch.Tensor, n_rows: int, factor_B: torch.Tensor) -> torch.Tensor:
        """Returns (B, P) <z_i, sum over prompt q's j of factor_j z_j>."""
        return sum_rows(factor_B.to(self.gram_BB)[:, None] * self.gram_BB, row_B, n_rows).T  # it is symmetric

    def of_sums(self, row_B: torch.Tensor, n_rows: int, left_B: torch.Tensor, right_NB: torch.Tensor) -> torch.Tensor:
        """Returns (N, P, P) <sum over prompt p's i of left_i z_i, sum over prompt q's j of right_j z_j>."""
        left_B1 = left_B.to(self.gram_BB)[:, None]
        return torch.stack([sum_rows(left_B1 * self.along(row_B, n_rows, right), row_B, n_rows) for right in right_NB])

    def squared_along(
        self, row_B: torch.Tensor, n_rows: int, scale_B: torch.Tensor, factor_B: torch.Tensor
    ) -> torch.Tensor:
        """Returns (P, P) sum over prompt p's i of <scale_i z_i, sum over prompt q's j of factor_j z_j>^2."""
        along_BP = scale_B.to(self.gram_BB)[:, None] * self.along(row_B, n_rows, factor_B)
        return sum_rows(along_BP.square(), row_B, n_rows)

    def of_totals(self, factor_MB: torch.Tensor) -> torch.Tensor:
        """Returns (M, M) <sum over i of left_i z_i, sum over j of right_j z_j> for every two rows of factors."""
        factor_MB = factor_MB.to(self.gram_BB)
        return factor_MB @ self.gram_BB @ factor_MB.T


class ColumnProducts:
    """The same inner products from this rank's columns of the vectors. Every call is a collective.

    It sums a prompt's vectors in float32, and multiplies sums in float64. It is fastest if the vectors are sorted by
    prompt and every prompt has equally many.

    Args:
        values_BK: (B, K) float32, this rank's columns of all vectors.
        squares_B: (B,) |z_i|^2 over all columns.
        reduce: returns the sum of a tensor over ranks.
        first: the number of this rank's first column.
        dropped_B: (B,) bool, vectors that count as 0; None: none.
    """

    def __init__(
        self,
        values_BK: torch.Tensor,
        squares_B: torch.Tensor,
        reduce: Reduce = lambda values: values,
        *,
        first: int = 0,
        dropped_B: torch.Tensor | None = None,
    ) -> None:
        self.values_BK, self._reduce, self.first = values_BK, reduce, first
        self._squares_B, self._kept_B = squares_B.double(), None if dropped_B is None else (~dropped_B).double()

    def __len__(self) -> int:
        return len(self.values_BK)

    def _sum(self, made: torch.Tensor) -> torch.Tensor:
        """Sums over ranks; sends float32 to halve the traffic."""
        return self._reduce(made.float()).double()

    def _factor(self, factor_B: torch.Tensor) -> torch.Tensor:
        factor_B = factor_B.to(self._squares_B)
        return factor_B if self._kept_B is None else factor_B * self._kept_B

    def _pieces(self, columns: slice = slice(None)) -> Iterator[torch.Tensor]:
        """(B, k) columns one after the other."""
        values_BK = self.values_BK[:, columns]
        return iter(values_BK.split(max(16, PIECE // (4 * max(len(self), 1))), dim=1))

    def _sums(
        self, row_B: torch.Tensor, n_rows: int, factors: Sequence[torch.Tensor], columns: slice = slice(None)
    ) -> Iterator[list[torch.Tensor]]:
        """(P, k) float64 by column pieces: for every factor the sums over prompts of factor_i z_i."""
        each = len(self) // max(n_rows, 1)
        in_order = torch.equal(row_B, torch.arange(n_rows, device=row_B.device).repeat_interleave(each))
        narrow = [factor_B.float()[:, None] for factor_B in factors]
        for piece_Bk in self._pieces(columns):
            if in_order:
                yield [(piece_Bk * f).view(n_rows, each, -1).sum(1).double() for f in narrow]
            else:
                yield [sum_rows(piece_Bk * f, row_B, n_rows).double() for f in narrow]

    def squares(self) -> torch.Tensor:
        return self._factor(self._squares_B)

    def within(self, index_PG: torch.Tensor) -> torch.Tensor:
        n_prompts, most = index_PG.shape
        made_PGG = self._squares_B.new_zeros(n_prompts, most, most)
        step = max(1, PIECE // (8 * max(most * self.values_BK.shape[1], 1)))
        for start in range(0, n_prompts, step):
            rows_SGK = self.values_BK[index_PG[start : start + step]].double()
            made_PGG[start : start + step] = rows_SGK @ rows_SGK.transpose(1, 2)
        made_PGG = self._sum(made_PGG)
        if self._kept_B is None:
            return made_PGG
        kept_PG = self._kept_B[index_PG]
        return made_PGG * kept_PG[:, :, None] * kept_PG[:, None, :]

    def of_sums(self, row_B: torch.Tensor, n_rows: int, left_B: torch.Tensor, right_NB: torch.Tensor) -> torch.Tensor:
        return self._sum(self._of_sums(row_B, n_rows, left_B, right_NB, slice(None)))

    def _of_sums(self, row_B, n_rows, left_B, right_NB, columns: slice) -> torch.Tensor:
        factors = [self._factor(factor) for factor in (left_B, *right_NB)]
        made_NPP = self._squares_B.new_zeros(len(right_NB), n_rows, n_rows)
        for left_Pk, *rights in self._sums(row_B, n_rows, factors, columns):
            for made_PP, right_Pk in zip(made_NPP, rights, strict=True):
                made_PP.addmm_(left_Pk, right_Pk.T)
        return made_NPP

    def of_blocks(self, row_B: torch.Tensor, n_rows: int, blocks: Sequence[slice]) -> torch.Tensor:
        """Returns (len(blocks), P, P) inner products of the prompts' sums, each over one block of columns."""
        ones_B = torch.ones_like(self._squares_B)
        size = self.values_BK.shape[1]
        here = [slice(*(min(max(at - self.first, 0), size) for at in (b.start, b.stop))) for b in blocks]
        made = [self._of_sums(row_B, n_rows, ones_B, ones_B[None], columns)[0] for columns in here]
        return self._sum(torch.stack(made))

    def squared_along(
        self, row_B: torch.Tensor, n_rows: int, scale_B: torch.Tensor, factor_B: torch.Tensor
    ) -> torch.Tensor:
        scale_B1, n_columns = self._factor(scale_B)[:, None], self.values_BK.shape[1]
        sums_PK = torch.cat([made for (made,) in self._sums(row_B, n_rows, [self._factor(factor_B)])], dim=1)
        made_PP = self._squares_B.new_zeros(n_rows, n_rows)
        step = max(1, PIECE // (8 * max(n_rows, n_columns, 1)))
        for start in range(0, len(self), step):
            rows = slice(start, start + step)
            along_SP = self._sum(self.values_BK[rows].double() @ sums_PK.T) * scale_B1[rows]
            made_PP.index_add_(0, row_B[rows], along_SP.square_())
        return made_PP

    def of_totals(self, factor_MB: torch.Tensor) -> torch.Tensor:
        factor_MB = torch.stack([self._factor(factor_B) for factor_B in factor_MB])
        made_MM = self._squares_B.new_zeros(len(factor_MB), len(factor_MB))
        for piece_Bk in self._pieces():
            total_Mk = factor_MB @ piece_Bk.double()
            made_MM.addmm_(total_Mk, total_Mk.T)
        return self._reduce(made_MM)

    def matrix(self) -> torch.Tensor:
        """Returns the Gram matrix (B, B) float64, for a small step."""
        made_BB = self._squares_B.new_zeros(len(self), len(self))
        for piece_Bk in self._pieces():
            wide_Bk = piece_Bk.double()
            made_BB.addmm_(wide_Bk, wide_Bk.T)
        return self._reduce(made_BB)

    def masked(self, dropped_B: torch.Tensor) -> ColumnProducts:
        """Returns the same vectors with those of ``dropped_B`` (B,) bool set to 0."""
        return ColumnProducts(self.values_BK, self._squares_B, self._reduce, first=self.first, dropped_B=dropped_B)


InnerProducts = MatrixProducts | ColumnProducts


def as_products(given: torch.Tensor | InnerProducts) -> InnerProducts:
    """Wraps a Gram matrix as ``MatrixProducts``."""
    return MatrixProducts(given) if isinstance(given, torch.Tensor) else given
