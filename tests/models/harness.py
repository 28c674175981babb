"""Runs the decoder without an engine: sequences with their own cache blocks, any chunking, any grouping into steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from amalgam.composition.loader import ModelLoader
from amalgam.config.inference import InferenceSettings
from amalgam.config.model import MixedPrecisionSettings, ModelSettings
from amalgam.kernels.backends import Backend, Compiled, Tables
from amalgam.kernels.backends.cpu import panels
from amalgam.kernels.backends.cpu.backend import CpuBackend
from amalgam.kernels.backends.cpu.panels import PanelWeight
from amalgam.kernels.layouts import dense
from amalgam.kernels.program import Program
from amalgam.kernels.step import SequenceState, StepContext, StepSequence
from amalgam.models.decoder import Decoder
from amalgam.models.kv_cache import KVCache
from amalgam.models.routing import RoutingObserver
from amalgam.models.weights import WeightVersion

CPU = torch.device("cpu")


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    mixed: MixedPrecisionSettings | None = None,
    max_positions: int = 256,
) -> tuple[Decoder, WeightVersion]:
    """Decoder and first weight version of a checkpoint folder."""
    model = ModelSettings(base_path=str(folder), mixed_precision=mixed or MixedPrecisionSettings())
    loader = ModelLoader(model, InferenceSettings(), CPU, threads=1)
    version = loader.build(loader.plan(), 1).version
    return Decoder(loader.spec, max_positions, dtype, CPU), version


def hand_built(version: WeightVersion, dtype: torch.dtype = torch.float32) -> WeightVersion:
    """The same weights as plain tensors of one type, multiplied by the same backend."""
    by_hand = {slot: dense(version[slot].dequantize(dtype)) for slot in version.origins}
    multiplied = {slot for slot in by_hand if isinstance(version[slot], PanelWeight)}
    by_hand |= {slot: panels.prepare(by_hand[slot]) for slot in multiplied}
    return WeightVersion(2, by_hand, version.origins, version.keys)


class OperatorByOperator(CpuBackend):
    """The compiled operators, called one by one."""

    def compile(self, program: Program, tables: Tables) -> Compiled:
        return self.interpret(program, tables)


def interpreted(decoder: Decoder) -> Decoder:
    """The same model, run operator by operator."""
    return like(decoder, lambda dtype, device: OperatorByOperator(dtype))


def like(decoder: Decoder, choose: Callable[[torch.dtype, torch.device], Backend]) -> Decoder:
    """The same model on another backend."""
    return Decoder(decoder.spec, decoder.max_positions, decoder.dtype, CPU, choose)


class Runner:
    """Feeds chunks of sequences to a decoder. Blocks are handed out in a scattered order, as in a busy server."""

    def __init__(
        self,
        decoder: Decoder,
        version: WeightVersion,
        *,
        num_sequences: int = 8,
        blocks_each: int = 16,
        block_size: int = 4,
        observer: RoutingObserver | None = None,
    ) -> None:
        self.decoder, self.version, self.block_size, self.observer = decoder, version, block_size, observer
        num_blocks = num_sequences * blocks_each
        self.kv = KVCache.allocate(decoder.spec, num_blocks, block_size, decoder.dtype, CPU, num_states=num_sequences)
        self.tables = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(3)).view(num_sequences, -1)
        self.lengths = [0] * num_sequences
        self.has_states = any(shape is not None for shape in decoder.spec.state_shapes)

    def step(self, chunks: dict[int, list[int]]) -> dict[int, Tensor]:
        """Run one step: sequence → its next tokens. Returns sequence → logits `[tokens, vocabulary]`."""
        sequences = [
            StepSequence(
                token_ids,
                self.lengths[index],
                self.tables[index].tolist(),
                len(token_ids),
                SequenceState.of(index, self.lengths[index]) if self.has_states else None,
            )
            for index, token_ids in chunks.items()
        ]
        for index, token_ids in chunks.items():
            self.lengths[index] += len(token_ids)
        with torch.inference_mode():
            logits = self.decoder.forward(StepContext(sequences, self.kv, self.observer), self.version).clone()
        return dict(zip(chunks, logits.split([len(token_ids) for token_ids in chunks.values()]), strict=True))
