"""OpenAI's API: /v1/completions, /v1/chat/completions and /v1/models."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from serving.api.errors import ApiError, body_of
from serving.api.openai_schemas import ChatRequest, CompletionRequest, CompletionResponse, OpenAiError, SamplingRequest
from serving.api.schemas import EVENT_STREAM
from serving.api.service import Service
from serving.api.streaming import Generation, event, finite, stream
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
    received, prompt = time.monotonic(), body.prompt
    several: list[Any] = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)
    service = _open(body, request, prompts=len(several))
    prompts: list[list[int]] = []
    for each in several:
        if isinstance(each, str):
            prompts.append((await service.encode(each, "prompt")).input_ids)
        else:
            service.check_ids(each, "prompt")
            prompts.append(each)
    limits = [
        service.new_tokens(body.max_tokens, len(ids), DEFAULT_MAX_TOKENS, "prompt", "max_tokens") for ids in prompts
    ]
    echoed = [""] * len(several)
    if body.echo:
        echoed = [each if isinstance(each, str) else service.engine.target.decode(each) for each in several]
    as_ids = bool(body.return_tokens_as_token_ids)
    answer = Answer(service, body, prompts, echoed, body.logprobs, chat=False, as_ids=as_ids)
    return await _respond(answer, request, limits, received)


@router.post("/chat/completions", response_model=CompletionResponse, responses=EVENT_STREAM)
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation, under the target's chat template."""
    received = time.monotonic()
    service = _open(body, request, prompts=1)
    messages = [
        {"role": message.role, "content": message.text} | ({"name": message.name} if message.name else {})
        for message in body.messages
    ]
    text = service.render(messages, "messages")
    prompt = (await service.encode(text, "messages", add_special_tokens=False)).input_ids
    requested = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    name = "max_completion_tokens" if body.max_tokens is None else "max_tokens"
    limit = service.new_tokens(requested, len(prompt), None, "messages", name)
    alternatives = (body.top_logprobs or 0) if body.logprobs else None
    return await _respond(Answer(service, body, [prompt], [""], alternatives, chat=True), request, [limit], received)


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
    choices = range(answer.body.choices)
    prompts = [prompt for prompt in answer.prompts for _ in choices]
    params = [_sampling_params(answer, choice, limit) for limit in limits for choice in choices]
    captured = answer.body.capture is not False
    generation = Generation(request, prompts, params, answer.speculation, received, captured=captured)
    request.scope["draftsmith.log"] = {"prompt_tokens": sum(map(len, answer.prompts))}
    if answer.body.stream:
        return await stream(answer, generation)
    return JSONResponse(answer.whole(await generation.completions()))


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


@dataclass
class Answer:
    """One request's answer, whole or in chunks; `chat` selects between the two endpoints' shapes."""

    service: Service
    body: SamplingRequest
    prompts: list[list[int]]
    echoed: list[str]  # the beginning of the text of each prompt's choices
    alternatives: int | None  # alternatives per token in the logprobs; None: no logprobs
    chat: bool
    as_ids: bool = False  # tokens in the logprobs are named by their ids
    generated: int = 0  # tokens so far
    opened: set[int] = field(default_factory=set)  # choices whose first chunk has been sent
    completions: dict[int, Completion] = field(default_factory=dict)  # by choice
    offsets: dict[int, int] = field(default_factory=dict)  # characters of each choice so far

    def __post_init__(self) -> None:
        self.speculation: Speculation = self.service.speculation(self.body.speculative)
        kind = ("chat.completion.chunk" if self.body.stream else "chat.completion") if self.chat else "text_completion"
        self._header = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(16)}",
            "created": int(time.time()),
            "model": self.service.model_name,
            "object": kind,
        }

    # not streamed

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        self.completions = dict(enumerate(completions))
        self.generated = sum(len(each.token_ids) for each in completions)
        choices = []
        for index, completion in self.completions.items():
            choice: dict[str, Any] = {"index": index, "logprobs": self._logprobs(index, completion.tokens)}
            if self.chat:
                choice["message"] = {"role": "assistant", "content": completion.text, "refusal": None}
            else:
                choice |= {"text": self._echo(index) + completion.text, **self._prompt_ids(index)}
            choices.append(choice | self._token_ids(completion.token_ids) | _end(completion))
        more = self._prompt_ids(0) if self.chat else {}
        return {**self._header, "choices": choices, "usage": self._usage(), "metrics": self._metrics(), **more}

    # streamed

    def burst(self, index: int, tokens: list[Token], completion: Completion | None) -> bytes:
        chunks = []
        if index not in self.opened:
            self.opened.add(index)
            if self.chat:
                opening = self._chunk(index, {"role": "assistant", "content": ""}, None)
                chunks.append(opening | self._prompt_ids(index))
            elif self._echo(index) or self.body.return_token_ids:
                chunks.append(self._chunk(index, self._echo(index), None, **self._prompt_ids(index)))
        text = "".join(token.text for token in tokens if not token.special)
        self.generated += len(tokens)
        if completion is not None:
            self.completions[index] = completion
        if text or completion or self.alternatives is not None or self.body.return_token_ids:
            delta: Any = ({"content": text} if text else {}) if self.chat else text
            ids = self._token_ids([token.id for token in tokens])
            chunks.append(self._chunk(index, delta, completion, logprobs=self._logprobs(index, tokens), **ids))
        if self.body.streaming.continuous_usage_stats:
            chunks = [chunk | {"usage": self._usage()} for chunk in chunks]
        return b"".join(map(event, chunks))

    def end(self, error: ApiError | None) -> bytes:
        if error:
            return event(body_of(error, openai=True)) + _DONE
        last = {**self._header, "choices": [], "usage": self._usage(), "metrics": self._metrics()}
        return (event(last) if self.body.streaming.include_usage else b"") + _DONE

    def _chunk(self, index: int, delta: Any, completion: Completion | None, **more: Any) -> dict[str, Any]:
        choice = {"index": index, "delta" if self.chat else "text": delta, "logprobs": None, **_end(completion), **more}
        return {**self._header, "choices": [choice], **({"usage": None} if self.body.streaming.include_usage else {})}

    # parts of both

    def _usage(self) -> dict[str, Any]:
        """Return the counts of tokens so far."""
        prompt = sum(map(len, self.prompts))
        stats = [each.stats for each in self.completions.values()]
        accepted, drafted = sum(each.accepted for each in stats), sum(each.drafted for each in stats)
        predicted = {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": drafted - accepted}
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.generated,
            "total_tokens": prompt + self.generated,
            "completion_tokens_details": predicted if all(each.known for each in stats) else None,
        }

    def _metrics(self) -> dict[str, Any]:
        """Return vLLM's figures of speculation, which it has for single sequences only.

        A step is a verification of at least one drafted token. mean_acceptance_length is vLLM's 1 + accepted / steps:
        the bonus token counts, also where the end of the answer cut it off.
        """
        if len(self.completions) != 1:
            return {"speculative_decoding": None}
        [stats] = [each.stats for each in self.completions.values()]
        if not stats.known:
            return {"speculative_decoding": None}
        steps = [(step.depth, step.accepted) for step in stats.steps if step.depth]
        accepted_tokens = sum(accepted for _, accepted in steps)
        most = self.speculation.num_tokens or 0  # drafted at a time

        def histogram(accepted: list[int], most: int) -> list[int]:  # steps that accepted 0, 1, ... `most` tokens
            return [accepted.count(count) for count in range(most + 1)]

        depths = sorted({depth for depth, _ in steps})
        figures = {
            "mean_acceptance_length": 1 + accepted_tokens / len(steps) if steps else None,
            "draft_acceptance_rate": accepted_tokens / stats.drafted if stats.drafted else None,
            "acceptance_histogram": histogram([accepted for _, accepted in steps], most),
            "acceptance_histogram_by_draft_length": {
                str(depth): histogram([accepted for each, accepted in steps if each == depth], depth)
                for depth in depths
            },
            "num_spec_steps": len(steps),
            "num_accepted_draft_tokens": accepted_tokens,
            "num_draft_tokens": stats.drafted,
            "num_spec_tokens": most,
            "head": stats.head,  # the name of the one that drafted; this and the next are not in vLLM's
            "head_fingerprint": stats.head_fingerprint,
        }
        return {"speculative_decoding": figures}

    def _echo(self, index: int) -> str:
        return self.echoed[index // self.body.choices]

    def _prompt_ids(self, index: int) -> dict[str, list[int]]:
        """Return what goes beside a completion's choice or, as there is one prompt only, beside a chat's choices."""
        return {"prompt_token_ids": self.prompts[index // self.body.choices]} if self.body.return_token_ids else {}

    def _token_ids(self, ids: list[int]) -> dict[str, list[int]]:
        return {"token_ids": ids} if self.body.return_token_ids else {}

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """Return the logprobs of the tokens that are in the text, which special ones are not; as ids, of all tokens."""
        if self.alternatives is None:
            return None
        shown = [token for token in tokens if self.as_ids or not token.special]
        if self.chat:
            return {"content": [self._content(token) for token in shown], "refusal": None}
        offsets, start = [], self.offsets.get(index, len(self._echo(index)))
        for token in shown:
            offsets.append(start)
            start += 0 if token.special else len(token.text)
        self.offsets[index] = start
        return {
            "tokens": [f"token_id:{token.id}" if self.as_ids else token.text for token in shown],
            "token_logprobs": [finite(token.logprob) for token in shown],
            "top_logprobs": [self._table(token) for token in shown] if self.alternatives else None,
            "text_offset": offsets,
        }

    def _content(self, token: Token) -> dict[str, Any]:
        def entry(text: str, logprob: float | None) -> dict[str, Any]:
            broken = not text or _REPLACEMENT in text
            return {"token": text, "logprob": finite(logprob), "bytes": None if broken else list(text.encode())}

        top = [entry(self._name(token, token_id), logprob) for token_id, logprob in token.top or ()]
        return entry(token.text, token.logprob) | {"top_logprobs": top}

    def _table(self, token: Token) -> dict[str, float | None]:
        """Return alternatives by text, the token itself among them; pieces of characters, which have no text, by id."""
        top: list[tuple[int, float | None]] = list(token.top or ())
        if all(token_id != token.id for token_id, _ in top):
            top.append((token.id, token.logprob))
        table: dict[str, float | None] = {}
        for token_id, logprob in top:
            text = self._name(token, token_id)
            taken = text in table or (token_id != token.id and text == token.text)
            unnamed = self.as_ids or not text or _REPLACEMENT in text or taken
            table[f"token_id:{token_id}" if unnamed else text] = finite(logprob)
        return table

    def _name(self, token: Token, token_id: int) -> str:
        """Return the text of an alternative: of the token itself as it is in the answer, of others as by themselves."""
        return token.text if token_id == token.id else self.service.token_text(token_id)[0]


def _end(completion: Completion | None) -> dict[str, Any]:
    if completion is None:
        return {"finish_reason": None}
    return {
        "finish_reason": _FINISH_REASONS[completion.finish_reason],
        "stop_reason": completion.stop_reason,
        "seed": completion.seed,
    }
