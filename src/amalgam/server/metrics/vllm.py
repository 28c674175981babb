"""Our figures under the names that vLLM's V1 engine gives its own, so that boards and alerts made for it draw from us.

In: the engine's figures. Out: metric families `vllm:…` with vLLM's types, and its labels `model_name` and `engine`. The
bounds of the histograms are ours. Names that older versions of vLLM gave the same figures are there too. What is not
counted here has no family (per-request parameters, LoRA).
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric

from amalgam.engine.request import FinishReason
from amalgam.server.metrics.families import EngineFigures, Families
from amalgam.server.service import Service

ENGINE = "0"
_FINISHED_REASONS = {  # vLLM's names, and one that it has no cause for
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",
    FinishReason.ERROR: "error",
    FinishReason.CONTENT_FILTER: "content_filter",
}


def families(service: Service, engine: EngineFigures) -> Iterator[Metric]:
    """All that vLLM's published board queries, and the rest of what both count."""
    reading, status = engine
    make = Families("vllm:", {"model_name": service.model_name, "engine": ENGINE})
    yield make.gauge("num_requests_running", "Requests being computed.", status.num_running)
    yield make.gauge("num_requests_waiting", "Requests in the queue.", status.num_waiting)
    used = status.num_blocks - status.num_free_blocks
    for name in ("kv_cache_usage_perc", "gpu_cache_usage_perc"):
        yield make.gauge(name, "Part of the KV cache in use, 1: all.", used / max(status.num_blocks, 1))
    blocks = {"block_size": service.settings.engine.block_size, "num_gpu_blocks": status.num_blocks}
    yield make.gauge("cache_config_info", "How the KV cache is set up.", [(blocks, 1)])
    counts = reading.counts
    for where in ("", "gpu_"):
        queries, hits = counts.num_prefix_query_tokens, counts.num_prefix_hit_tokens
        yield make.counter(f"{where}prefix_cache_queries", "Prompt tokens looked for.", queries)
        yield make.counter(f"{where}prefix_cache_hits", "Prompt tokens found.", hits)
    yield make.counter("num_preemptions", "Requests that gave their blocks back.", counts.num_preemptions)
    yield make.counter("prompt_tokens", "Prompt tokens computed.", reading.num_prompt_tokens)
    yield make.counter("generation_tokens", "Tokens generated.", reading.num_new_tokens)
    if (guessed := reading.speculation) is not None:
        yield make.counter("spec_decode_num_drafts", "Times that a request was given guesses.", guessed.num_drafts)
        yield make.counter("spec_decode_num_draft_tokens", "Tokens guessed.", guessed.num_proposed)
        yield make.counter("spec_decode_num_accepted_tokens", "Guesses that came true.", guessed.num_accepted)
        places = [({"position": place}, count) for place, count in enumerate(guessed.accepted_at)]
        yield make.counter("spec_decode_num_accepted_tokens_per_pos", "The same by their place.", places)
    finished = [({"finished_reason": name}, reading.finished.get(key, 0)) for key, name in _FINISHED_REASONS.items()]
    yield make.counter("request_success", "Requests by how they ended.", finished)
    for name, help_text, histogram in (
        ("time_to_first_token_seconds", "From arrival to the first token.", reading.first_token),
        ("inter_token_latency_seconds", "Between a request's outputs.", reading.inter_token),
        ("time_per_output_token_seconds", "Between a request's outputs.", reading.inter_token),
        ("request_time_per_output_token_seconds", "Between later tokens, a request's mean.", reading.per_token),
        ("e2e_request_latency_seconds", "From arrival to the end.", reading.total),
        ("request_queue_time_seconds", "In the queue, until the first step.", reading.queue),
        ("request_prefill_time_seconds", "From the first step to the first token.", reading.prompt),
        ("request_decode_time_seconds", "From the first token to the end.", reading.answer),
        ("request_inference_time_seconds", "From the first step to the end.", reading.inference),
        ("request_prompt_tokens", "Tokens of a prompt.", reading.prompt_lengths),
        ("request_generation_tokens", "Tokens of an answer.", reading.answer_lengths),
        ("request_max_num_generation_tokens", "Tokens of an answer, each sample counted.", reading.answer_lengths),
        ("iteration_tokens_total", "Tokens that a step computed.", reading.step_tokens),
    ):
        yield make.histogram(name, help_text, histogram)
