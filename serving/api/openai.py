"""OpenAI's surface: /v1/completions, /v1/chat/completions and /v1/models."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from serving.api.documentation import as_stream, documented
from serving.api.errors import ApiError, api_error, body_of
from serving.api.figures import finite, speculation_of, vllm_metrics
from serving.api.openai_schemas import (
    ChatRequest,
    CompletionRequest,
    CompletionResponse,
    OpenAiError,
    Sampling,
)
from serving.api.service import Names, Service, check_ids, encode, new_tokens, rendered
from serving.api.streaming import EventStream, Generation, event
from serving.engine import Completion, SamplingParams, Speculation, Token
from serving.engine.sampling import SEED_LIMIT

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


# OpenAI's answers and chunks, from the engine's tokens and completions.


_FINISH_REASONS = {"eos_token": "stop", "stop_sequence": "stop", "length": "length"}
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass
class Answer:
    """One request's answer as it is put together; `chat` decides between the two endpoints' shapes."""

    service: Service
    chat: bool
    prompts: list[list[int]]
    choices_per_prompt: int
    speculation: Speculation
    alternatives: int | None  # logprobs with so many alternatives a token; None: without
    echoed: list[str]  # what each prompt's text begins with
    token_ids: bool = False  # whether they are told, where vLLM has them
    completions: dict[int, Completion] = field(default_factory=dict)  # by choice
    offsets: dict[int, int] = field(default_factory=dict)  # characters of each choice so far
    generated: dict[int, int] = field(default_factory=dict)  # tokens of each choice so far

    def __post_init__(self) -> None:
        kind = "chatcmpl" if self.chat else "cmpl"
        self._about = {
            "id": f"{kind}-{secrets.token_hex(16)}",
            "created": int(time.time()),
            "model": self.service.model_name,
        }

    # not streamed

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        self.completions = dict(enumerate(completions))
        return {
            **self._about,
            "object": "chat.completion" if self.chat else "text_completion",
            "choices": [self._choice(index, completion) for index, completion in enumerate(completions)],
            "usage": self.usage(),
            "metrics": self.metrics(),
            **({"prompt_token_ids": self.prompts[0]} if self.token_ids and self.chat else {}),
        }

    def _choice(self, index: int, completion: Completion) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": completion.text, "refusal": None}
        else:
            choice["text"] = self._echo(index) + completion.text
        if self.token_ids:
            choice |= {"token_ids": completion.token_ids} | self._prompt_ids(index)
        return choice | {"logprobs": self._logprobs(index, completion.tokens)} | _end(completion)

    def _prompt_ids(self, index: int) -> dict[str, Any]:
        """A chat has one prompt, which its answer names once for all choices."""
        return {} if self.chat else {"prompt_token_ids": self.prompts[index // self.choices_per_prompt]}

    # streamed

    def opening(self, index: int, include_usage: bool) -> dict[str, Any] | None:
        """What a choice begins with, before its first token."""
        if self.chat:
            chunk = self._chunk(index, {"role": "assistant", "content": ""}, None, None, include_usage)
            return chunk | ({"prompt_token_ids": self.prompts[0]} if self.token_ids else {})
        echoed = self._echo(index)
        if not echoed and not self.token_ids:
            return None
        return self._chunk(index, echoed, None, None, include_usage, self._prompt_ids(index) if self.token_ids else {})

    def chunk(
        self, index: int, tokens: list[Token], completion: Completion | None, include_usage: bool
    ) -> dict[str, Any] | None:
        """The tokens of one step, and a choice's end; None where there is nothing to tell."""
        text = "".join(token.text for token in tokens if not token.special)
        self.generated[index] = self.generated.get(index, 0) + len(tokens)
        if completion is not None:
            self.completions[index] = completion
        if not text and completion is None and self.alternatives is None and not self.token_ids:
            return None
        delta: Any = ({"content": text} if text else {}) if self.chat else text
        ids = {"token_ids": [token.id for token in tokens]} if self.token_ids else {}
        return self._chunk(index, delta, self._logprobs(index, tokens), completion, include_usage, ids)

    def last(self) -> dict[str, Any]:
        """The chunk with the usage, without a choice."""
        return {**self._about, "object": self._chunk_object, "choices": [], "usage": self.usage(),
                "metrics": self.metrics()}  # fmt: skip

    @property
    def _chunk_object(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(
        self,
        index: int,
        delta: Any,
        logprobs: Any,
        completion: Completion | None,
        include_usage: bool,
        ids: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta" if self.chat else "text": delta, "logprobs": logprobs, **_end(completion)}
        choice |= ids or {}
        usage = {"usage": None} if include_usage else {}
        return {**self._about, "object": self._chunk_object, "choices": [choice], **usage}

    # both

    def usage(self) -> dict[str, Any]:
        """Of what has been told so far."""
        prompt = sum(map(len, self.prompts))
        ended = self.completions
        generated = sum(len(each.token_ids) for each in ended.values())
        generated += sum(count for index, count in self.generated.items() if index not in ended)
        accepted = sum(each.stats.accepted for each in ended.values())
        drafted = sum(each.stats.drafted for each in ended.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "completion_tokens_details": {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": drafted - accepted,
            },
        }

    def metrics(self) -> dict[str, Any]:
        return vllm_metrics(list(self.completions.values()), self.speculation, self.service)

    def _echo(self, index: int) -> str:
        return self.echoed[index // self.choices_per_prompt] if self.echoed else ""

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """Of the tokens that are in the text: special ones are not."""
        if self.alternatives is None:
            return None
        shown = [token for token in tokens if not token.special]
        if self.chat:
            return {"content": [self._content(token) for token in shown], "refusal": None}
        offsets, start = [], self.offsets.get(index, len(self._echo(index)))
        for token in shown:
            offsets.append(start)
            start += len(token.text)
        self.offsets[index] = start
        return {
            "tokens": [token.text for token in shown],
            "token_logprobs": [finite(token.logprob) for token in shown],
            "top_logprobs": [self._table(token) for token in shown] if self.alternatives else None,
            "text_offset": offsets,
        }

    def _content(self, token: Token) -> dict[str, Any]:
        top = [self._alternative(self._name(token_id), logprob) for token_id, logprob in token.top or ()]
        return self._alternative(token.text, token.logprob) | {"top_logprobs": top}

    def _alternative(self, text: str, logprob: float | None) -> dict[str, Any]:
        broken = not text or _REPLACEMENT in text
        return {"token": text, "logprob": finite(logprob), "bytes": None if broken else list(text.encode())}

    def _table(self, token: Token) -> dict[str, float | None]:
        """Alternatives by text; pieces of characters, which have none of their own, by id."""
        table: dict[str, float | None] = {}
        for token_id, logprob in token.top or ():
            text = self._name(token_id)
            table[f"token_id:{token_id}" if _REPLACEMENT in text or text in table else text] = finite(logprob)
        return table

    def _name(self, token_id: int) -> str:
        return self.service.token_text(token_id)[0]


def _end(completion: Completion | None) -> dict[str, Any]:
    if completion is None:
        return {"finish_reason": None}
    return {
        "finish_reason": _FINISH_REASONS[completion.finish_reason],
        "stop_reason": completion.stop_reason,
        "seed": completion.seed,
    }
