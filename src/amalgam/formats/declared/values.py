"""What a checkpoint says about its own quantization.

In: nothing; these are nouns. Formats read them where tensors alone do not tell (zero points of GPTQ, order of AWQ's
words), and the source compares them with the tensors everywhere else. Must never know: files, layers, families.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Codebooks:
    """Vectors that weights are sums of, one of each book: `number` books of `2^bits`, for rows × columns weights."""

    number: int
    bits: int
    rows: int
    columns: int

    def __str__(self) -> str:
        return f"{self.number} codebooks of 2^{self.bits} vectors for {self.rows} × {self.columns} weights"


@dataclass(frozen=True)
class Declared:
    """What is declared for one module. None: nothing is said, the tensors decide.

    Attributes:
        method: `quant_method`.
        where: the file that says so.
        is_quantized: whether the module is named as quantized, or as left alone.
        layout: the arrangement of bits, where a method has several: `gptq`, `gptq_v2`, `awq`, `nf4`, or the name that
            the checkpoint uses.
        number: `int` or `float`.
        strategy: which weights share a scale: tensor, channel, group, block.
        group_size: inputs that share a scale; -1: all of a row.
        block: (rows, columns) that share a scale.
        is_reordered: inputs of a group need not be neighbours, so that each weight needs an index of groups.
        divides_by_scale: the stored scale is a divisor.
        codebooks: what the vectors are of which a weight is the sum.
    """

    method: str | None = None
    where: str = ""
    is_quantized: bool | None = None
    layout: str | None = None
    bits: int | None = None
    number: str | None = None
    strategy: str | None = None
    group_size: int | None = None
    block: tuple[int, int] | None = None
    is_symmetric: bool | None = None
    is_reordered: bool = False
    divides_by_scale: bool = False
    codebooks: Codebooks | None = None

    def block_of(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """`(rows, columns)` of a weight `[out, in]` that share a scale; None if nothing is said."""
        rows, columns = shape
        if self.strategy == "tensor":
            return rows, columns
        if self.strategy == "channel":
            return 1, columns
        if self.strategy == "block":
            return self.block
        if self.strategy == "group" and self.group_size is not None:
            return (1, columns) if not 0 < self.group_size < columns else (1, self.group_size)
        return None


UNDECLARED = Declared()
Matches = Callable[[str], bool]


@dataclass(frozen=True)
class Declaration:
    """A checkpoint's declared quantization.

    Attributes:
        default: what holds for a module that nothing else names.
        named: module → what holds for it.
        rules: in order; the first that matches holds for a module that `named` does not know.
    """

    default: Declared = UNDECLARED
    named: Mapping[str, Declared] = field(default_factory=dict)
    rules: tuple[tuple[Matches, Declared], ...] = ()

    def of(self, module: str) -> Declared:
        """What is declared for a module; its name without `.weight`."""
        found = self.named.get(module)
        if found is not None:
            return found
        return next((declared for matches, declared in self.rules if matches(module)), self.default)
