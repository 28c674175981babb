"""A request's tokens → what its caller sees: text, the end and its reason, and the figures.

In: a request and its new tokens. Out: `RequestOutput`. Must never know: queues, blocks, tensors.
"""

from __future__ import annotations

from amalgam.engine.request import FinishReason, NewTokens, Request, RequestOutput, Usage

Deliveries = list[tuple[Request, RequestOutput]]


def take_tokens(request: Request, new: NewTokens, now: float) -> RequestOutput:
    """Add tokens to a request, up to the one that ends it: end of sequence, stop string or length.

    Args:
        now: `time.monotonic()`.

    Returns:
        The tokens that were added, and their text. It `is_finished` if there are no more to come.
    """
    assert request.text is not None
    reason: FinishReason | None = None
    stopped_by: str | int | None = None
    error: Exception | None = None
    stream, constraint, text, num_taken = request.text, request.constraint, "", 0
    for token_id in new.token_ids:
        request.token_ids.append(token_id)
        num_taken += 1
        if token_id in request.end_token_ids:
            text += stream.finish(token_id)
            reason, stopped_by = FinishReason.STOP, token_id if token_id in request.params.stop_token_ids else None
            break
        text += stream.push(token_id)
        if stream.is_stopped:
            reason = FinishReason.STOP
            break
        if constraint is not None and constraint.take(token_id):
            text += stream.finish()
            error = constraint.error
            reason = FinishReason.STOP if error is None else FinishReason.ERROR
            break
        if request.num_new_tokens >= request.max_new_tokens:
            text += stream.finish()
            reason = FinishReason.STOP if stream.is_stopped else FinishReason.LENGTH
            break
    if reason is None:
        if not new.logprobs:
            return RequestOutput(request.request_id, text, new.token_ids)
        return RequestOutput(request.request_id, text, new.token_ids, logprobs=new.logprobs)
    token_ids, logprobs = new.token_ids[:num_taken], new.logprobs[:num_taken]
    if stopped_by is None:
        stopped_by = stream.stop_string
    last = end(request, reason, now, error)
    return last._replace(text=text, token_ids=token_ids, logprobs=logprobs, stopped_by=stopped_by)


def end(request: Request, reason: FinishReason, now: float, error: Exception | None = None) -> RequestOutput:
    """A request's last output, with its figures; to be made while the request still has its weight version."""
    return RequestOutput(request.request_id, "", (), reason, error, _usage(request, now))


def _usage(request: Request, now: float) -> Usage:
    started_at = now if request.started_at is None else request.started_at
    first_token_at = now if request.first_token_at is None else request.first_token_at
    doubt = request.doubt
    version = request.version if doubt is None or doubt.may_go_on else doubt.version  # that has given its tokens
    return Usage(
        num_prompt_tokens=request.num_prompt_tokens,
        num_new_tokens=request.num_new_tokens,
        queue_seconds=started_at - request.submitted_at,
        first_token_seconds=first_token_at - request.arrived_at,
        total_seconds=now - request.arrived_at,
        version=0 if version is None else version.version_id,
        num_cached_tokens=request.num_cached_tokens,
        encoding_seconds=request.submitted_at - request.arrived_at,
    )
