"""TGI's surface: POST /generate, /generate_stream and /."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from serving.api.documentation import as_stream, documented
from serving.api.errors import ApiError, api_error, body_of, echo
from serving.api.figures import finite, speculation_of, speculative_details
from serving.api.schemas import (
    ErrorResponse,
    GenerateParameters,
    GenerateRequest,
    GenerateResponse,
    StreamEvent,
)
from serving.api.service import Names, Service, encode, new_tokens, rendered
from serving.api.streaming import EventStream, Generation, event
from serving.engine import Completion, SamplingParams, Speculation, Token

router = APIRouter(tags=["TGI"])

DEFAULT_MAX_NEW_TOKENS = 128
_NAMES = Names("inputs", "max_new_tokens")
_STATUSES = (400, 401, 408, 413, 415, 422, 424, 429, 500, 503, 504)
_ERRORS = documented(ErrorResponse, _STATUSES)


@dataclass(frozen=True)
class Asked:
    """A request as the engine takes it, and what its answer needs."""

    service: Service
    inputs: str
    parameters: GenerateParameters
    prompt_ids: list[int]
    speculation: Speculation
    generation: Generation
    received: float  # seconds of time.monotonic()
    validated: float


@router.post("/generate", response_model=GenerateResponse, responses=_ERRORS | as_stream(StreamEvent))
async def generate(body: GenerateRequest, request: Request) -> Response:
    """Generate text; with `stream` as server-sent events, one a token."""
    return await (_streamed if body.stream else _whole)(await _begin(body, request), request)


@router.post(
    "/generate_stream", status_code=200, response_class=EventStream, responses=_ERRORS | as_stream(StreamEvent)
)
async def generate_stream(body: GenerateRequest, request: Request) -> Response:
    """Generate text as server-sent events: exactly one a token, the last one with generated_text and details."""
    return await _streamed(await _begin(body, request), request)


@router.post("/", response_model=list[GenerateResponse], responses=_ERRORS | as_stream(StreamEvent))
async def compatible(body: GenerateRequest, request: Request) -> Response:
    """As /generate, for clients that know a model by its address only: a list of one when not streamed."""
    asked = await _begin(body, request)
    return await _streamed(asked, request) if body.stream else await _whole(asked, request, listed=True)


async def _begin(body: GenerateRequest, request: Request) -> Asked:
    service: Service = request.app.state.service
    received = time.monotonic()
    asked = body.parameters or GenerateParameters()
    service.check_open()  # a full server does not tokenise
    if asked.truncate is not None and asked.truncate >= service.engine.max_length:
        told = f"`truncate` must be < {service.engine.max_length}, the context. Given: {echo(asked.truncate)}"
        raise ApiError("validation", told, field="truncate")
    text = rendered(service, [{"role": "user", "content": body.inputs}], "chat") if asked.chat else body.inputs
    # a template has the special tokens that its prompts begin with
    prompt_ids = await encode(service, text, _NAMES, special_tokens=not asked.chat, end_only=bool(asked.truncate))
    prompt_ids = prompt_ids[-(asked.truncate or 0) :]
    needs_logprobs = bool(asked.details or body.stream or request.url.path == "/generate_stream")
    params = SamplingParams(
        max_new_tokens=new_tokens(service, asked.max_new_tokens, len(prompt_ids), DEFAULT_MAX_NEW_TOKENS, _NAMES),
        temperature=(1.0 if asked.temperature is None else asked.temperature) if asked.samples else 0.0,
        top_p=asked.top_p or 1.0,
        top_k=min(asked.top_k or 0, service.engine.target.vocab_size),  # more is no truncation, whatever the number
        repetition_penalty=asked.repetition_penalty or 1.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        seed=asked.seed,
        stop=tuple(asked.stop or ()),
        logprobs=(asked.top_n_tokens or 0) if needs_logprobs else None,
    )
    speculation = speculation_of(asked.speculative, service)
    validated = time.monotonic()
    generation = Generation.begin(service, [prompt_ids], [params], speculation, received)
    request.scope["draftsmith.log"] = {"prompt_tokens": len(prompt_ids)}
    return Asked(service, body.inputs, asked, prompt_ids, speculation, generation, received, validated)


async def _whole(asked: Asked, request: Request, *, listed: bool = False) -> Response:
    [completion] = await asked.generation.completions(request)
    request.scope["draftsmith.log"] |= {"generated_tokens": len(completion.token_ids)}
    answer: dict[str, Any] = {"generated_text": _text(asked, completion)}
    if asked.parameters.details:
        answer["details"] = {
            **_details(asked, completion),
            "prefill": [],
            "tokens": [_token(asked, token) for token in completion.tokens],
        }
        if asked.parameters.top_n_tokens:
            answer["details"]["top_tokens"] = [_alternatives(asked, token) for token in completion.tokens]
    return JSONResponse([answer] if listed else answer, headers=_times(asked, completion))


async def _streamed(asked: Asked, request: Request) -> Response:
    headers = {"x-compute-type": asked.service.engine.target.device.type}
    return EventStream(_events(asked, request), asked.service.limits.stalled_seconds, headers)


async def _events(asked: Asked, request: Request) -> AsyncGenerator[bytes]:
    """Events, those of one step together; after the first a failure is an event, too."""
    index = 0
    try:
        async with aclosing(asked.generation.bursts()) as bursts:
            async for _, tokens, completion in bursts:
                events = []
                for token in tokens:
                    index += 1
                    last = completion if token is tokens[-1] else None
                    events.append(event(_event(asked, index, token, last), b"data:"))
                if events:
                    yield b"".join(events)
    except Exception as error:
        told = api_error(error)
        if index == 0:
            raise told from error
        yield event(body_of(told, openai=False), b"data:")
    finally:
        request.scope["draftsmith.log"] |= {"generated_tokens": index}


def _event(asked: Asked, index: int, token: Token, completion: Completion | None) -> dict[str, Any]:
    told: dict[str, Any] = {"index": index, "token": _token(asked, token)}
    if asked.parameters.top_n_tokens:
        told["top_tokens"] = _alternatives(asked, token)
    told |= {"generated_text": None, "details": None}
    if completion is not None:
        told["generated_text"] = _text(asked, completion)
        told["details"] = {**_details(asked, completion), "input_length": len(asked.prompt_ids)}
    return told


def _text(asked: Asked, completion: Completion) -> str:
    return (asked.inputs if asked.parameters.return_full_text else "") + completion.text


def _details(asked: Asked, completion: Completion) -> dict[str, Any]:
    return {
        "finish_reason": completion.finish_reason,
        "generated_tokens": len(completion.token_ids),
        "seed": completion.seed,
        "speculative": speculative_details(completion, asked.speculation, asked.service).model_dump(),
    }


def _token(asked: Asked, token: Token) -> dict[str, Any]:
    about: dict[str, Any] = {
        "id": token.id, "text": token.text, "logprob": finite(token.logprob), "special": token.special
    }  # fmt: skip
    if asked.parameters.wants_origin:
        accepted = token.accepted_position is not None
        about["origin"] = {
            "source": "draft" if accepted else "target",
            "position": token.accepted_position + 1 if token.accepted_position is not None else None,
            "rejected": None if token.rejected is None else _alternative(asked, token.rejected, None),
            "drafted": token.drafted,
        }
    return about


def _alternatives(asked: Asked, token: Token) -> list[dict[str, Any]]:
    return [_alternative(asked, token_id, logprob) for token_id, logprob in token.top or ()]


def _alternative(asked: Asked, token_id: int, logprob: float | None) -> dict[str, Any]:
    text, special = asked.service.token_text(token_id)
    return {"id": token_id, "text": text, "logprob": finite(logprob), "special": special}


def _times(asked: Asked, completion: Completion) -> dict[str, str]:
    """TGI's headers: milliseconds, tokens and characters."""
    now, times, generated = time.monotonic(), asked.generation.requests[0].times, len(completion.token_ids)

    def milliseconds(seconds: float) -> str:
        return str(round(1000 * seconds))

    inference = times.finished - times.started
    return {
        "x-compute-type": asked.service.engine.target.device.type,
        "x-compute-time": f"{now - asked.received:.3f}",
        "x-compute-characters": str(len(asked.inputs)),
        "x-total-time": milliseconds(now - asked.received),
        "x-validation-time": milliseconds(asked.validated - asked.received),
        "x-queue-time": milliseconds(times.started - times.submitted),
        "x-inference-time": milliseconds(inference),
        "x-time-per-token": milliseconds(inference / max(1, generated)),
        "x-prompt-tokens": str(len(asked.prompt_ids)),
        "x-generated-tokens": str(generated),
    }
