"""Responses from an OpenAI-compatible server of the target: draft-serve, vLLM, SGLang, llama.cpp or another.

Where the server completes prompts of token ids and returns the ids that it wrote (vLLM's `return_token_ids`), a row is
the target's own text token for token. Elsewhere the server receives messages and returns text, which is tokenised
again: such rows are marked, and kept out of every τ. No check can tell that a server which returns only text serves
the target that was named, under its chat template and without parameters of its own: whoever starts it is responsible.
"""

from __future__ import annotations

import json
import logging
import os
import re
from asyncio import Semaphore
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from anyio.from_thread import start_blocking_portal
from openai import APIConnectionError, APIStatusError, AsyncOpenAI, DefaultAsyncHttpxClient, Omit, Timeout

from draft.data.conversations import tool_calls
from draft.data.dataset import Response, hashed
from draft.data.examples import Message, check_ids, continuation, end_of_turn, prompt_ids, render
from draft.data.records import BadRow
from draft.data.settings import EndpointSettings, LocalServer
from draft.errors import UserError
from draft.launcher import draft_serve
from draft.target import Target
from draft.target.bundled import BUNDLED_TARGET
from draft.target.target import resolve_device, resolve_dtype

log = logging.getLogger(__name__)

_BATCH_SIZE = {"cpu": 16, "cuda": 64}  # rows decoded at once by a server that is started here
_BUNDLED_HEAD = "smollm2-eagle3"
_SHORTEST_CONTEXT = 256  # of a server that is started here: warming up needs some room
_FIRST_RETRIES = 1  # after which a server that fails gets another kind of request
_SEEDS = 2**31
_REFUSALS = frozenset({400, 413, 422})  # of one row, for what is in it
# OpenAI answers 404, too, where a model exists but is no model for this path
_NO_MODEL = re.compile(r"model.*(does not exist|not[ _]found|unknown)|(no such|unknown) model", re.IGNORECASE)
# servers take defaults from the model's generation_config.json; rows must come from the target's own distribution
_NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
_THINK, _THOUGHT = "<think>", "</think>"
_IDS = {"return_token_ids": True}


class EndpointError(UserError):
    """A server that does not answer as it should; what it has answered so far stays."""


@dataclass(frozen=True)
class Question:
    """One response that is requested."""

    where: str  # for messages to the user
    key: str  # decides the seed
    prompt: list[int]  # token ids under the target's chat template
    messages: list[Message]  # the same as messages; none: a text outside a chat is continued
    limit: int  # most tokens of the response
    temperature: float
    top_p: float = 1.0
    tools: Sequence[dict[str, Any]] = ()  # that the messages may use
    later: bool = False  # whether `messages` hold the target's own answers, which the user has not written


@dataclass(frozen=True)
class _Dialect:
    """Path and fields of a request."""

    path: str
    more: dict[str, Any]
    limit: str = "max_tokens"

    @property
    def exact(self) -> bool:
        return self.path == "completions" and bool(self.more)

    def body(self, question: Question) -> dict[str, Any]:
        content: dict[str, Any] = {"prompt": question.prompt}
        if self.path != "completions":
            content = {"messages": [_as_sent(message) for message in question.messages]}
            content |= {"tools": list(question.tools)} if question.tools else {}
        numbers = {self.limit: question.limit, "temperature": question.temperature, "top_p": question.top_p}
        return content | numbers | self.more


def _as_sent(message: Message) -> Message:
    """The message as OpenAI's API has it: templates read the arguments of calls as objects, it has them as JSON."""
    if not message.get("tool_calls"):
        return message
    calls = [(call, call["function"]) for call in message["tool_calls"]]
    written = [(value if isinstance(value := each["arguments"], str) else json.dumps(value)) for _, each in calls]
    sent = [
        {**call, "function": {**each, "arguments": text}} for (call, each), text in zip(calls, written, strict=True)
    ]
    return {**message, "tool_calls": sent}


# the first that a server accepts is used for all rows
_DIALECTS = (
    _Dialect("completions", _IDS | _NEUTRAL),
    _Dialect("completions", _IDS),
    _Dialect("chat/completions", _IDS | _NEUTRAL),
    _Dialect("chat/completions", {}),
    _Dialect("chat/completions", {}, "max_completion_tokens"),
)
_PLAIN_TEXT = _Dialect("completions", {})  # of texts outside a chat, where the server returns no token ids


class Endpoint:
    """A server, and the dialect that it accepts. A context manager: leaving it ends all requests."""

    def __init__(self, settings: EndpointSettings, target: Target, seed: int) -> None:
        """
        Raises:
            EndpointError: when the server cannot be reached, refuses the key or the model, or completes nothing.
        """
        self.settings, self.target, self.seed = settings, target, seed
        self._title = f"the server at {settings.endpoint}"
        key = os.environ.get(settings.api_key_env, "").strip()
        if not key.isascii():
            raise EndpointError(f"${settings.api_key_env} holds letters that no key has; set it to the server's key.")
        address = _base(settings.endpoint)
        self._client = AsyncOpenAI(
            api_key=key or "none",
            base_url=address,
            max_retries=settings.retries,
            timeout=Timeout(settings.timeout, connect=min(30.0, settings.timeout)),
            # a proxy of the network does not reach servers of this machine
            http_client=DefaultAsyncHttpxClient(trust_env=urlsplit(address).hostname not in ("127.0.0.1", "localhost")),
        )
        self._options: Any = {} if key else {"headers": {"Authorization": Omit()}}
        self._room = Semaphore(settings.concurrency)
        self._end = end_of_turn(target)
        self._closing = ExitStack()
        self._portal = self._closing.enter_context(start_blocking_portal())  # requests run in its event loop
        try:
            self.model = settings.endpoint_model or self._portal.call(self._served_model)
            self._dialect = self._portal.call(self._find_dialect)
        except BaseException:
            self.close()
            raise
        form = "returns token ids" if self._dialect.exact else "answers with text, which is tokenised again"
        log.info("%s serves %r, and %s", address, self.model, form)

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if not self._client.is_closed():
            self._portal.call(self._client.close)
        self._closing.close()

    def answer(self, questions: Sequence[Question]) -> Iterator[tuple[int, Response | None]]:
        """Send all questions, `concurrency` at once; yields (index, response) as they are answered.

        The response is None where the server refuses a later turn, as it may when the target wrote what JSON or a
        server's checks do not carry, or when the conversation outgrows the server's context.

        Raises:
            EndpointError: naming the row whose first turn is refused, or that has no answer after all retries.
        """
        failure: BaseException | None = None

        async def ask(question: Question) -> Response | None:
            async with self._room:
                return None if failure else await self._answer(question)

        futures = {self._portal.start_task_soon(ask, question): index for index, question in enumerate(questions)}
        try:
            for future in as_completed(futures):
                failure = failure or future.exception()
                # what the server is answering already is worth having
                if future.exception() is None and (failure is None or future.result() is not None):
                    yield futures[future], future.result()
        finally:
            for future in futures:
                future.cancel()
        if failure is not None:
            raise failure

    async def _served_model(self) -> str:
        body = await self._request("models", None, "the list of its models")
        names = [entry.get("id") for entry in body.get("data") or [] if isinstance(entry, dict)]
        if len(names) != 1:
            found = f"serves {len(names)} models ({', '.join(map(str, names[:5]))})" if names else "names no model"
            raise EndpointError(f"{self._title} {found}; choose one with --endpoint-model.")
        return str(names[0])

    async def _find_dialect(self) -> _Dialect:
        messages = [{"role": "user", "content": "Hi"}]
        question = Question("a first request", "", prompt_ids(self.target, messages), messages, 1, 0.0)
        refusal = ""

        async def accepted(dialect: _Dialect, retries: int | None) -> bool | None:
            """None: the server fails, which it may do at what it does not know, or because it is overloaded."""
            nonlocal refusal
            try:
                choice = await self._ask(dialect, question, retries)
            except APIStatusError as error:
                refusal = f" ({error.status_code}: {_reason(error)})"
                return None if _busy(error) else False
            return not dialect.exact or isinstance(choice.get("token_ids"), list)

        failing: list[_Dialect] = []
        for dialect in _DIALECTS:
            accepts = await accepted(dialect, _FIRST_RETRIES)
            if accepts:
                for other in failing:
                    if await accepted(other, _FIRST_RETRIES):
                        return other
                return dialect
            if accepts is None:
                failing.append(dialect)
        for dialect in failing:
            if await accepted(dialect, None):
                return dialect
        raise EndpointError(
            f"{self._title} completes neither token ids nor messages{refusal}; give the address of an "
            "OpenAI-compatible server."
        )

    async def _answer(self, question: Question) -> Response | None:
        dialect = self._dialect if question.messages or self._dialect.exact else _PLAIN_TEXT
        try:
            choice = await self._ask(dialect, question, None)
        except APIStatusError as error:
            refusal = f"({error.status_code}: {_reason(error)})"
            if question.later and error.status_code in _REFUSALS:
                log.warning(
                    "%s: the server refuses a later turn %s; the conversation ends before it", question.where, refusal
                )
                return None
            if not question.messages:
                raise EndpointError(
                    f"{self._title} continues no text outside a chat {refusal}, so that the target cannot write "
                    "prompts; give some with --prompts FILE."
                ) from error
            raise EndpointError(
                f"{question.where}: {self._title} refuses it {refusal}; leave that row out or mend it, and repeat the "
                "command in another --out."
            ) from error
        return self._response(choice, question, dialect)

    def _response(self, choice: dict[str, Any], question: Question, dialect: _Dialect) -> Response:
        """The row's tokens: the server's where it read the same prompt and returns them, else those of its text."""
        ids, ended = choice.get("token_ids"), choice.get("finish_reason") == "stop"
        read = choice["prompt_token_ids"] or (question.prompt if dialect.exact else None)
        if isinstance(ids, list) and ids and read == question.prompt:
            if not all(type(token) is int and 0 <= token < self.target.vocab_size for token in ids):
                raise EndpointError(
                    f"{question.where}: {self._title} answers with token ids beyond the {self.target.vocab_size} of "
                    f"target {self.target.title}; it serves another model."
                )
            whole = ids[-1] in self.target.eos_token_ids or not ended
            return Response(ids if whole else [*ids, self._end], retokenised=not whole)
        message = choice["message"] if isinstance(choice.get("message"), dict) else {}
        text = choice.get("text") if "text" in choice else message.get("content")
        thought, calls = message.get("reasoning_content") or message.get("reasoning"), message.get("tool_calls")
        if not (isinstance(text, str) and text.strip()) and not calls:
            return Response([], retokenised=True)  # no answer, or one that the limit cut off while it was thought about
        ended = ended or choice.get("finish_reason") == "tool_calls"
        if thought or calls:
            try:
                text = self._as_the_template_writes(question, {"content": text or "", "tool_calls": calls}, thought)
            except BadRow as error:  # because of what the target wrote; the row itself is sound
                log.warning("%s: %s; the answer is left out", question.where, error.what)
                return Response([], retokenised=True)
        before = self.target.tokenizer.decode(question.prompt)
        if question.messages:
            before = render(self.target, question.messages, add_generation_prompt=True, tools=question.tools)
        ids = continuation(self.target, before, str(text))
        if thought or calls:
            ids = ids[: next((place for place, id in enumerate(ids) if id in self.target.eos_token_ids), len(ids))]
        ids = ids[: question.limit]
        try:
            check_ids(self.target, ids)
        except BadRow as error:
            raise EndpointError(f"{question.where}: {self._title} answers with a text that has a {error}") from error
        return Response([*ids, self._end] if ended else ids, retokenised=True)

    def _as_the_template_writes(self, question: Question, message: dict[str, Any], thought: Any) -> str:
        """The answer as one text, where the server took it apart into thoughts, calls and text."""
        answer: Message = {"role": "assistant", "content": message["content"]}
        if calls := message["tool_calls"]:
            answer["tool_calls"] = tool_calls(calls, "the answer")
        if isinstance(thought, str) and thought.strip():
            answer["reasoning_content"] = thought
        before = render(self.target, question.messages, add_generation_prompt=True, tools=question.tools)
        messages = [*question.messages, answer]
        after = render(self.target, messages, add_generation_prompt=False, tools=question.tools)
        thinks = "reasoning_content" in answer
        if after.startswith(before) and (not thinks or answer["reasoning_content"].strip() in after[len(before) :]):
            return after[len(before) :]
        if thinks and not calls and before.rstrip().endswith(_THINK):  # the prompt has opened the thoughts
            return f"{thought.rstrip()}\n{_THOUGHT}\n\n{answer['content'].lstrip()}"
        raise EndpointError(
            f"{question.where}: {self._title} takes thoughts or calls out of the answer, and the chat template does "
            "not put them back; start the server without a parser of them, or give a template that renders them "
            "with --chat-template."
        )

    async def _ask(self, dialect: _Dialect, question: Question, retries: int | None) -> dict[str, Any]:
        """The server's first choice, with the ids of the prompt that it read, or None for them."""
        body = {"model": self.model, **dialect.body(question)}
        if question.temperature > 0 and (dialect.more or not question.messages):
            body["seed"] = hashed(self.seed, question.key) % _SEEDS
        answer = await self._request(dialect.path, body, question.where, retries)
        choices = answer.get("choices")
        if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
            raise EndpointError(f"{self._title} answers without choices; is it an OpenAI-compatible server?")
        read = choices[0].get("prompt_token_ids") or answer.get("prompt_token_ids")  # its place depends on the server
        return {**choices[0], "prompt_token_ids": read}

    async def _request(
        self, path: str, body: dict[str, Any] | None, what: str, retries: int | None = None
    ) -> dict[str, Any]:
        """The JSON object that the server returns; retries: None for all that the settings allow.

        Raises:
            APIStatusError: for a refusal, and where the server fails after fewer retries than the settings allow.
            EndpointError: for what is wrong with every request, and where all retries are used up.
        """
        options = self._options if retries is None else self._options | {"max_retries": retries}
        try:
            if body is None:
                text = await self._client.get(path, cast_to=str, options=options)
            else:
                text = await self._client.post(path, cast_to=str, body=body, options=options)
        except APIConnectionError as error:
            raise self._no_answer(what, str(error.__cause__ or error) or type(error.__cause__).__name__) from error
        except APIStatusError as error:
            if _busy(error) and retries is None:
                raise self._no_answer(what, f"{error.status_code}: {_reason(error)}") from error
            if error.status_code in (401, 403):
                variable = self.settings.api_key_env
                key = f"the key in ${variable}" if os.environ.get(variable) else f"requests without a key (${variable})"
                raise EndpointError(
                    f"{self._title} refuses {key} ({error.status_code}: {_reason(error)}); set ${variable}, or name "
                    "another variable with --api-key-env."
                ) from error
            if error.status_code == 404 and _NO_MODEL.search(_reason(error)):
                raise EndpointError(
                    f"{self._title} has no model {self.model!r} ({_reason(error)}); choose one with --endpoint-model."
                ) from error
            raise
        with suppress(ValueError):
            parsed = json.loads(text)
            if isinstance(parsed, dict):
                return parsed
        raise EndpointError(
            f"{self._title} answers without a JSON object; give the address of an OpenAI-compatible server."
        )

    def _no_answer(self, what: str, message: str) -> EndpointError:
        return EndpointError(
            f"{self._title} gives no answer to {what} ({message}); see to the server, and repeat the command to go on "
            "from here."
        )


def _base(url: str) -> str:
    """The address that paths are joined to: with /v1, whether or not the user gave it, or a path below it."""
    try:
        address = urlsplit(url)
        valid = address.scheme in ("http", "https") and address.hostname and address.port != 0
    except ValueError:  # a port that is no number
        valid = False
    if not valid:
        raise EndpointError(f"--endpoint {url!r} is no address; give one such as http://localhost:8000/v1.")
    path = address.path.rstrip("/")
    for tail in ("/chat/completions", "/completions", "/models"):
        path = path.removesuffix(tail)
    return address._replace(path=(path or "/v1") + "/", query="", fragment="").geturl()


def _busy(error: APIStatusError) -> bool:
    """The statuses that the SDK retries."""
    return error.status_code in (408, 409, 429) or error.status_code >= 500


def _reason(refusal: APIStatusError) -> str:
    """The message of a server's refusal, in a line."""
    body = refusal.body  # without OpenAI's {"error": ...}
    if isinstance(body, dict):
        body = body.get("message", body.get("detail", body))
    return " ".join(str(body or "").split())[:200] or refusal.response.reason_phrase


# The draft-serve that is started where no endpoint is given.


@contextmanager
def started(server: LocalServer, target: Target, max_length: int) -> Iterator[EndpointSettings]:
    """Serve the target, with its adapter, until the block ends; max_length: tokens of the longest conversation.

    Raises:
        ServerEnded: with the server's message when it cannot load the target or the head.
    """
    device = server.device or str(target.device)
    batch = server.batch_size or _BATCH_SIZE.get(resolve_device(device).type, 16)
    dtype = server.dtype or str(target.dtype).removeprefix("torch.")
    if server.weights in ("int8", "int4") and target.name.endswith(".gguf") and server.dtype in (None, "auto"):
        dtype = "auto"  # in which the server finds the integers of the file again
    options = {
        "--target": target.name,
        "--dtype": dtype,
        "--weights": server.weights,
        "--max-batch": batch,
        "--max-length": min(target.max_length, max(max_length, _SHORTEST_CONTEXT)),
        "--max-waiting": 4 * batch,
        "--request-timeout": 0,
        "--drain-seconds": 0,
    }
    if target.adapter:
        options["--target-adapter"] = target.adapter.folder
    bundled = _BUNDLED_HEAD if target.name == BUNDLED_TARGET and not target.adapter else None
    if head := server.head or bundled:
        options["--head"] = head
    log.info("starting draft-serve for target %s %s", target.title, f"with head {head!r}" if head else "")
    words = [str(word) for pair in options.items() for word in pair]
    with draft_serve(words, environment=_visible_devices(device)) as running:
        # a second batch waits, so that the server never does; a day: the slowest target answers in less
        yield EndpointSettings(
            endpoint=running.url, api_key_env="DRAFTSMITH_API_KEY", concurrency=2 * batch, retries=1, timeout=86400
        )


def check_local(dtype: str, device: str) -> None:
    """Refuse a dtype or device that a draft-serve on this machine does not run with."""
    place = resolve_device(device)
    resolve_dtype(dtype, place)
    if place.type not in _BATCH_SIZE:
        raise UserError(f"--device {device} is none that draft-serve runs on; choose cpu or cuda, or give --endpoint.")


def _visible_devices(device: str) -> dict[str, str]:
    """Environment in which a server that takes the first GPU, or else the CPU, runs on `device`."""
    kind, _, index = device.partition(":")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if kind == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[int(index)] if visible else index} if index else {}
