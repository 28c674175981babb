"""OLMo 2 (`Olmo2ForCausalLM`): norms behind each block and none before, on all heads of queries and keys together.

OLMo Team 2024, "2 OLMo 2 Furious".
"""

from __future__ import annotations

from amalgam.models.naming import ATTENTION, HEAD_NORMS, MLP, POST_NORM_DECODER
from amalgam.models.reading.olmo import read_olmo, read_olmo_attention
from amalgam.models.spec import ConfigReader, Family, ModelSpec


def _read_spec(config: ConfigReader) -> ModelSpec:
    return read_olmo(config, "olmo2", (read_olmo_attention(config),) * config.int("num_hidden_layers"))


FAMILY = Family(
    name="olmo2",
    architectures=("Olmo2ForCausalLM",),
    read_spec=_read_spec,
    names={**POST_NORM_DECODER, **ATTENTION, **HEAD_NORMS, **MLP},
    tiny_config={"num_key_value_heads": 2, "intermediate_size": 128},
)
