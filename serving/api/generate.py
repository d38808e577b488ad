"""TGI's API: POST /generate, /generate_stream and /."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from serving.api.errors import ApiError, api_error, body_of, echo
from serving.api.schemas import (
    ERRORS,
    EVENT_STREAM,
    GenerateParameters,
    GenerateRequest,
    GenerateResponse,
    SpeculativeDetails,
)
from serving.api.service import Names, Service
from serving.api.streaming import EventStream, Generation, event, finite
from serving.engine import Completion, SamplingParams, Speculation, Token
from serving.engine.sampling import DEFAULT_MAX_NEW_TOKENS

router = APIRouter(tags=["TGI"], responses=ERRORS)

_NAMES = Names("inputs", "max_new_tokens")


@dataclass(frozen=True)
class Job:
    """A request that the engine works on, and what its answer needs."""

    service: Service
    inputs: str
    parameters: GenerateParameters
    prompt_ids: list[int]
    speculation: Speculation
    generation: Generation
    received: float  # seconds of time.monotonic()
    validated: float


@router.post("/generate", response_model=GenerateResponse, responses=EVENT_STREAM)
async def generate(body: GenerateRequest, request: Request) -> Response:
    """Generate text; with `stream` as server-sent events, one per token."""
    return await (_streamed if body.stream else _whole)(await _begin(body, request), request)


@router.post("/generate_stream", status_code=200, response_class=EventStream, responses=EVENT_STREAM)
async def generate_stream(body: GenerateRequest, request: Request) -> Response:
    """Generate text as server-sent events: exactly one per token, the last one with generated_text and details."""
    return await _streamed(await _begin(body, request), request)


@router.post("/", response_model=list[GenerateResponse], responses=EVENT_STREAM)
async def generate_listed(body: GenerateRequest, request: Request) -> Response:
    """Generate text as /generate does, for clients that know a model by its address only: as a list of one."""
    job = await _begin(body, request)
    return await _streamed(job, request) if body.stream else await _whole(job, request, listed=True)


async def _begin(body: GenerateRequest, request: Request) -> Job:
    service: Service = request.app.state.service
    received = time.monotonic()
    parameters = body.parameters or GenerateParameters()
    context = service.check_open().max_length  # a full server does not tokenise
    truncate = parameters.truncate or 0
    if truncate >= context:
        message = f"`truncate` must be < {context}, the context. Given: {echo(truncate)}"
        raise ApiError("validation", message, field="truncate")
    text = body.inputs
    if parameters.chat:
        text = service.render([{"role": "user", "content": text}], "chat")
    # a template has the special tokens that its prompts begin with
    prompt_ids = await service.encode(text, _NAMES, special_tokens=not parameters.chat, end_only=bool(truncate))
    prompt_ids = prompt_ids[-truncate:]
    needs_logprobs = bool(parameters.details or body.stream or request.url.path == "/generate_stream")
    temperature = 1.0 if parameters.temperature is None else parameters.temperature
    params = SamplingParams.model_construct(  # of values that the schema has validated
        max_new_tokens=service.new_tokens(parameters.max_new_tokens, len(prompt_ids), DEFAULT_MAX_NEW_TOKENS, _NAMES),
        temperature=temperature if parameters.samples else 0.0,
        top_p=parameters.top_p or 1.0,
        top_k=min(parameters.top_k or 0, service.engine.target.vocab_size),  # more is no truncation
        repetition_penalty=parameters.repetition_penalty or 1.0,
        frequency_penalty=parameters.frequency_penalty or 0.0,
        seed=parameters.seed,
        stop=tuple(parameters.stop or ()),
        logprobs=(parameters.top_n_tokens or 0) if needs_logprobs else None,
    )
    speculation = service.speculation(parameters.speculative)
    validated = time.monotonic()
    generation = Generation(service, [prompt_ids], [params], speculation, received)
    request.scope["draftsmith.log"] = {"prompt_tokens": len(prompt_ids)}
    return Job(service, body.inputs, parameters, prompt_ids, speculation, generation, received, validated)


# The whole answer.


async def _whole(job: Job, request: Request, *, listed: bool = False) -> Response:
    [completion] = await job.generation.completions(request)
    request.scope["draftsmith.log"] |= {"generated_tokens": len(completion.token_ids)}
    answer: dict[str, Any] = {"generated_text": _text(job, completion)}
    if job.parameters.details:
        answer["details"] = {
            **_details(job, completion),
            "prefill": [],
            "tokens": [_token(job, token) for token in completion.tokens],
        }
        if job.parameters.top_n_tokens:
            answer["details"]["top_tokens"] = [_top_tokens(job, token) for token in completion.tokens]
    return JSONResponse([answer] if listed else answer, headers=_times(job, completion))


def _times(job: Job, completion: Completion) -> dict[str, str]:
    """Return TGI's headers: milliseconds, tokens and characters."""
    now, times, generated = time.monotonic(), job.generation.requests[0].times, len(completion.token_ids)

    def milliseconds(seconds: float) -> str:
        return str(round(1000 * seconds))

    inference = times.finished - times.started
    return {
        "x-compute-type": job.service.engine.target.device.type,
        "x-compute-time": f"{now - job.received:.3f}",
        "x-compute-characters": str(len(job.inputs)),
        "x-total-time": milliseconds(now - job.received),
        "x-validation-time": milliseconds(job.validated - job.received),
        "x-queue-time": milliseconds(times.started - times.submitted),
        "x-inference-time": milliseconds(inference),
        "x-time-per-token": milliseconds(inference / max(1, generated)),
        "x-prompt-tokens": str(len(job.prompt_ids)),
        "x-generated-tokens": str(generated),
    }


# Streams.


async def _streamed(job: Job, request: Request) -> Response:
    headers = {"x-compute-type": job.service.engine.target.device.type}
    return await EventStream.begin(_events(job, request), request, job.service.limits.stalled_seconds, headers)


async def _events(job: Job, request: Request) -> AsyncGenerator[bytes]:
    """Yield events, those of one step together; after the first a failure is an event, too."""
    index = 0
    try:
        async with aclosing(job.generation.bursts()) as bursts:
            async for _, tokens, completion in bursts:
                events = []
                for token in tokens:
                    index += 1
                    last = completion if token is tokens[-1] else None
                    events.append(event(_event(job, index, token, last), b"data:"))
                if events:
                    yield b"".join(events)
    except Exception as error:
        if index == 0:
            raise api_error(error) from error
        yield event(body_of(api_error(error), openai=False), b"data:")
    finally:
        request.scope["draftsmith.log"] |= {"generated_tokens": index}


def _event(job: Job, index: int, token: Token, completion: Completion | None) -> dict[str, Any]:
    data: dict[str, Any] = {"index": index, "token": _token(job, token)}
    if job.parameters.top_n_tokens:
        data["top_tokens"] = _top_tokens(job, token)
    data |= {"generated_text": None, "details": None}
    if completion is not None:
        data["generated_text"] = _text(job, completion)
        data["details"] = {**_details(job, completion), "input_length": len(job.prompt_ids)}
    return data


# Parts of both.


def _text(job: Job, completion: Completion) -> str:
    return (job.inputs if job.parameters.return_full_text else "") + completion.text


def _details(job: Job, completion: Completion) -> dict[str, Any]:
    stats, length = completion.stats, job.speculation.num_tokens or 0
    pairs = zip(stats.accepted_per_position, stats.drafted_per_position, strict=True)
    figures = SpeculativeDetails(
        enabled=length > 0,
        rule=job.speculation.rule or job.service.engine.rule,
        speculation_length=length,
        acceptance_length=finite(stats.acceptance_length),
        verifications=stats.verifications,
        drafted=stats.drafted,
        accepted=stats.accepted,
        emitted=stats.emitted,
        acceptance_per_position=[accepted / drafted if drafted else None for accepted, drafted in pairs],
    )
    return {
        "finish_reason": completion.finish_reason,
        "generated_tokens": len(completion.token_ids),
        "seed": completion.seed,
        "speculative": figures.model_dump(),
    }


def _token(job: Job, token: Token) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "id": token.id, "text": token.text, "logprob": finite(token.logprob), "special": token.special
    }  # fmt: skip
    if job.parameters.wants_origin:
        accepted = token.accepted_position is not None
        entry["origin"] = {
            "source": "draft" if accepted else "target",
            "position": token.accepted_position + 1 if token.accepted_position is not None else None,
            "rejected": None if token.rejected is None else _alternative(job, token.rejected, None),
            "drafted": token.drafted,
        }
    return entry


def _top_tokens(job: Job, token: Token) -> list[dict[str, Any]]:
    return [_alternative(job, token_id, logprob) for token_id, logprob in token.top or ()]


def _alternative(job: Job, token_id: int, logprob: float | None) -> dict[str, Any]:
    text, special = job.service.token_text(token_id)
    return {"id": token_id, "text": text, "logprob": finite(logprob), "special": special}
