"""Multi-head latent attention (DeepSeek-AI 2024, "DeepSeek-V2: A Strong, Economical, and Efficient
Mixture-of-Experts Language Model")."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from amalgam.kernels.program import (
    AttendLatent,
    Choose,
    Emitter,
    KeepIndexKey,
    Normalize,
    Project,
    Projection,
    Rows,
    ScaleByPosition,
    ScaleBySigmoid,
    ScaleHeads,
)
from amalgam.models.rope import Rope
from amalgam.models.spec import Slot
from amalgam.models.weights import BlockWeights

LATENT_NORM_EPS = 1e-6  # whatever rms_norm_eps says
_INDEX_NORM_EPS = 1e-6


def _scale_slots(name: str, num_heads: int) -> Iterator[Slot]:
    yield Slot(name, (num_heads,), "norm")
    yield Slot(f"{name}_bias", (num_heads,), "norm")


def _scaled(x: Rows, weights: BlockWeights, name: str) -> ScaleHeads:
    return ScaleHeads(x, weights[name].dense, weights[f"{name}_bias"].dense)


def _compressed_of(layer_id: int) -> str:
    return f"compressed_of_{layer_id}"


@dataclass(frozen=True)
class Indexer:
    """What chooses the positions that a token attends to: the lightning indexer of DeepSeek-V3.2; see `Choose`.

    Its queries are made of the attention's queries at their low rank; where these have none, of the rows that attention
    reads, behind a LayerNorm (Mistral Large 4). It has one key per token, in a cache of its own.

    Attributes:
        head_dim: of queries and key, of which the first dimensions turn as the attention's do.
        num_chosen: how many positions.
        is_interleaved: rotary pairs are neighbours in the checkpoint, not halves apart.
        has_head_scales: its queries grow with their positions, as `ScaleHeads` does it.
    """

    num_heads: int
    head_dim: int
    num_chosen: int
    is_interleaved: bool
    has_head_scales: bool = False

    def slots(self, hidden_size: int, query_rank: int | None) -> Iterator[Slot]:
        width = self.num_heads * self.head_dim
        if query_rank is not None:
            yield Slot("index_q", (width, query_rank), "indexer")
        else:
            yield Slot("index_query", (width, hidden_size), "indexer")
            yield Slot("index_query_norm", (hidden_size,), "norm")
            yield Slot("index_query_norm_bias", (hidden_size,), "bias")
        if self.has_head_scales:
            yield from _scale_slots("index_scales", self.num_heads)
        yield Slot("index_k", (self.head_dim, hidden_size), "indexer")
        yield Slot("index_weights", (self.num_heads, hidden_size), "indexer")
        yield Slot("index_k_norm", (self.head_dim,), "norm")
        yield Slot("index_k_norm_bias", (self.head_dim,), "bias")

    def emit_query(self, step: Emitter, x: Rows, weights: BlockWeights) -> Rows:
        """The queries, where attention has none of low rank; x: normed rows."""
        read = step.rows("index_input", x.width)
        norm, bias = weights["index_query_norm"].dense, weights["index_query_norm_bias"].dense
        step.add(Normalize(x, norm, read, _INDEX_NORM_EPS, bias=bias))
        (query,) = step.project(read, (weights["index_query"], None, "index_query"))
        return query

    def emit(
        self, step: Emitter, x: Rows, projected: tuple[Rows, ...], rope: int | None, weights: BlockWeights
    ) -> None:
        """Keep the tokens' keys and choose their positions; x: normed rows, `projected`: queries and keys."""
        query, key = projected
        if self.has_head_scales:
            step.add(_scaled(query, weights, "index_scales"))
        norm, bias = weights["index_k_norm"].dense, weights["index_k_norm_bias"].dense
        of_heads = step.rows("index_weights", self.num_heads, is_wide=True)
        step.add(
            Normalize(key, norm, key, _INDEX_NORM_EPS, bias=bias),
            KeepIndexKey(key, step.layer_id, rope, self.is_interleaved),
            Project(x, (Projection(weights["index_weights"], None, of_heads),), widens=True),
            Choose(
                query,
                of_heads,
                layer_id=step.layer_id,
                num_heads=self.num_heads,
                k=self.num_chosen,
                scale=(self.head_dim * self.num_heads) ** -0.5,
                rope=rope,
                is_interleaved=self.is_interleaved,
            ),
        )


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention: keys and values of all heads are projections of one short vector per token.

    Only that latent vector and one rotated key, which all heads share, are cached (section 2.1): with
    DeepSeek-V3's sizes 576 numbers per token and layer instead of 40960. See `AttendLatent`.

    Attributes:
        query_rank: the queries' own low rank; None: one full projection.
        scale: of the scores before the softmax.
        is_interleaved: rotary pairs are neighbours in the checkpoint, not halves apart.
        rope: None: nothing turns, and `rope_dim` is 0.
        norm_eps: of the norm behind the latent vectors, and of the one behind the queries' low rank.
        sharpening: (beta, length): queries grow with their positions, as `ScaleByPosition` does it (Mistral 4).
        has_head_scales: they do so head by head, as `ScaleHeads` does it (Mistral Large 4).
        source: the layer whose latent vectors it attends to; None: its own.
        is_source: later layers attend to this one's latent vectors, which stay where they are until then.
        has_head_gate: what each head gives is multiplied by the sigmoid of a projection to one number (Ling 3).
        is_indexed: over the positions that an indexer chooses (DeepSeek-V3.2).
        indexer: None: that of the last layer before which has one (GLM-5).
    """

    num_heads: int
    query_rank: int | None
    latent_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    rope: Rope | None
    scale: float
    is_interleaved: bool
    has_bias: bool
    norm_eps: float = LATENT_NORM_EPS
    sharpening: tuple[float, int] | None = None
    has_head_scales: bool = False
    source: int | None = None
    is_source: bool = False
    is_indexed: bool = False
    has_head_gate: bool = False
    indexer: Indexer | None = None

    @property
    def index_dim(self) -> int:
        """Of the key that the indexer finds a token by; 0: there is none."""
        return 0 if self.indexer is None else self.indexer.head_dim

    @property
    def num_chosen(self) -> int:
        """How many positions the indexer chooses; 0: there is none."""
        return 0 if self.indexer is None else self.indexer.num_chosen

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        return (1, self.latent_rank + self.rope_dim, 0) if self.source is None else (0, 0, 0)

    @property
    def shared_buffers(self) -> tuple[str, ...]:
        """Where the latent vectors are that it has from another layer."""
        return () if self.source is None else (_compressed_of(self.source),)

    @property
    def state_shape(self) -> None:
        return None

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        query_width = self.num_heads * (self.nope_dim + self.rope_dim)
        if self.query_rank is None:
            yield Slot("q", (query_width, hidden_size), "attention")
        else:
            yield from self._biased("q_a", (self.query_rank, hidden_size))
            yield Slot("q_a_norm", (self.query_rank,), "norm")
            yield Slot("q_b", (query_width, self.query_rank), "attention")
        if self.source is None:
            yield from self._biased("kv_a", (self.latent_rank + self.rope_dim, hidden_size))
            yield Slot("kv_a_norm", (self.latent_rank,), "norm")
        yield Slot("kv_b", (self.num_heads * (self.nope_dim + self.value_dim), self.latent_rank), "attention")
        if self.has_head_gate:
            yield Slot("g", (self.num_heads, hidden_size), "attention")
        if self.has_head_scales:
            yield from _scale_slots("scales", self.num_heads)
        yield from self._biased("o", (hidden_size, self.num_heads * self.value_dim))
        if self.indexer is not None:
            yield from self.indexer.slots(hidden_size, self.query_rank)

    def _biased(self, name: str, shape: tuple[int, int]) -> Iterator[Slot]:
        yield Slot(name, shape, "attention")
        if self.has_bias:
            yield Slot(f"{name}_bias", shape[:1], "bias")

    def emit(self, step: Emitter, x: Rows, weights: BlockWeights) -> Rows:
        expand, rope = weights["kv_b"], step.rope(self.rope)
        query, *index_query = self._emit_query(step, x, weights)
        compressed, *index_key = self._emit_compressed(step, x, weights)
        if self.indexer is not None:
            self.indexer.emit(step, x, (*index_query, *index_key), rope, weights)
        attended = step.rows("attended", self.num_heads * self.value_dim)
        if self.sharpening is not None:
            step.add(ScaleByPosition(query, *self.sharpening))
        if self.has_head_scales:
            step.add(_scaled(query, weights, "scales"))
        step.add(
            AttendLatent(
                query,
                compressed,
                attended,
                layer_id=step.layer_id if self.source is None else self.source,
                expand=expand,
                norm=None if self._is_sharing else weights["kv_a_norm"].dense,
                norm_eps=self.norm_eps,
                num_heads=self.num_heads,
                nope_dim=self.nope_dim,
                rope_dim=self.rope_dim,
                value_dim=self.value_dim,
                rope=rope,
                scale=self.scale,
                is_interleaved=self.is_interleaved,
                is_indexed=self.is_indexed,
            )
        )
        if self.has_head_gate:
            (gate,) = step.project(x, (weights["g"], None, "head_gate"))
            step.add(ScaleBySigmoid(attended, gate))
        (delta,) = step.project(attended, (weights["o"], weights.vector("o_bias"), "delta"))
        return delta

    @property
    def _is_sharing(self) -> bool:
        return self.is_source or self.source is not None

    def _emit_compressed(self, step: Emitter, x: Rows, weights: BlockWeights) -> tuple[Rows, ...]:
        """Where the latent vectors and the keys to be rotated are, and the keys of the indexer if there is one."""
        buffer, width = "compressed", self.latent_rank + self.rope_dim
        if self._is_sharing:
            buffer = _compressed_of(step.layer_id if self.source is None else self.source)
        narrowing = []
        if self.source is None:
            narrowing.append((weights["kv_a"], weights.vector("kv_a_bias"), buffer))
        if self.indexer is not None:
            narrowing.append((weights["index_k"], None, "index_key"))
        if narrowing:
            step.project(x, *narrowing)
        compressed = step.rows(buffer, width)
        if self.is_source:  # normed once, as the layers that share them have no norm
            latent = compressed.columns(0, self.latent_rank)
            step.add(Normalize(latent, weights["kv_a_norm"].dense, latent, self.norm_eps))
        return (compressed,) if self.indexer is None else (compressed, step.rows("index_key", self.index_dim))

    def _emit_query(self, step: Emitter, x: Rows, weights: BlockWeights) -> tuple[Rows, ...]:
        """Where the queries will be, and those of the indexer if there is one."""
        if self.query_rank is None:
            found = step.project(x, (weights["q"], None, "query"))
            return found if self.indexer is None else (*found, self.indexer.emit_query(step, x, weights))
        (low,) = step.project(x, (weights["q_a"], weights.vector("q_a_bias"), "low_query"))
        step.add(Normalize(low, weights["q_a_norm"].dense, low, self.norm_eps))
        widening = [(weights["q_b"], None, "query")]
        if self.indexer is not None:
            widening.append((weights["index_q"], None, "index_query"))
        return step.project(low, *widening)
