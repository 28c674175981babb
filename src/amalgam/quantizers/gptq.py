"""GPTQ (Frantar et al. 2023): the rounding error of each input's column is made up for by the columns after it.

With x xᵀ on average H, the output error of a row is (w - q)ᵀ H (w - q). Column by column, w is rounded, and what that
does to the output is taken back as far as it can by the columns that are still free; the Cholesky factor of H⁻¹ says
by how much.

    columns in the order of H's diagonal, the largest first
    q = nearest(w / scale);  e = (w - q × scale) / U[i, i];  W[:, i + 1:] -= e ⊗ U[i, i + 1:]

Scales are chosen before, so that blocks stay neighbours and no index of groups is needed (what published tools call
static groups).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from amalgam.formats.grid import Codes, Grid

_LAZY = 128  # columns whose effect on the rest is added up first
_MOST_DAMPING = 1.0


@dataclass(frozen=True, eq=False)
class Gptq:
    """See `Quantizer`.

    Attributes:
        second_moment: float32 `[in, in]`, the mean of x xᵀ over the inputs.
        scales: a quantizer whose scales (and zero points) are taken.
        damping: what is added to the diagonal, as a share of its mean; more, where the inputs leave H singular.
        is_ordered: columns are rounded in the order of H's diagonal, else as they stand.
    """

    second_moment: Tensor
    scales: Callable[[Tensor, Grid], Codes]
    damping: float = 0.01
    is_ordered: bool = True

    def __call__(self, weight: Tensor, grid: Grid) -> Codes:
        """Codes of one matrix."""
        return self.together([(weight, grid)])[0]

    def together(self, matrices: list[tuple[Tensor, Grid]]) -> list[Codes]:
        """Codes of several matrices with the same inputs, for little more than one costs."""
        started = [self.scales(weight, grid) for weight, grid in matrices]
        order = self._order()
        factor = self._factor(order)
        rows = [len(weight) for weight, _ in matrices]
        work = torch.cat([weight.float() for weight, _ in matrices])[:, order]
        grids = [grid for _, grid in matrices]
        scale = [_rowwise(codes.scale.float(), codes.grid) for codes in started]
        zero = [None if codes.zero is None else _rowwise(codes.zero.float(), codes.grid) for codes in started]
        values = torch.empty_like(work)
        for start in range(0, work.shape[1], _LAZY):
            stop = min(start + _LAZY, work.shape[1])
            part, errors = work[:, start:stop].clone(), torch.empty(len(work), stop - start)
            for index in range(start, stop):
                column, local = int(order[index]), index - start
                wanted = part[:, local]
                found, restored = [], []
                for own, grid, scales, zeros in zip(wanted.split(rows), grids, scale, zero, strict=True):
                    place = column // grid.block[1]
                    scaled = own / scales[:, place]
                    code = grid.nearest(scaled if zeros is None else scaled + zeros[:, place])
                    found.append(code)
                    restored.append((code if zeros is None else code - zeros[:, place]) * scales[:, place])
                values[:, index] = torch.cat(found)
                error = (wanted - torch.cat(restored)) / factor[index, index]
                part[:, local + 1 :].addr_(error, factor[index, index + 1 : stop], alpha=-1.0)
                errors[:, local] = error
            work[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1.0)
        back = torch.argsort(order)
        parts = values[:, back].split(rows)
        return [
            Codes(codes.grid, part.to(codes.grid.dtype).contiguous(), codes.scale, codes.zero)
            for codes, part in zip(started, parts, strict=True)
        ]

    def _order(self) -> Tensor:
        diagonal = self.second_moment.diagonal()
        if not self.is_ordered:
            return torch.arange(len(diagonal))
        order: Tensor = torch.argsort(diagonal, descending=True, stable=True)
        return order

    def _factor(self, order: Tensor) -> Tensor:
        """U with Uᵀ U = (H + damping)⁻¹, upper triangular, of columns in `order`."""
        moment = self.second_moment[order][:, order].double()
        mean = float(moment.diagonal().mean()) or 1.0
        damping = self.damping
        while True:
            damped = moment.clone()
            damped.diagonal().add_(damping * mean)
            lower, failed = torch.linalg.cholesky_ex(damped)
            if not int(failed):
                upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
                if not int(failed):
                    factor: Tensor = upper.float()
                    return factor
            assert damping < _MOST_DAMPING, "a diagonal of its own mean size is positive"
            damping = min(10 * damping, _MOST_DAMPING)


def _rowwise(per_block: Tensor, grid: Grid) -> Tensor:
    """One number for each block → for each row, `[out, blocks beside]`."""
    return per_block.repeat_interleave(grid.block[0], 0)[: grid.shape[0]]
