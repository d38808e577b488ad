"""Requests and answers of the servers that may be upstream, as far as they differ.

All take a prompt of token ids at /v1/completions and return the ids of the answer (`return_token_ids`), also in a
stream. They ignore fields that they do not know, so that what is sent, and what is refused, is a table. Read in the
sources of vLLM 0.32 and SGLang 0.5.23.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from draft.errors import UserError
from serving.engine.request import Speculation, SpeculationStats, Verification
from serving.engine.sampling import SamplingParams

_TOKEN_ID = "token_id:"  # before an id in the place of a token's text


@dataclass(frozen=True)
class Dialect:
    """One kind of server."""

    name: str
    health: str  # the path that answers 200 while requests are taken
    keeps_stop: str  # the field by which the tokens of a stop string stay in the answer
    seeds: bool = True  # it takes a request's seed, whatever the server's options
    reproduces: bool = False  # and the same one gives the same text again
    alternatives: bool = True  # log-probabilities of other tokens come with their ids
    speculative: frozenset[str] = frozenset()  # fields of `speculative` that it takes

    def check(self, params: SamplingParams) -> None:
        """Raise UserError for what this server would drop."""
        if params.seed is not None and params.temperature > 0 and not self.seeds:
            raise UserError(f"`seed` has no certain effect on {self.name}, which answers here; leave it out.")
        if params.logprobs and not self.alternatives:
            raise UserError(
                f"`top_n_tokens`, `top_logprobs` and `logprobs` above 0 need other tokens' ids, and {self.name}, which "
                "answers here, gives none; leave them out."
            )

    def body(
        self,
        model: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        speculation: Speculation,
        longest_draft: int,
    ) -> dict[str, Any]:
        """Return the request, with every parameter: servers take defaults from the model's generation_config.json.

        longest_draft: what the server drafts at a time without being asked.
        """
        body: dict[str, Any] = {
            "model": model,
            "prompt": list(prompt_ids),
            "stream": True,
            "stream_options": {"include_usage": True},  # with which the figures of speculation come
            "return_token_ids": True,
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            "min_p": params.min_p,
            "repetition_penalty": params.repetition_penalty,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "min_tokens": params.min_new_tokens,
            "stop": list(params.stop),
            "stop_token_ids": list(params.stop_ids),
            "ignore_eos": params.ignore_eos,
            self.keeps_stop: True,
        }
        if params.seed is not None:
            body["seed"] = params.seed
        if params.logit_bias:
            body["logit_bias"] = {str(token_id): bias for token_id, bias in params.logit_bias}
        if params.logprobs is not None:
            body["logprobs"] = params.logprobs
            if self.alternatives:
                body["return_tokens_as_token_ids"] = True
        if self.speculative:
            length = None if speculation.num_tokens == longest_draft else speculation.num_tokens
            wishes = {"num_tokens": length, "rule": speculation.rule}
            body["speculative"] = {name: value for name, value in wishes.items() if value is not None}
        return body


# by `owned_by` in /v1/models
DIALECTS = {
    "vllm": Dialect("vLLM", "/health", "include_stop_str_in_output"),
    "sglang": Dialect("SGLang", "/health", "no_stop_trim", seeds=False, alternatives=False),
    "draftsmith": Dialect(
        "draft-serve",
        "/ready",
        "include_stop_str_in_output",
        reproduces=True,
        speculative=frozenset({"enabled", "num_tokens", "rule"}),
    ),
}


@dataclass
class Chunk:
    """A piece of an answer."""

    tokens: list[tuple[int, float | None, list[tuple[int, float]] | None]]  # id, its logprob, the most probable ones
    finish_reason: str | None = None
    stop_reason: str | int | None = None  # the stop string or id, where that ended it
    speculation: dict[str, Any] | None = None  # vLLM's figures of the request


class BadAnswer(Exception):
    """An answer that the server should not have given; the message is for the log."""


def read_chunk(data: dict[str, Any], logprobs: int | None) -> Chunk:
    """Return the piece in one event; logprobs: alternatives that were requested, None without log-probabilities.

    Raises:
        BadAnswer: the event is not of this form.
    """
    figures = (data.get("metrics") or {}).get("speculative_decoding")
    choices = data.get("choices")
    if not choices:
        return Chunk([], speculation=figures)
    choice = choices[0]
    ids = choice.get("token_ids")
    if ids is None and choice.get("text"):
        raise BadAnswer("a part of the answer has no token_ids")
    try:
        tokens = list(_tokens(ids or [], choice.get("logprobs") or {}, logprobs))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise BadAnswer("the log-probabilities do not match the token_ids") from error
    matched = choice.get("stop_reason", choice.get("matched_stop"))  # SGLang has the other name
    return Chunk(tokens, choice.get("finish_reason"), matched, figures)


def _tokens(ids: list[int], given: dict[str, Any], logprobs: int | None) -> Iterator[Any]:
    if logprobs is None or not ids:
        yield from ((token_id, None, None) for token_id in ids)
        return
    tables = given.get("top_logprobs") if logprobs else None
    for token_id, logprob, table in zip(ids, given["token_logprobs"], tables or [{}] * len(ids), strict=True):
        top = None
        if logprobs:
            pairs = [(int(key.removeprefix(_TOKEN_ID)), value) for key, value in table.items() if value is not None]
            # vLLM adds the emitted token where it is not among them
            top = sorted(pairs, key=lambda pair: -pair[1])[:logprobs]
        yield token_id, logprob, top


class ReportedStats(SpeculationStats):
    """Speculation of one request as a server reports it: without what drafted the tokens."""

    @property
    def by_source(self) -> dict[str, dict[str, int]]:
        return {}


def speculation_stats(figures: dict[str, Any] | None, emitted: int) -> SpeculationStats:
    """Return a request's speculation from vLLM's figures of it.

    emitted: tokens of the answer after the first one. Verifications without drafts are not in the figures: they are
    those tokens that the others do not account for. Without figures nothing is known.
    """
    if not figures:
        return ReportedStats(known=False)
    most = figures.get("num_spec_tokens") or 0
    by_depth = figures.get("acceptance_histogram_by_draft_length") or {most: figures.get("acceptance_histogram") or []}
    steps = [
        Verification(int(depth), accepted)
        for depth, counts in by_depth.items()
        for accepted, count in enumerate(counts)
        for _ in range(count)
    ]
    plain = max(0, emitted - sum(step.accepted + 1 for step in steps))
    drafted = figures.get("num_draft_tokens") or 0
    return ReportedStats(drafted, emitted, [*steps, *[Verification(0, 0)] * plain])


async def server_events(parts: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """Yield the objects of a stream of server-sent events up to `[DONE]`; each is on one line.

    httpx's own lines end wherever Unicode has line ends, which texts have, too.

    Raises:
        BadAnswer: a line is no JSON, or the stream ends without `[DONE]`.
    """
    rest = b""
    async for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue  # comments, and the empty lines between events
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            try:
                yield json.loads(data)
            except ValueError as error:
                raise BadAnswer("an event is not JSON") from error
    raise BadAnswer("the stream ended before the answer did")
