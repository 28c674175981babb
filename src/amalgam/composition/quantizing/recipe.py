"""What is asked for: a format, how codes are chosen, what is declared of activations, texts to calibrate with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from amalgam.calibration.texts import sequences
from amalgam.errors import ConfigError
from amalgam.formats.contract import WritableFormat
from amalgam.formats.grid import QuantizeOptions
from amalgam.models.spec import ModelSpec
from amalgam.text.tokenizer import Tokenizer

Method = Literal["round", "search", "gptq", "awq"]
Activations = Literal["dynamic", "static"]
METHODS: tuple[Method, ...] = get_args(Method)
ACTIVATIONS: tuple[Activations, ...] = get_args(Activations)
_NEED_TEXTS = ("gptq", "awq")


@dataclass(frozen=True)
class CalibrationTexts:
    """What a model reads while it is calibrated.

    Attributes:
        files: of texts, each as much as the others.
        max_tokens, sequence_tokens: in all, and in one sequence.
        min_expert_tokens: experts that see fewer are shown the tokens that come nearest to being sent to them.
    """

    files: tuple[Path, ...]
    max_tokens: int = 65_536
    sequence_tokens: int = 512
    min_expert_tokens: int = 256

    def read(self, tokenizer: Tokenizer, spec: ModelSpec) -> list[list[int]]:
        """Token ids for a model, no sequence longer than it takes.

        Raises:
            CheckpointError: the tokenizer is of another model.
            ConfigError: see `calibration.texts`.
        """
        tokenizer.check_vocabulary(spec.vocab_size)
        longest = min(self.sequence_tokens, spec.max_positions)
        return sequences(self.files, tokenizer, max_tokens=self.max_tokens, sequence_tokens=longest)


@dataclass(frozen=True)
class Recipe:
    """How weights are quantized.

    Attributes:
        method: how scales and codes are chosen: by rounding, by a search for the best clip, by GPTQ, by AWQ.
        activations: what the checkpoint declares for activations, for engines that round them to 8 bits: scales that
            are found as they run, or constants found on the texts. None: they stay as they are.
        damping, is_ordered: of GPTQ.
    """

    format_name: str
    options: QuantizeOptions = QuantizeOptions()
    method: Method = "round"
    activations: Activations | None = None
    texts: CalibrationTexts | None = None
    damping: float = 0.01
    is_ordered: bool = True

    def check(self, weight_format: WritableFormat) -> None:
        """
        Raises:
            ConfigError: parts that do not fit each other.
        """
        if self.method not in METHODS:
            raise ConfigError(f"There is no method {self.method!r}.", remedy=f"Methods: {', '.join(METHODS)}.")
        check_activations(self.activations, self.options)
        if self.activations is not None and weight_format.name not in ("fp8", "int8"):
            raise ConfigError(
                f"Format {weight_format.name} takes wide activations.",
                remedy="Scales of activations go with fp8 and int8.",
            )
        needs = self.method if self.method in _NEED_TEXTS else "static" if self.activations == "static" else None
        if needs and self.texts is None:
            raise ConfigError(f"{needs!r} needs texts to calibrate with.", remedy="Give files of texts (--calibrate).")
        if self.texts is not None and self.method == "round" and self.activations != "static":
            raise ConfigError(
                "Rounding to nearest reads no calibration texts.",
                remedy="Choose search, gptq or awq, or leave them out.",
            )

    def describe(self) -> dict[str, Any]:
        """For people and for telling recipes apart, JSON values only; files by name and content."""
        values = asdict(self)
        if self.texts is not None:
            digests = {str(file): hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in self.texts.files}
            values["texts"] = {**asdict(self.texts), "files": digests}
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain


def check_activations(activations: str | None, options: QuantizeOptions) -> None:
    """
    Raises:
        ConfigError: there are no such scales of activations, or not beside such weights.
    """
    if activations is not None and activations not in ACTIVATIONS:
        raise ConfigError(
            f"There are no {activations!r} activation scales.", remedy=f"Allowed: {', '.join(ACTIVATIONS)}."
        )
    if activations == "static" and options.scale == "block":
        raise ConfigError(
            "Scales per block go with dynamic activation scales only.", remedy="Set activations to dynamic."
        )


def input_arguments(activations: str | None, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """compressed-tensors' `QuantizationArgs` of activations, for weights that are declared with `arguments`."""
    if activations is None:
        return None
    found = {"num_bits": 8, "type": arguments["type"], "symmetric": True}
    if activations == "static":
        return {**found, "strategy": "tensor", "dynamic": False}
    if arguments["strategy"] == "block":
        return {**found, "strategy": "group", "group_size": arguments["block_structure"][1], "dynamic": True}
    return {**found, "strategy": "token", "dynamic": True}
