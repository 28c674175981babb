"""Fields that OpenAI's interface has and this server refuses by name, unless their value asks for nothing.

In: nothing. Out: the fields, and the base of bodies that refuse them. Must never know: what the other fields mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from amalgam.server.api.refusing import Refused, RefusingBody

_NOT_STORED = Refused("Nothing is stored here.", (False,))
_NO_CODE = "A request cannot bring code or templates along."

REFUSED: Mapping[str, Refused] = {
    "service_tier": Refused("There is one tier.", ("auto", "default")),
    "prediction": Refused("Predicted outputs are not used."),
    "moderation": Refused("Nothing is moderated."),
    "access_programs": Refused("There are no access programs."),
    "prompt_cache_retention": Refused("Prompts are cached in memory, as long as there is room.", ("in_memory",)),
    "prompt_cache_options": Refused("Prompts are cached without being asked, as long as there is room."),
    "verbosity": Refused("Say in the prompt how long the answer should be.", ("medium",)),
    # vLLM's
    "use_beam_search": Refused("There is no beam search.", (False,)),
    "length_penalty": Refused("There is no beam search.", (1.0, 1)),
    "allowed_token_ids": Refused("Use structured_outputs, or logit_bias."),
    "bad_words": Refused("Use logit_bias."),
    "spaces_between_special_tokens": Refused("Special tokens stand as the tokenizer spells them.", (True,)),
    "truncate_prompt_tokens": Refused("A prompt that is too long is refused, never cut.", (-1,)),
    "guided_decoding_backend": Refused("There is one: llguidance.", ("auto", "guidance")),
    "guided_whitespace_pattern": Refused("Use guided_grammar to say where white space may stand."),
    "logits_processors": Refused(_NO_CODE),
    "chat_template": Refused(_NO_CODE),
    "mm_processor_kwargs": Refused("The model takes text only."),
    "kv_transfer_params": Refused("The KV cache of a request stays in this process."),
    "vllm_xargs": Refused("There are no extra arguments."),
    "cache_salt": Refused("The prefix cache is shared by all requests."),
    "request_id": Refused("The server chooses ids; the header X-Request-Id has them."),
    "return_prompt_text": Refused("Use echo, or /detokenize."),
}


class OpenAIBody(RefusingBody):
    """A body that refuses the fields in `REFUSED`, and in its own `refused`."""

    refused_everywhere: ClassVar[Mapping[str, Refused]] = REFUSED


STORE = {"store": _NOT_STORED}
CACHE_CONTROL = {
    "cache_control": Refused(
        "Prompts are cached without being asked, as long as there is room.",
        ({"type": "ephemeral"}, {"type": "ephemeral", "ttl": "5m"}),
    )
}
"""Anthropic's mark, which clients that speak to several makers' models leave in place."""
