"""The inner bases of a Transformer, in which what it computes does not depend.

In: a decoder's slots. Out: which bases each weight's outputs and inputs stand in. Must never know: sources, values.

Rotate the residual stream and every weight that reads or writes it, divide a norm by factors and multiply what reads
it, exchange two channels of an MLP: the model computes the same, and none of the weights is what it was. QuaRot and
SpinQuant (arXiv:2404.00456, 2405.16406) do the first, AWQ and SmoothQuant (arXiv:2306.00978, 2211.10438) the second.
Each such freedom is named here a gauge; a weight taken from another model of the same function fits only where the
gauges that it touches are the same in both.

    residual            embedding, norms, whatever reads the stream, whatever writes it
    N.attention_norm    the norm and what reads it; likewise N.mlp_norm and norm
    N.heads             the order of heads; of those that share keys and values, queries alone tell it
    N.query_key         queries and keys, head by head; of latent attention N.rotary and N.query_low besides
    N.value_out         values and what projects them back; N.latent of latent attention
    N.experts           the order of experts, by the router
    N.E.channels        the order of the channels of one MLP or expert: gate, up, down
    inputs              the channels of what layers are given beside the stream
    rope_growth         the frequencies of rotations, where they are learned
    N.E.up_down         the factors of its channels, which the gate's nonlinearity has no part in
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, cached_property

RESIDUAL = "residual"
_LAST_NORM = "norm"
_INPUTS = "inputs"


@dataclass(frozen=True)
class Axes:
    """The gauges that a weight's axes stand in.

    Attributes:
        outputs, inputs: of a matrix. A vector has outputs only.
        decides: the gauge that is the same in two models exactly if this weight is: a norm, a router.
        leaves_open: gauges of which a weight that is the same says nothing.
    """

    outputs: frozenset[str] = frozenset()
    inputs: frozenset[str] = frozenset()
    decides: str | None = None
    leaves_open: frozenset[str] = frozenset()

    @cached_property
    def all(self) -> frozenset[str]:
        return self.outputs | self.inputs


@cache
def axes_of(slot: str) -> Axes:
    """The gauges of a slot by its name; none for one whose place is not known, which a family has for itself."""
    if slot in ("embedding", "positions"):
        return Axes(inputs=frozenset({RESIDUAL}))
    if slot.startswith("inputs_"):
        stream = frozenset({RESIDUAL}) if slot == "inputs_projection" else frozenset()
        inputs = frozenset({_INPUTS})
        return Axes(inputs=inputs) if slot == "inputs_embedding" else Axes(inputs, stream)
    if slot == "rope_growth":
        return Axes(outputs=frozenset({slot}), decides=slot)
    if slot == "head":
        return Axes(inputs=frozenset({RESIDUAL, _LAST_NORM}))
    if slot.removesuffix("_bias") == _LAST_NORM:
        return Axes(outputs=frozenset({_LAST_NORM}), decides=_LAST_NORM)
    match = re.fullmatch(r"layers\.(\d+)\.(\w+)(?:\.(.+))?", slot)
    if match is None:
        return Axes()
    layer, block, local = match.groups()
    if local is None:  # layers.N.attention_norm, perhaps with _bias
        gauge = f"{layer}.{block.removesuffix('_bias')}"
        return Axes(outputs=frozenset({gauge}), decides=gauge)
    return {"attention": _attention, "mlp": _mlp, "inputs": _inputs}[block](layer, local)


def _inputs(layer: str, local: str) -> Axes:
    """What a layer makes of inputs of its own."""
    inputs, stream = frozenset({_INPUTS}), frozenset({RESIDUAL})
    known = {"gate": Axes(inputs, stream), "projection": Axes(stream, inputs)}
    return known.get(local) or _own_norm(layer, f"inputs_{local}")


def _own_norm(layer: str, local: str) -> Axes:
    """A norm inside of a block."""
    gauge = f"{layer}.{local}"
    return Axes(outputs=frozenset({gauge}), decides=gauge)


def _attention(layer: str, local: str) -> Axes:
    stream = frozenset({RESIDUAL, f"{layer}.attention_norm"})
    heads, query_key, value_out = f"{layer}.heads", f"{layer}.query_key", f"{layer}.value_out"
    low, latent, rotary = f"{layer}.query_low", f"{layer}.latent", f"{layer}.rotary"
    index = f"{layer}.index"  # heads and channels of an indexer
    matrices = {
        "q": ({heads, query_key, rotary}, stream),
        "k": ({heads, query_key}, stream),
        "v": ({heads, value_out}, stream),
        "qkv": ({heads, query_key, value_out}, stream),
        "o": ({RESIDUAL}, {heads, value_out}),
        "qkvz": ({heads, query_key, value_out}, stream),
        "z": ({heads, value_out}, stream),
        **{rates: ({heads}, stream) for rates in ("ba", "b", "a")},
        "out": ({RESIDUAL}, {heads, value_out}),
        **{part: ({heads, query_key, value_out}, stream) for part in ("in", "bcx")},
        "f": ({heads, query_key}, stream),
        "g": ({heads, value_out}, stream),
        "q_a": ({low}, stream),
        "q_b": ({heads, query_key, rotary}, {low}),
        "kv_a": ({latent, rotary}, stream),
        "kv_b": ({heads, query_key, value_out}, {latent}),
        "index_q": ({index}, {low}),
        "index_query": ({index}, stream | {f"{layer}.index_query_norm"}),
        "index_k": ({index}, stream),
        "index_weights": ({index}, stream),
    }
    vectors = {
        "q_norm": {query_key},
        "k_norm": {query_key},
        "q_a_norm": {low},
        "kv_a_norm": {latent},
        "index_k_norm": {index},
        "index_k_norm_bias": {index},
        **{part: {index} for part in ("index_scales", "index_scales_bias")},
        **{part: {heads} for part in ("scales", "scales_bias")},
        "sinks": {heads},
        "convolution": {heads, query_key, value_out},
        "convolution_bias": {heads, query_key, value_out},
        **{f"{part}_convolution": {heads, query_key} for part in ("q", "k")},
        "v_convolution": {heads, value_out},
        "log_rate": {heads},
        **{part: {heads} for part in ("decay_bias", "step_bias", "skip")},
        "norm": {value_out},
    }
    if local in vectors:
        return Axes(outputs=frozenset(vectors[local]))
    if local.removesuffix("_bias") == "index_query_norm":
        return _own_norm(layer, "index_query_norm")
    outputs, inputs = matrices.get(local.removesuffix("_bias"), (set(), set()))
    is_bias, part = local.endswith("_bias"), local.removesuffix("_bias")
    leaves_open = frozenset({heads}) if part in ("k", "v") else frozenset()
    return Axes(frozenset(outputs), frozenset() if is_bias else frozenset(inputs), leaves_open=leaves_open)


def _mlp(layer: str, local: str) -> Axes:
    stream = frozenset({RESIDUAL, f"{layer}.mlp_norm"})
    order = f"{layer}.experts"
    if local == "router":
        return Axes(frozenset({order}), stream, decides=order)
    if local in ("router_bias", "router_correction", "router_factors"):
        return Axes(frozenset({order}))
    if local == "router_scale" or local.endswith("_norm"):
        return _own_norm(layer, local)
    if local == "shared_gate":
        return Axes(inputs=stream)
    expert, _, part = local.rpartition(".")
    channels, factors = f"{layer}.{expert}.channels", f"{layer}.{expert}.up_down"
    numbered = frozenset({order}) if expert.startswith("experts.") else frozenset()
    is_bias, part = part.endswith("_bias"), part.removesuffix("_bias")
    inputs = frozenset() if is_bias else stream
    if part == "gate":
        return Axes(numbered | {channels}, inputs, leaves_open=numbered)
    if part in ("up", "gate_up"):
        return Axes(numbered | {channels, factors}, inputs, leaves_open=numbered)
    if part == "down":
        inner = frozenset() if is_bias else numbered | {channels, factors}
        return Axes(frozenset({RESIDUAL}), inner, leaves_open=numbered)
    return Axes()
