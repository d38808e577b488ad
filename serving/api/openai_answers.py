"""OpenAI's answers and chunks, from the engine's tokens and completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from serving.api.figures import finite, vllm_metrics
from serving.api.service import Service
from serving.engine import Completion, Speculation, Token

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
