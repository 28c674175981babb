"""OLMo 3 (`Olmo3ForCausalLM`): OLMo 2 with a window in three layers of four; long contexts change the others' rotation.

OLMo Team 2025, "OLMo 3".
"""

from __future__ import annotations

from amalgam.models.naming import ATTENTION, HEAD_NORMS, MLP, POST_NORM_DECODER
from amalgam.models.reading.attention import by_layer_type, every_nth_full, read_window
from amalgam.models.reading.olmo import read_olmo, read_olmo_attention
from amalgam.models.spec import ConfigReader, Family, ModelSpec

THETA = 500000.0


def _read_spec(config: ConfigReader) -> ModelSpec:
    # The class applies the key to the full layers only.
    config.expect("rope_theta", THETA)
    full, local = (
        read_olmo_attention(config, default_theta=THETA, layer_type=f"{kind}_attention") for kind in ("full", "sliding")
    )
    window = read_window(config, default=4096)
    return read_olmo(config, "olmo3", by_layer_type(config, local, window, every_nth_full(config, 4), full))


FAMILY = Family(
    name="olmo3",
    architectures=("Olmo3ForCausalLM",),
    read_spec=_read_spec,
    names={**POST_NORM_DECODER, **ATTENTION, **HEAD_NORMS, **MLP},
    tiny_config={
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": THETA,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": THETA},
        },
    },
)
