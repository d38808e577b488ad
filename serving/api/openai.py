"""OpenAI's API: /v1/completions, /v1/chat/completions and /v1/models."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from serving.api.errors import ApiError, api_error, body_of
from serving.api.openai_schemas import ChatRequest, CompletionRequest, CompletionResponse, OpenAiError, SamplingRequest
from serving.api.schemas import EVENT_STREAM
from serving.api.service import Names, Service
from serving.api.streaming import EventStream, Generation, event, finite
from serving.engine import Completion, SamplingParams, Speculation, Token
from serving.engine.sampling import SEED_LIMIT, sorted_pairs

router = APIRouter(
    prefix="/v1", tags=["OpenAI"], responses={"4XX": {"model": OpenAiError}, "5XX": {"model": OpenAiError}}
)

DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as OpenAI has it
_FINISH_REASONS = {"eos_token": "stop", "stop_sequence": "stop", "length": "length"}
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_DONE = b"data: [DONE]\n\n"


@router.post("/completions", response_model=CompletionResponse, responses=EVENT_STREAM)
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue texts."""
    received = time.monotonic()
    prompt, names = body.prompt, Names("prompt", "max_tokens")
    several: list[Any] = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)
    service = _open(body, request, prompts=len(several))
    prompts = []
    for each in several:
        if not isinstance(each, str):
            service.check_ids(each, "prompt")
        prompts.append(await service.encode(each, names) if isinstance(each, str) else each)
    limits = [service.new_tokens(body.max_tokens, len(ids), DEFAULT_MAX_TOKENS, names) for ids in prompts]
    echoed = []
    if body.echo:
        echoed = [each if isinstance(each, str) else service.engine.target.decode(each) for each in several]
    answer = Answer(service, body, prompts, body.logprobs, chat=False, echoed=echoed)
    return await _respond(answer, request, limits, received)


@router.post("/chat/completions", response_model=CompletionResponse, responses=EVENT_STREAM)
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation, under the target's chat template."""
    received = time.monotonic()
    service = _open(body, request, prompts=1)
    names = Names("messages", "max_completion_tokens" if body.max_tokens is None else "max_tokens")
    messages = [
        {"role": message.role, "content": message.text} | ({"name": message.name} if message.name else {})
        for message in body.messages
    ]
    prompt = await service.encode(service.render(messages, "messages"), names, special_tokens=False)
    requested = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    limits = [service.new_tokens(requested, len(prompt), None, names)]
    alternatives = (body.top_logprobs or 0) if body.logprobs else None
    return await _respond(Answer(service, body, [prompt], alternatives, chat=True), request, limits, received)


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """List the one model that is served."""
    return {"object": "list", "data": [_model(request.app.state.service)]}


@router.get("/models/{name:path}")
async def model(name: str, request: Request) -> dict[str, Any]:
    """Describe the model of this name."""
    served = _model(request.app.state.service)
    if name != served["id"]:
        raise _unknown_model()
    return served


def _model(service: Service) -> dict[str, Any]:
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
    return ApiError("not_found", "no such model; GET /v1/models lists it", field="model", code="model_not_found")


def _open(body: SamplingRequest, request: Request, *, prompts: int) -> Service:
    """Return the service, once it takes requests for this model, and of that many choices."""
    service: Service = request.app.state.service
    service.check_open()  # a full server does not tokenise
    if service.strict_model_name and body.model is not None and body.model != service.model_name:
        raise _unknown_model()
    service.check_ids(body.stop_token_ids or [], "stop_token_ids")
    service.check_ids(list(body.logit_bias or ()), "logit_bias")
    if prompts * body.choices > service.max_choices:
        given = f"{prompts} prompts and {body.choices} `n`"
        raise ApiError("validation", f"prompts * `n` must be <= {service.max_choices}. Given: {given}", field="n")
    return service


async def _respond(answer: Answer, request: Request, limits: list[int], received: float) -> Response:
    body, service, prompts, params = answer.body, answer.service, list[list[int]](), list[SamplingParams]()
    for prompt, limit in zip(answer.prompts, limits, strict=True):
        for choice in range(body.choices):
            prompts.append(prompt)
            params.append(_sampling_params(answer, choice, limit))
    generation = Generation(service, prompts, params, answer.speculation, received)
    request.scope["draftsmith.log"] = {"prompt_tokens": sum(map(len, answer.prompts))}
    if body.stream:
        return await EventStream.begin(_events(answer, generation, request), request, service.limits.stalled_seconds)
    whole = answer.whole(await generation.completions(request))
    request.scope["draftsmith.log"] |= {"generated_tokens": whole["usage"]["completion_tokens"]}
    return JSONResponse(whole)


def _sampling_params(answer: Answer, choice: int, max_new_tokens: int) -> SamplingParams:
    body = answer.body
    if (body.min_tokens or 0) > max_new_tokens:
        message = f"`min_tokens` must be <= {max_new_tokens}, the most that is generated. Given: {body.min_tokens}"
        raise ApiError("validation", message, field="min_tokens")
    return SamplingParams.model_construct(  # of values that the schema has validated
        max_new_tokens=max_new_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=body.top_p or 1.0,
        top_k=min(max(body.top_k or 0, 0), answer.service.engine.target.vocab_size),
        min_p=body.min_p or 0.0,
        seed=None if body.seed is None else (body.seed + choice) % SEED_LIMIT,
        repetition_penalty=body.repetition_penalty or 1.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=sorted_pairs(body.logit_bias or {}),
        min_new_tokens=body.min_tokens or 0,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        stop_ids=tuple(body.stop_token_ids or ()),
        keep_stop=bool(body.include_stop_str_in_output),
        ignore_eos=bool(body.ignore_eos),
        logprobs=answer.alternatives,
    )


async def _events(answer: Answer, generation: Generation, request: Request) -> AsyncGenerator[bytes]:
    """Yield chunks, the tokens of one step in one; after the first a failure is an event, too."""
    opened: set[int] = set()
    try:
        async with aclosing(generation.bursts()) as bursts:
            async for index, tokens, completion in bursts:
                chunks = [] if index in opened else [answer.opening(index)]
                opened.add(index)
                chunks.append(answer.chunk(index, tokens, completion))
                sent = [chunk for chunk in chunks if chunk is not None]
                if answer.body.usage_in_every_chunk:
                    sent = [chunk | {"usage": answer.usage()} for chunk in sent]
                if sent:
                    yield b"".join(map(event, sent))
    except Exception as error:
        if not opened:
            raise api_error(error) from error
        yield event(body_of(api_error(error), openai=True)) + _DONE
    else:
        yield (event(answer.last()) if answer.body.include_usage else b"") + _DONE
    finally:
        request.scope["draftsmith.log"] |= {"generated_tokens": answer.usage()["completion_tokens"]}


@dataclass
class Answer:
    """One request's answer, whole or in chunks; `chat` selects between the two endpoints' shapes."""

    service: Service
    body: SamplingRequest
    prompts: list[list[int]]
    alternatives: int | None  # alternatives per token in the logprobs; None: no logprobs
    chat: bool
    echoed: list[str] = field(default_factory=list)  # the beginning of the text of each prompt's choices
    completions: dict[int, Completion] = field(default_factory=dict)  # by choice
    offsets: dict[int, int] = field(default_factory=dict)  # characters of each choice so far
    generated: dict[int, int] = field(default_factory=dict)  # tokens of each choice so far

    def __post_init__(self) -> None:
        self.speculation: Speculation = self.service.speculation(self.body.speculative)
        self.token_ids = bool(self.body.return_token_ids)
        kind = "chatcmpl" if self.chat else "cmpl"
        self._header = {
            "id": f"{kind}-{secrets.token_hex(16)}",
            "created": int(time.time()),
            "model": self.service.model_name,
        }

    # not streamed

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        self.completions = dict(enumerate(completions))
        return {
            **self._header,
            "object": "chat.completion" if self.chat else "text_completion",
            "choices": [self._choice(index, completion) for index, completion in enumerate(completions)],
            "usage": self.usage(),
            "metrics": self._metrics(),
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
        """Return the prompt's ids for a choice; a chat has one prompt, which stands beside its choices."""
        return {} if self.chat else {"prompt_token_ids": self.prompts[index // self.body.choices]}

    # streamed

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return a choice's first chunk, before its first token; None where it is empty."""
        if self.chat:
            chunk = self._chunk(index, {"role": "assistant", "content": ""}, None, None)
            return chunk | ({"prompt_token_ids": self.prompts[0]} if self.token_ids else {})
        echoed = self._echo(index)
        if not echoed and not self.token_ids:
            return None
        return self._chunk(index, echoed, None, None, self._prompt_ids(index) if self.token_ids else {})

    def chunk(self, index: int, tokens: list[Token], completion: Completion | None) -> dict[str, Any] | None:
        """Return the chunk of one step's tokens, and of a choice's end; None where it is empty."""
        text = "".join(token.text for token in tokens if not token.special)
        self.generated[index] = self.generated.get(index, 0) + len(tokens)
        if completion is not None:
            self.completions[index] = completion
        if not text and completion is None and self.alternatives is None and not self.token_ids:
            return None
        delta: Any = ({"content": text} if text else {}) if self.chat else text
        ids = {"token_ids": [token.id for token in tokens]} if self.token_ids else {}
        return self._chunk(index, delta, self._logprobs(index, tokens), completion, ids)

    def last(self) -> dict[str, Any]:
        """Return the chunk with the usage, without a choice."""
        return {**self._header, "object": self._chunk_object, "choices": [], "usage": self.usage(),
                "metrics": self._metrics()}  # fmt: skip

    @property
    def _chunk_object(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(
        self,
        index: int,
        delta: Any,
        logprobs: Any,
        completion: Completion | None,
        ids: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta" if self.chat else "text": delta, "logprobs": logprobs, **_end(completion)}
        choice |= ids or {}
        usage = {"usage": None} if self.body.include_usage else {}
        return {**self._header, "object": self._chunk_object, "choices": [choice], **usage}

    # both

    def usage(self) -> dict[str, Any]:
        """Return the counts of tokens so far."""
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

    def _metrics(self) -> dict[str, Any]:
        """Return vLLM's figures per request, which it has for single sequences only.

        A step is a verification of at least one drafted token. mean_acceptance_length is vLLM's 1 + accepted / steps:
        the bonus token counts, also where the end of the answer cut it off.
        """
        if len(self.completions) != 1:
            return {"speculative_decoding": None}
        [completion] = self.completions.values()
        drafted, length = completion.stats.drafted, self.speculation.num_tokens or 0
        steps = [(depth, accepted) for depth, accepted in completion.stats.steps if depth]
        accepted_tokens = sum(accepted for _, accepted in steps)

        def histogram(accepted: list[int], most: int) -> list[int]:  # steps that accepted 0, 1, ... `most` tokens
            return [accepted.count(count) for count in range(most + 1)]

        by_depth = {
            str(depth): histogram([accepted for each, accepted in steps if each == depth], depth)
            for depth in sorted({depth for depth, _ in steps})
        }
        return {
            "speculative_decoding": {
                "mean_acceptance_length": 1 + accepted_tokens / len(steps) if steps else None,
                "draft_acceptance_rate": accepted_tokens / drafted if drafted else None,
                "acceptance_histogram": histogram([accepted for _, accepted in steps], length),
                "acceptance_histogram_by_draft_length": by_depth,
                "num_spec_steps": len(steps),
                "num_accepted_draft_tokens": accepted_tokens,
                "num_draft_tokens": drafted,
                "num_spec_tokens": length,
            }
        }

    def _echo(self, index: int) -> str:
        return self.echoed[index // self.body.choices] if self.echoed else ""

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """Return the logprobs of the tokens that are in the text, which special ones are not."""
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
        """Return alternatives by text; pieces of characters, which have no text, by id."""
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
