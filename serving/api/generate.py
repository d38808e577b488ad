"""POST /generate: TGI's contract in front of the worker."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

from fastapi import APIRouter, Request

from draft.errors import UserError
from serving.api.operations import Service
from serving.api.schemas import (
    ApiError,
    Details,
    ErrorResponse,
    GenerateParameters,
    GenerateRequest,
    GenerateResponse,
    Speculative,
    SpeculativeDetails,
    TokenDetails,
)
from serving.api.worker import EngineStopped, Job, Overloaded
from serving.engine import Completion, SamplingParams, SpeculationStats

router = APIRouter(tags=["generation"])

DEFAULT_MAX_NEW_TOKENS = 128
_STATUSES = (400, 413, 415, 422, 429, 500, 503)


@router.post(
    "/generate",
    response_model=GenerateResponse,
    response_model_exclude_unset=True,
    responses={status: {"model": ErrorResponse} for status in _STATUSES},
)
async def generate(body: GenerateRequest, request: Request) -> GenerateResponse:
    """Generate text; the answer waits in line behind the requests that came before."""
    service: Service = request.app.state.service
    received = time.monotonic()
    asked = body.parameters or GenerateParameters()
    try:
        service.worker.check_room()  # a full server does not tokenise
        prompt_ids = await service.encode(body.inputs)
        params = _sampling_params(asked, len(prompt_ids), service)
        length, rule = _speculation(asked, service)
        job = service.worker.submit(prompt_ids, params, speculation_length=length, rule=rule)
        completion = await _completion(request, service, job)
    except UserError as error:  # the engine's own checks of a request, in words meant for its author
        raise ApiError(422, "validation", str(error)) from error
    except Overloaded as error:
        raise ApiError(429, "overloaded", "Model is overloaded", {"retry-after": "1"}) from error
    except EngineStopped as error:
        raise ApiError(503, "generation", "the engine has stopped") from error
    service.metrics.answered(completion, queued=job.started - job.submitted, total=time.monotonic() - received)
    text = (body.inputs if asked.return_full_text else "") + completion.text
    if not asked.details:
        return GenerateResponse(generated_text=text)
    return GenerateResponse(generated_text=text, details=_details(completion, job))


async def _completion(request: Request, service: Service, job: Job) -> Completion:
    """Wait for the answer or for the client to leave, whichever is first; nothing runs on for a client that left."""
    answer = asyncio.wrap_future(job.future)
    gone = asyncio.ensure_future(_client_gone(request))
    either: set[asyncio.Future[Any]] = {answer, gone}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
    finally:  # also when the server, shutting down, cancels this very task
        gone.cancel()
        if not answer.done():
            answer.cancel()
            service.worker.cancel(job)
    raise ApiError(499, "cancelled", "the client closed the connection")


async def _client_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _sampling_params(asked: GenerateParameters, prompt_tokens: int, service: Service) -> SamplingParams:
    temperature = 1.0 if asked.temperature is None else asked.temperature
    return SamplingParams(
        max_new_tokens=_max_new_tokens(asked.max_new_tokens, prompt_tokens, service),
        temperature=temperature if asked.samples else 0.0,
        top_p=asked.top_p or 1.0,
        top_k=min(asked.top_k or 0, service.engine.target.vocab_size),  # more is no truncation, whatever the number
        seed=asked.seed,
        stop=tuple(asked.stop or ()),
    )


def _max_new_tokens(asked: int | None, prompt_tokens: int, service: Service) -> int:
    """The number of tokens to generate, refused where it exceeds the server's limit or the context."""
    context = service.engine.max_length
    limit = service.limits.max_new_tokens or context
    room = context - prompt_tokens
    if prompt_tokens == 0:
        raise ApiError(422, "validation", "`inputs` must have at least 1 token. Given: 0")
    if room < 1:
        raise ApiError(422, "validation", f"`inputs` must have less than {context} tokens. Given: {prompt_tokens}")
    if asked is None:
        return min(DEFAULT_MAX_NEW_TOKENS, limit, room)
    if asked > limit:
        raise ApiError(422, "validation", f"`max_new_tokens` must be <= {limit}. Given: {str(asked)[:40]}")
    if asked > room:
        raise ApiError(
            422,
            "validation",
            f"`inputs` tokens + `max_new_tokens` must be <= {context}. "
            f"Given: {prompt_tokens} `inputs` tokens and {asked} `max_new_tokens`",
        )
    return asked


def _speculation(asked: GenerateParameters, service: Service) -> tuple[int, str]:
    """How many tokens to draft at a time (0: plain decoding), capped by what the server does, and the rule."""
    engine, wanted = service.engine, asked.speculative or Speculative()
    rule = wanted.rule or engine.rule
    if engine.head is None or wanted.enabled is False:
        return 0, rule
    if wanted.num_tokens is None:
        return engine.speculation_length, rule
    return min(wanted.num_tokens, engine.speculation_length), rule


def _details(completion: Completion, job: Job) -> Details:
    return Details(
        finish_reason=completion.finish_reason,
        generated_tokens=len(completion.token_ids),
        seed=completion.seed,
        prefill=[],
        tokens=[
            TokenDetails(id=token.id, text=token.text, logprob=_finite(token.logprob), special=token.special)
            for token in completion.tokens
        ],
        speculative=SpeculativeDetails(
            enabled=job.speculation_length > 0,
            rule=job.rule,
            speculation_length=job.speculation_length,
            acceptance_length=_finite(completion.stats.acceptance_length),
            verifications=completion.stats.verifications,
            drafted=completion.stats.drafted,
            accepted=completion.stats.accepted,
            emitted=completion.stats.emitted,
            acceptance_per_position=acceptance_per_position(completion.stats),
        ),
    )


def acceptance_per_position(stats: SpeculationStats) -> list[float | None]:
    """accepted / drafted at each draft position; None where nothing was drafted."""
    pairs = zip(stats.accepted_per_position, stats.drafted_per_position, strict=True)
    return [accepted / drafted if drafted else None for accepted, drafted in pairs]


def _finite(value: float) -> float | None:
    """JSON has no NaN: null where a figure is undefined."""
    return value if math.isfinite(value) else None
