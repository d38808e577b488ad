"""OpenAI's surface: /v1/completions, /v1/chat/completions and /v1/models."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from serving.api.answers import Generation
from serving.api.documentation import as_stream, documented
from serving.api.errors import ApiError, api_error, body_of
from serving.api.figures import speculation_of
from serving.api.openai_answers import Answer
from serving.api.openai_schemas import (
    ChatRequest,
    CompletionRequest,
    CompletionResponse,
    OpenAiError,
    Sampling,
)
from serving.api.prompts import Names, check_ids, encode, new_tokens, rendered
from serving.api.service import Service
from serving.api.sse import EventStream, event
from serving.engine import SamplingParams
from serving.engine.params import SEED_LIMIT

router = APIRouter(prefix="/v1", tags=["OpenAI"])

DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as OpenAI has it
_ERRORS = documented(OpenAiError, (400, 401, 404, 408, 413, 415, 429, 500, 503, 504))
_DONE = b"data: [DONE]\n\n"


@router.post("/completions", response_model=CompletionResponse, responses=_ERRORS | as_stream())
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue texts."""
    service, received = _open(body, request)
    names = Names("prompt", "max_tokens")
    texts, prompts = _prompts(body.prompt)
    _check_choices(service, len(prompts or texts), body.choices)
    for ids in prompts:
        check_ids(service, ids, "prompt")
    prompts = prompts or [await encode(service, text, names) for text in texts]
    limits = [new_tokens(service, body.max_tokens, len(ids), DEFAULT_MAX_TOKENS, names) for ids in prompts]
    echoed = (texts or [service.engine.target.decode(ids) for ids in prompts]) if body.echo else []
    answer = _answer(service, body, prompts, body.logprobs, chat=False, echoed=echoed)
    return await _respond(body, request, answer, limits, received)


@router.post("/chat/completions", response_model=CompletionResponse, responses=_ERRORS | as_stream())
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation, under the target's own chat template."""
    service, received = _open(body, request)
    _check_choices(service, 1, body.choices)
    names = Names("messages", "max_completion_tokens" if body.max_tokens is None else "max_tokens")
    text = _rendered(service, body)
    prompt = await encode(service, text, names, special_tokens=False)
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    limits = [new_tokens(service, asked, len(prompt), None, names)]
    alternatives = (body.top_logprobs or 0) if body.logprobs else None
    answer = _answer(service, body, [prompt], alternatives, chat=True, echoed=[])
    return await _respond(body, request, answer, limits, received)


@router.get("/models", responses=documented(OpenAiError, (401, 503)))
async def models(request: Request) -> dict[str, Any]:
    """The one model that is served."""
    return {"object": "list", "data": [_about_model(request.app.state.service)]}


@router.get("/models/{name:path}", responses=documented(OpenAiError, (400, 401, 404, 503)))
async def model(name: str, request: Request) -> dict[str, Any]:
    """About the model of this name."""
    about = _about_model(request.app.state.service)
    if name != about["id"]:
        raise _unknown_model()
    return about


def _about_model(service: Service) -> dict[str, Any]:
    name = service.model_name
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "draftsmith",
        "root": name,
        "parent": None,
        "max_model_len": service.engine.max_length,
    }


def _unknown_model() -> ApiError:
    return ApiError(
        "not_found", "no such model; GET /v1/models tells what is served", field="model", code="model_not_found"
    )


def _open(body: Sampling, request: Request) -> tuple[Service, float]:
    """The service, where it takes requests for this model, and the time, in seconds of time.monotonic()."""
    service: Service = request.app.state.service
    service.check_open()  # a full server does not tokenise
    if service.strict_model_name and body.model is not None and body.model != service.model_name:
        raise _unknown_model()
    check_ids(service, body.stop_token_ids or [], "stop_token_ids")
    check_ids(service, [int(key) for key in body.logit_bias or ()], "logit_bias")
    return service, time.monotonic()


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> tuple[list[str], list[list[int]]]:
    """Texts, or lists of token ids; the other is empty."""
    each: Sequence[Any] = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    if isinstance(each[0], str):
        return list(each), []
    return [], list(each)


def _check_choices(service: Service, prompts: int, choices: int) -> None:
    """Raises ApiError for more sequences than a request may have, or than this server ever has room for."""
    limit = service.max_choices
    if prompts * choices > limit:
        told = f"prompts * `n` must be <= {limit}. Given: {prompts} prompts and {choices} `n`"
        raise ApiError("validation", told, field="n")


def _rendered(service: Service, body: ChatRequest) -> str:
    messages = [
        {"role": message.role, "content": message.text} | ({"name": message.name} if message.name else {})
        for message in body.messages
    ]
    return rendered(service, messages, "messages")


def _answer(
    service: Service, body: Sampling, prompts: list[list[int]], alternatives: int | None, chat: bool, echoed: list[str]
) -> Answer:
    speculation = speculation_of(body.speculative, service)
    return Answer(service, chat, prompts, body.choices, speculation, alternatives, echoed, bool(body.return_token_ids))


async def _respond(body: Sampling, request: Request, answer: Answer, limits: list[int], received: float) -> Response:
    service, prompts, params = answer.service, list[list[int]](), list[SamplingParams]()
    for prompt, limit in zip(answer.prompts, limits, strict=True):
        for choice in range(body.choices):
            prompts.append(prompt)
            params.append(_sampling_params(body, choice, limit, answer.alternatives, service))
    generation = Generation.begin(service, prompts, params, answer.speculation, received)
    request.scope["draftsmith.log"] = {"prompt_tokens": sum(map(len, answer.prompts))}
    if body.stream:
        return EventStream(_events(body, request, answer, generation), service.limits.stalled_seconds)
    whole = answer.whole(await generation.completions(request))
    request.scope["draftsmith.log"] |= {"generated_tokens": whole["usage"]["completion_tokens"]}
    return JSONResponse(whole)


def _sampling_params(
    body: Sampling, choice: int, max_new_tokens: int, logprobs: int | None, service: Service
) -> SamplingParams:
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if (body.min_tokens or 0) > max_new_tokens:
        message = f"`min_tokens` must be <= {max_new_tokens}, the most that is generated. Given: {body.min_tokens}"
        raise ApiError("validation", message, field="min_tokens")
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=body.top_p or 1.0,
        top_k=min(max(body.top_k or 0, 0), service.engine.target.vocab_size),
        min_p=body.min_p or 0.0,
        seed=None if body.seed is None else (body.seed + choice) % SEED_LIMIT,
        repetition_penalty=body.repetition_penalty or 1.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias={int(key): value for key, value in (body.logit_bias or {}).items()},
        min_new_tokens=body.min_tokens or 0,
        stop=stop,
        stop_ids=tuple(body.stop_token_ids or ()),
        keep_stop=bool(body.include_stop_str_in_output),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
    )


async def _events(body: Sampling, request: Request, answer: Answer, generation: Generation) -> AsyncGenerator[bytes]:
    """Chunks, the tokens of one step in one; after the first a failure is an event, too."""
    opened: set[int] = set()
    try:
        async with aclosing(generation.bursts()) as bursts:
            async for index, tokens, completion in bursts:
                chunks = []
                if index not in opened:
                    opened.add(index)
                    chunks.append(answer.opening(index, body.include_usage))
                chunks.append(answer.chunk(index, tokens, completion, body.include_usage))
                sent = [chunk for chunk in chunks if chunk is not None]
                if body.usage_in_every_chunk:
                    sent = [chunk | {"usage": answer.usage()} for chunk in sent]
                if sent:
                    yield b"".join(map(event, sent))
    except Exception as error:
        told = api_error(error)
        if not opened:
            raise told from error
        yield event(body_of(told, openai=True)) + _DONE
    else:
        yield (event(answer.last()) if body.include_usage else b"") + _DONE
    finally:
        request.scope["draftsmith.log"] |= {"generated_tokens": answer.usage()["completion_tokens"]}
