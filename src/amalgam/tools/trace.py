"""One text through the model, token by token: which experts does each token go to?

In: a deployment and a text. Out: a `PromptTrace`. Without a server, and counted like any other request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from amalgam.engine.params import SamplingParams
from amalgam.engine.request import Observation
from amalgam.models.routing import RoutingTrace
from amalgam.runtime.deployment import Deployment


@dataclass(frozen=True)
class PromptTrace:
    """The tokens that were computed, prompt first, and their routing."""

    token_ids: tuple[int, ...]
    texts: tuple[str, ...]
    token_bytes: tuple[bytes, ...]  # the same, exact where a character is spread over several tokens
    num_prompt_tokens: int
    routing: RoutingTrace

    def as_json(self) -> dict[str, Any]:
        tokens = zip(self.token_ids, self.texts, strict=True)
        return {
            "tokens": [{"id": token_id, "text": text} for token_id, text in tokens],
            "num_prompt_tokens": self.num_prompt_tokens,
            "layer_ids": list(self.routing.layer_ids),
            "experts": self.routing.expert_ids.tolist(),
            "gate_weights": self.routing.gate_weights.tolist(),
        }


def trace_prompt(deployment: Deployment, text: str, *, as_chat: bool = False, max_new_tokens: int = 1) -> PromptTrace:
    """Run a text, and the greedy answer to it, through the model.

    The last new token is never fed back, so that with `max_new_tokens` 1 the trace is that of the prompt.

    Raises:
        AmalgamError: the text cannot be encoded or is too long, or the model has no experts that are counted.
    """
    tokenizer = deployment.tokenizer
    token_ids = tokenizer.encode_chat([{"role": "user", "content": text}]) if as_chat else tokenizer.encode(text)
    params = SamplingParams(max_new_tokens=max_new_tokens, do_sample=False)
    [answer] = deployment.engine.generate([token_ids], params, Observation(wants_trace=True))
    if answer.error is not None:
        raise answer.error
    assert answer.trace is not None
    computed = (*token_ids, *answer.token_ids)[: len(answer.trace.expert_ids)]
    texts = tuple(tokenizer.token_text(token_id) for token_id in computed)
    token_bytes = tuple(tokenizer.token_bytes(token_id) for token_id in computed)
    return PromptTrace(computed, texts, token_bytes, len(token_ids), answer.trace)
