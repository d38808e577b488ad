"""Responses from an OpenAI-compatible server that serves the target: vLLM, SGLang, our own draft-serve, or another.

Where the server completes prompts of token ids and tells the ids it wrote (vLLM's `return_token_ids`), a row is the
target's own text token for token, as if this process had written it. Elsewhere the server gets messages and answers
with text, which is tokenised again: such rows are marked, and kept out of every τ. What no check can tell is whether a
server that gives only text serves the very target that was named, under its chat template and without parameters of its
own: that is for whoever starts it to see to.
"""

from __future__ import annotations

import logging
import os
import random
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from draft.data.dataset import Response, hashed
from draft.data.examples import Message, end_of_turn, tokenise
from draft.errors import UserError
from draft.target import Target

log = logging.getLogger(__name__)

_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
_PROBES = 2  # requests after which a server that fails is asked in another way
_SEEDS = 2**31
# OpenAI answers 404, too, where a model exists but is no model for this path
_REFUSALS = frozenset({400, 413, 422})  # of one row, for what is in it
_NO_MODEL = re.compile(r"model.*(does not exist|not[ _]found|unknown)|(no such|unknown) model", re.IGNORECASE)
# servers take defaults from the model's generation_config.json; rows must come from the target's own distribution
_UNTOUCHED = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
_IDS = {"return_token_ids": True}


@dataclass(frozen=True)
class EndpointSettings:
    """Where the server is, and how it is asked."""

    url: str
    model: str | None = None  # by the server's name; None: the one it serves
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 16
    retries: int = 8
    timeout: float = 600.0  # seconds, of one answer


@dataclass(frozen=True)
class Question:
    """One response that is wanted."""

    where: str  # for messages to the user
    key: str  # decides the seed
    prompt: list[int]  # token ids under the target's chat template
    messages: list[Message]  # the same as messages
    limit: int  # most tokens of the response
    temperature: float
    later: bool = False  # whether `messages` hold the target's own answers, which the user has not written


@dataclass(frozen=True)
class _Dialect:
    """A way of asking."""

    path: str
    more: dict[str, Any]
    limit: str = "max_tokens"

    @property
    def exact(self) -> bool:
        return self.path == "completions"

    def body(self, question: Question) -> dict[str, Any]:
        asked: dict[str, Any] = {"prompt": question.prompt} if self.exact else {"messages": question.messages}
        asked |= {self.limit: question.limit, "temperature": question.temperature, "top_p": 1.0}
        return asked | self.more


# the first that a server takes is used for all rows
_DIALECTS = (
    _Dialect("completions", _IDS | _UNTOUCHED),
    _Dialect("completions", _IDS),
    _Dialect("chat/completions", _IDS | _UNTOUCHED),
    _Dialect("chat/completions", {}),
    _Dialect("chat/completions", {}, "max_completion_tokens"),
)


class Endpoint:
    """A server that has been asked once, and how it likes to be asked."""

    def __init__(self, settings: EndpointSettings, target: Target, seed: int) -> None:
        """
        Raises:
            EndpointError: when the server cannot be reached, refuses the key or the model, or completes nothing.
        """
        self.settings, self.target, self.seed = settings, target, seed
        self._stopped = threading.Event()
        key = os.environ.get(settings.api_key_env, "").strip()
        if not key.isascii():
            raise EndpointError(f"${settings.api_key_env} holds letters that no key has; set it to the server's key.")
        self._client = httpx.Client(
            base_url=_base(settings.url),
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(settings.timeout, connect=min(30.0, settings.timeout)),
            limits=httpx.Limits(max_connections=settings.concurrency),
            follow_redirects=True,
        )
        self.model = settings.model or self._served_model()
        self._dialect = self._find_dialect()
        self._end = end_of_turn(target)
        log.info(
            "%s serves %r, and %s",
            self._client.base_url,
            self.model,
            "tells token ids" if self._dialect.exact else "answers with text, which is tokenised again",
        )

    def answer(self, questions: Sequence[Question]) -> Iterator[tuple[int, Response | None]]:
        """Ask all questions, many at once; yields (index, response) as they are answered.

        The response is None where the server refuses a later turn, as it may when the target wrote what JSON or a
        server's checks do not carry, or when the conversation outgrows the server's context.

        Raises:
            EndpointError: naming the row whose first turn is refused, or that got no answer after all retries.
        """
        pool = ThreadPoolExecutor(self.settings.concurrency, thread_name_prefix="endpoint")
        self._stopped.clear()
        try:
            asked = {pool.submit(self._answer, question): index for index, question in enumerate(questions)}
            failure: BaseException | None = None
            for future in as_completed(asked):
                if future.cancelled():
                    continue
                error = future.exception()
                if error is None:
                    yield asked[future], future.result()
                elif failure is None:  # what the server is answering already is worth having
                    failure = error
                    self._stopped.set()
                    for other in asked:
                        other.cancel()
            if failure is not None:
                raise failure
        finally:
            self._stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        self._stopped.set()
        self._client.close()

    # what it serves

    def _served_model(self) -> str:
        answer = self._request("GET", "models", None, "the list of its models", retry_unreachable=False)
        names = [entry.get("id") for entry in parsed(answer, self._told).get("data") or [] if isinstance(entry, dict)]
        if len(names) != 1:
            found = f"serves {len(names)} models ({', '.join(map(str, names[:5]))})" if names else "names no model"
            raise EndpointError(f"{self._told} {found}; choose one with --endpoint-model.")
        return str(names[0])

    def _find_dialect(self) -> _Dialect:
        prompt = self.target.encode_chat([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
        question = Question("a first request", "", prompt, [{"role": "user", "content": "Hi"}], 1, 0.0)
        # some servers fail at what they don't know, and all of them when they are overloaded
        failing = []
        for dialect in _DIALECTS:
            answer = self._post(dialect, question, final=False, tries=_PROBES)
            if answer.status_code >= 500:
                failing.append(dialect)
            elif self._takes(dialect, answer):
                again = (
                    other
                    for other in failing
                    if self._takes(other, self._post(other, question, final=False, tries=_PROBES))
                )
                return next(again, dialect)
        for dialect in failing:
            answer = self._post(dialect, question, final=False)
            if self._takes(dialect, answer):
                return dialect
        raise EndpointError(
            f"{self._told} completes neither token ids nor messages ({answer.status_code}: {reason(answer)}); give "
            "the address of an OpenAI-compatible server."
        )

    def _takes(self, dialect: _Dialect, answer: httpx.Response) -> bool:
        if answer.status_code != 200:
            return False
        choice = choice_in(parsed(answer, self._told), self._told)
        return not dialect.exact or isinstance(choice.get("token_ids"), list)

    # one answer

    def _answer(self, question: Question) -> Response | None:
        answer = self._post(self._dialect, question)
        if question.later and answer.status_code in _REFUSALS:
            told = f"{answer.status_code}: {reason(answer)}"
            log.warning(
                "%s: the server refuses a later turn (%s); the conversation ends before it", question.where, told
            )
            return None
        if answer.status_code != 200:
            raise EndpointError(
                f"{question.where}: {self._told} refuses it ({answer.status_code}: {reason(answer)}); leave that row "
                "out or mend it, and repeat the command in another --out."
            )
        body = parsed(answer, f"{question.where}: {self._told}")
        return self._response(body, choice_in(body, self._told), question)

    def _response(self, body: dict[str, Any], choice: dict[str, Any], question: Question) -> Response:
        """The row's tokens: the server's where it read the same prompt and tells them, else those of its text."""
        ids, ended = choice.get("token_ids"), choice.get("finish_reason") == "stop"
        assumed = question.prompt if self._dialect.exact else None
        read = choice.get("prompt_token_ids") or body.get("prompt_token_ids") or assumed
        if isinstance(ids, list) and ids and read == question.prompt:
            if not all(type(token) is int and 0 <= token < self.target.vocab_size for token in ids):
                raise EndpointError(
                    f"{question.where}: {self._told} answers with token ids beyond the {self.target.vocab_size} of "
                    f"target {self.target.title}; it serves another model."
                )
            whole = ids[-1] in self.target.eos_token_ids or not ended
            return Response(ids if whole else [*ids, self._end], retokenised=not whole)
        text = choice.get("text") if "text" in choice else (choice.get("message") or {}).get("content")
        ids = tokenise(self.target, text)[: question.limit] if isinstance(text, str) and text else []
        return Response([*ids, self._end] if ended else ids, retokenised=True)

    def _post(
        self, dialect: _Dialect, question: Question, *, final: bool = True, tries: int | None = None
    ) -> httpx.Response:
        """final: whether a 4xx is the row's fault; otherwise another dialect may be understood. tries: see below."""
        body = {"model": self.model, **dialect.body(question)}
        if question.temperature > 0 and dialect.more:
            body["seed"] = hashed(self.seed, question.key) % _SEEDS
        return self._request("POST", dialect.path, body, question.where, retry_unreachable=final, tries=tries)

    def _request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        what: str,
        *,
        retry_unreachable: bool,
        tries: int | None = None,
    ) -> httpx.Response:
        """Ask until there is an answer that repeating would not change, or the server has failed `tries` times."""
        told = ""
        for attempt in range(self.settings.retries + 1):
            wish = None
            try:
                answer = self._client.request(method, path, json=body)
            except (httpx.RequestError, RuntimeError) as error:  # RuntimeError: closed by another thread
                if self._stopped.is_set():
                    raise EndpointError("stopped") from error
                told = str(error) or type(error).__name__
                if not retry_unreachable and isinstance(error, httpx.ConnectError):
                    break
                if isinstance(error, (httpx.TooManyRedirects, httpx.DecodingError)):  # it would say the same again
                    break
            else:
                if answer.status_code not in _RETRIED:
                    return self._checked(answer)
                if answer.status_code >= 500 and tries and attempt + 1 >= min(tries, self.settings.retries + 1):
                    return answer
                told, wish = f"{answer.status_code}: {reason(answer)}", answer.headers.get("retry-after")
            if attempt < self.settings.retries and self._stopped.wait(delay(attempt, wish)):
                break
        raise EndpointError(
            f"{self._told} gives no answer to {what} ({told}); see to the server, and repeat the command to go on "
            "from here."
        )

    def _checked(self, answer: httpx.Response) -> httpx.Response:
        """Refuse what is wrong with every row: the key, the model, the address."""
        variable = self.settings.api_key_env
        if answer.status_code in (401, 403):
            given = f"the key in ${variable}" if os.environ.get(variable) else f"requests without a key (${variable})"
            raise EndpointError(
                f"{self._told} refuses {given} ({answer.status_code}: {reason(answer)}); set ${variable}, or name "
                "another variable with --api-key-env."
            )
        if answer.status_code == 404 and _NO_MODEL.search(reason(answer)):
            raise EndpointError(
                f"{self._told} has no model {self.model!r} ({reason(answer)}); choose one with --endpoint-model."
            )
        return answer

    @property
    def _told(self) -> str:
        return f"the server at {self.settings.url}"


def _base(url: str) -> str:
    """The address that paths are joined to: with /v1, whether or not the user gave it, or a path below it."""
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL:
        address = httpx.URL("")
    if address.scheme not in ("http", "https") or not address.host:
        raise EndpointError(f"--endpoint {url!r} is no address; give one such as http://localhost:8000/v1.")
    path = address.path.rstrip("/")
    for tail in ("/chat/completions", "/completions", "/models"):
        path = path.removesuffix(tail)
    return str(address.copy_with(path=(path or "/v1") + "/", query=None))


# What an OpenAI-compatible server answers, read with suspicion.


class EndpointError(UserError):
    """The server does not answer as it should: what it has answered so far stays."""


def parsed(answer: httpx.Response, told: str) -> dict[str, Any]:
    try:
        body = answer.json()
    except ValueError as error:
        raise EndpointError(f"{told} answers without JSON; is it an OpenAI-compatible one?") from error
    if not isinstance(body, dict):
        raise EndpointError(f"{told} answers with a {type(body).__name__}; is it an OpenAI-compatible server?")
    return body


def choice_in(body: dict[str, Any], told: str) -> dict[str, Any]:
    choices = body.get("choices")
    if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
        raise EndpointError(f"{told} answers without choices; is it an OpenAI-compatible server?")
    return choices[0]


def reason(answer: httpx.Response) -> str:
    """What a server says is wrong, in a line."""
    try:
        body = answer.json()
        error = body.get("error", body.get("message", body.get("detail", body)))
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        text = answer.text
    return " ".join(text.split())[:200] or answer.reason_phrase


# How long to wait before a server is asked again.


_FIRST_DELAY, _LONGEST_DELAY, _LONGEST_WISH = 0.5, 60.0, 600.0  # seconds; the last: of a server's Retry-After


def delay(attempt: int, wish: str | None) -> float:
    """Seconds to wait before the next attempt: the server's wish, or twice as long as before; with jitter."""
    backoff = min(_LONGEST_DELAY, _FIRST_DELAY * 2**attempt) * random.uniform(0.5, 1.0)
    return backoff if wish is None else min(_LONGEST_WISH, _seconds(wish)) + backoff / 4


def _seconds(wish: str) -> float:
    """Of a Retry-After header, which has seconds or a date."""
    try:
        return max(0.0, float(wish))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(wish).timestamp() - time.time())
    except ValueError:
        return 0.0
