"""What can be asked of pruning.

In: words. Out: `PruneOptions`, whose parts fit each other. Must never know: models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from amalgam.errors import ConfigError, describe
from amalgam.experts.saved.sets import SavedSet
from amalgam.formats.registry import writable_format
from amalgam.pruning.channels import CHANNEL_CRITERIA
from amalgam.pruning.experts import EXPERT_CRITERIA
from amalgam.pruning.layers import LAYER_CRITERIA
from amalgam.pruning.sparsity import WEIGHT_CRITERIA
from amalgam.tools.evaluate import TextOptions

Kind = Literal["experts", "layers", "channels", "weights"]
# The first one is taken where none is named.
CRITERIA: dict[Kind, tuple[str, ...]] = {
    "experts": EXPERT_CRITERIA,
    "layers": LAYER_CRITERIA,
    "channels": CHANNEL_CRITERIA,
    "weights": WEIGHT_CRITERIA,
}
PRECISIONS = ("int8", "int4", "int3", "int2")
BITS = (8.0, 6.0, 4.5, 3.5, 2.75, 2.4)


@dataclass(frozen=True)
class PruneOptions:
    """
    Attributes:
        amounts, criteria: each with each is tried; to be written there has to be one.
        texts: what is chosen by; with a comparison, what sensitivities are measured on, too.
        held_out: files of texts to compare on; empty: a part of the texts, which nothing else sees then.
        use: saved statistics to choose experts by, and where they come from.
        precisions: formats that plans may choose from.
        bits: mean bits of a weight of the whole model at which cut models and plans are compared, beside the size that
            the cut alone gives.
        compares: whether to measure what a plan of the same bytes does.
        copies: folder of the model's copies in `precisions`, made where they are not there; None: the user's own.
        cache: folder of sensitivities; None: the user's own.
    """

    kind: Kind
    amounts: Sequence[str]
    criteria: Sequence[str]
    texts: TextOptions
    held_out: Sequence[str] = ()
    merges: bool = False
    per_layer: bool = False
    use: tuple[SavedSet, str] | None = None
    precisions: Sequence[str] = PRECISIONS
    bits: Sequence[float] = field(default=BITS)
    compares: bool = True
    copies: Path | None = None
    cache: Path | None = None
    seed: int = 0

    def check(self) -> None:
        """
        Raises:
            ConfigError: parts that do not fit each other.
        """
        allowed = CRITERIA[self.kind]
        for criterion in self.criteria:
            if criterion not in allowed:
                raise ConfigError(
                    f"--by is {describe(criterion)}, and {self.kind} do not go by it.",
                    remedy=f"Allowed: {', '.join(allowed)}.",
                )
        if self.use is not None and not {"use", "gate-mass"}.issuperset(self.criteria):
            raise ConfigError(
                f"--use is given, and statistics do not tell {' and '.join(self.criteria)}.",
                remedy="Choose --by use or --by gate-mass, or leave it out.",
            )
        if self.use is not None and self.merges:
            raise ConfigError(
                "--merge needs the router's probabilities, which saved statistics do not hold.",
                remedy="Leave out --use, or --merge.",
            )
        if not self.texts.files and (self.needs_texts or self.compares):
            what = "comparing with plans" if not self.needs_texts else f"choosing by {', '.join(self.criteria)}"
            raise ConfigError(
                f"There are no texts, and {what} needs them.",
                remedy="Give --text FILE" + (", or --no-compare." if not self.needs_texts else "."),
            )
        if self.texts.files and not self.needs_texts and not self.compares:
            raise ConfigError(
                f"--text is given, and nothing is chosen by texts: --by {', '.join(self.criteria)}.",
                remedy="Leave it out, or --no-compare.",
            )
        if self.seed and "random" not in self.criteria:
            raise ConfigError(f"--seed is {self.seed}, and nothing is drawn.", remedy="It is for --by random.")
        for precision in self.precisions:
            writable_format(precision)

    @property
    def needs_texts(self) -> bool:
        """Whether what goes is chosen by texts."""
        if self.kind == "experts":
            return self.merges or (self.use is None and any(each != "random" for each in self.criteria))
        return any(each != "magnitude" for each in self.criteria)
