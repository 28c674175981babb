"""A request's tokens → what its caller sees: text, the end and its reason, and the figures.

In: a request and its next token. Out: `RequestOutput`. Must never know: queues, blocks, tensors.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from amalgam.engine.request import FinishReason, Request, RequestOutput, Usage


def take_token(request: Request, token_id: int, eos_token_ids: AbstractSet[int], now: float) -> RequestOutput:
    """Add a token to a request. The output `is_finished` if it was the last: end of sequence, stop string or length.

    Args:
        now: `time.monotonic()`.
    """
    assert request.text is not None
    request.token_ids.append(token_id)
    if request.first_token_at is None:
        request.first_token_at = now
    if token_id in eos_token_ids and not request.params.ignore_eos:
        return end(request, FinishReason.STOP, now, request.text.finish(token_id), (token_id,))
    stream = request.text
    text = stream.push(token_id)
    if stream.is_stopped:
        return end(request, FinishReason.STOP, now, text, (token_id,))
    if request.num_new_tokens < request.max_new_tokens:
        return RequestOutput(request.request_id, text, (token_id,))
    text += request.text.finish()
    reason = FinishReason.STOP if request.text.is_stopped else FinishReason.LENGTH
    return end(request, reason, now, text, (token_id,))


def end(
    request: Request,
    reason: FinishReason,
    now: float,
    text: str = "",
    token_ids: tuple[int, ...] = (),
    error: Exception | None = None,
) -> RequestOutput:
    """A request's last output, with its figures; to be made while the request still has its weight version."""
    return RequestOutput(request.request_id, text, token_ids, reason, error, _usage(request, now))


def _usage(request: Request, now: float) -> Usage:
    started_at = now if request.started_at is None else request.started_at
    first_token_at = now if request.first_token_at is None else request.first_token_at
    return Usage(
        num_prompt_tokens=request.num_prompt_tokens,
        num_new_tokens=request.num_new_tokens,
        queue_seconds=started_at - request.arrived_at,
        first_token_seconds=first_token_at - request.arrived_at,
        total_seconds=now - request.arrived_at,
        version=0 if request.version is None else request.version.version_id,
    )
