"""TGI's API: POST /generate, /generate_stream and /."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from serving.api.errors import ApiError, body_of, echo
from serving.api.schemas import ERRORS, EVENT_STREAM, GenerateParameters, GenerateRequest, GenerateResponse
from serving.api.service import Service
from serving.api.streaming import EventStream, Generation, event, finite, stream
from serving.engine import Completion, SamplingParams, Speculation, SpeculationStats, Token
from serving.engine.sampling import DEFAULT_MAX_NEW_TOKENS

router = APIRouter(tags=["TGI"], responses=ERRORS)


@router.post("/generate", response_model=GenerateResponse, responses=EVENT_STREAM)
async def generate(body: GenerateRequest, request: Request) -> Response:
    """Generate text; with `stream` as server-sent events, one per token."""
    answer = await _begin(body, request)
    return await answer.streamed() if body.stream else await answer.whole()


@router.post("/generate_stream", status_code=200, response_class=EventStream, responses=EVENT_STREAM)
async def generate_stream(body: GenerateRequest, request: Request) -> Response:
    """Generate text as server-sent events: exactly one per token, the last one with generated_text and details."""
    return await (await _begin(body, request)).streamed()


@router.post("/", response_model=list[GenerateResponse], responses=EVENT_STREAM)
async def generate_listed(body: GenerateRequest, request: Request) -> Response:
    """Generate text as /generate does, for clients that know a model by its address only: as a list of one."""
    answer = await _begin(body, request)
    return await answer.streamed() if body.stream else await answer.whole(listed=True)


async def _begin(body: GenerateRequest, request: Request) -> Answer:
    """Submit a request to the engine."""
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
    encoded = await service.encode(text, "inputs", end_only=bool(truncate), add_special_tokens=not parameters.chat)
    prompt_ids = encoded.input_ids[-truncate:]
    needs_logprobs = bool(parameters.details or body.stream or request.url.path == "/generate_stream")
    temperature = 1.0 if parameters.temperature is None else parameters.temperature
    limit, fields = parameters.max_new_tokens, ("inputs", "max_new_tokens")
    params = SamplingParams.model_construct(  # of values that the schema has validated
        max_new_tokens=service.new_tokens(limit, len(prompt_ids), DEFAULT_MAX_NEW_TOKENS, *fields),
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
    captured = parameters.capture is not False
    generation = Generation(request, [prompt_ids], [params], speculation, received, captured=captured)
    request.scope["draftsmith.log"] = {"prompt_tokens": len(prompt_ids)}
    return Answer(generation, body.inputs, parameters, prompt_ids, speculation, received, validated)


@dataclass
class Answer:
    """The answer to one request, whole or as events."""

    generation: Generation
    inputs: str
    parameters: GenerateParameters
    prompt_ids: list[int]
    speculation: Speculation
    received: float  # seconds of time.monotonic()
    validated: float
    sent: int = 0  # events

    def __post_init__(self) -> None:
        self.service = self.generation.service
        self._compute_type = {"x-compute-type": self.service.engine.device}

    async def whole(self, *, listed: bool = False) -> Response:
        [completion] = await self.generation.completions()
        answer: dict[str, Any] = {"generated_text": self._text(completion)}
        if self.parameters.details:
            tokens = [self._token(token) for token in completion.tokens]
            answer["details"] = {**self._details(completion), "prefill": [], "tokens": tokens}
            if self.parameters.top_n_tokens:
                answer["details"]["top_tokens"] = [self._top_tokens(token) for token in completion.tokens]
        return JSONResponse([answer] if listed else answer, headers=self._compute_type | self._times(completion))

    def _times(self, completion: Completion) -> dict[str, str]:
        """Return TGI's headers: milliseconds, tokens and characters."""
        now, times, generated = time.monotonic(), self.generation.requests[0].times, len(completion.token_ids)
        inference = times.finished - times.started
        seconds = {
            "total-time": now - self.received,
            "validation-time": self.validated - self.received,
            "queue-time": times.started - times.submitted,
            "inference-time": inference,
            "time-per-token": inference / max(1, generated),
        }
        return {
            "x-compute-time": f"{now - self.received:.3f}",
            "x-compute-characters": str(len(self.inputs)),
            **{f"x-{name}": str(round(1000 * value)) for name, value in seconds.items()},
            "x-prompt-tokens": str(len(self.prompt_ids)),
            "x-generated-tokens": str(generated),
        }

    async def streamed(self) -> Response:
        return await stream(self, self.generation, self._compute_type)

    def burst(self, _: int, tokens: list[Token], completion: Completion | None) -> bytes:
        events = []
        for token in tokens:
            self.sent += 1
            data: dict[str, Any] = {"index": self.sent, "token": self._token(token)}
            if self.parameters.top_n_tokens:
                data["top_tokens"] = self._top_tokens(token)
            last = completion if token is tokens[-1] else None
            details = last and {**self._details(last), "input_length": len(self.prompt_ids)}
            data |= {"generated_text": last and self._text(last), "details": details}
            events.append(event(data, b"data:"))
        return b"".join(events)

    def end(self, error: ApiError | None) -> bytes:
        return event(body_of(error, openai=False), b"data:") if error else b""

    # parts of both

    def _text(self, completion: Completion) -> str:
        return (self.inputs if self.parameters.return_full_text else "") + completion.text

    def _details(self, completion: Completion) -> dict[str, Any]:
        return {
            "finish_reason": completion.finish_reason,
            "generated_tokens": len(completion.token_ids),
            "seed": completion.seed,
            "speculative": self._speculative(completion.stats),
        }

    def _speculative(self, stats: SpeculationStats) -> dict[str, Any] | None:
        """Return the figures of a request's speculation; None where the server upstream gave none."""
        if not stats.known:
            return None
        length, engine = self.speculation.num_tokens or 0, self.service.engine
        pairs = zip(stats.accepted_per_position, stats.drafted_per_position, strict=True)
        return {
            "enabled": length > 0,
            "rule": self.speculation.rule or engine.rule,
            "head": stats.head,
            "speculation_length": min(length, engine.head_length),
            "lookup_length": min(length, engine.lookup_length),
            "acceptance_length": finite(stats.acceptance_length),
            "verifications": stats.verifications,
            "drafted": stats.drafted,
            "accepted": stats.accepted,
            "emitted": stats.emitted,
            "sources": stats.by_source,
            "acceptance_per_position": [accepted / drafted if drafted else None for accepted, drafted in pairs],
        }

    def _token(self, token: Token) -> dict[str, Any]:
        entry = {"id": token.id, "text": token.text, "logprob": finite(token.logprob), "special": token.special}
        if self.parameters.wants_origin:
            position = token.accepted_position
            drafter = None if position is None and token.rejected is None else "lookup" if token.copied else "head"
            entry["origin"] = {
                "source": "target" if position is None else "draft",
                "drafter": drafter,
                "position": None if position is None else position + 1,
                "rejected": None if token.rejected is None else self._alternative(token.rejected, None),
                "drafted": token.drafted,
            }
        return entry

    def _top_tokens(self, token: Token) -> list[dict[str, Any]]:
        return [self._alternative(token_id, logprob) for token_id, logprob in token.top or ()]

    def _alternative(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        text, special = self.service.token_text(token_id)
        return {"id": token_id, "text": text, "logprob": finite(logprob), "special": special}
