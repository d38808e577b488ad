"""The side of the API that answers requests: the built-in engine, or a server upstream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from draft.target import TextTarget
from serving.engine.request import Request, Speculation
from serving.engine.sampling import SamplingParams
from serving.engine.self_check import AcceptanceWatch


class Unavailable(Exception):
    """Nothing can be answered now; another try may be answered later. The message is for clients."""

    def __init__(self, message: str, retry_seconds: float = 1.0) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds


@dataclass(frozen=True)
class DraftCounts:
    """Speculation of all requests that a server has answered; None or empty where it does not say."""

    drafts: float | None = None  # verifications that had drafted tokens
    drafted: float | None = None  # tokens
    accepted: float | None = None
    accepted_per_position: tuple[float, ...] = ()
    stated_length: float | None = None  # acceptance length as the server computes it

    @property
    def acceptance_length(self) -> float:
        """1 + accepted / drafts, or as the server states it; NaN where nothing was drafted."""
        if self.drafts and self.accepted is not None:
            return 1 + self.accepted / self.drafts
        return float("nan") if self.stated_length is None else self.stated_length


class Backend(Protocol):
    """The interface that the routes use; `serving.engine.Engine` and `serving.upstream.Upstream` have it.

    `start` and `close` begin and end it, `submit_all` may be called from any thread between them, and the requests that
    it returns are followed and cancelled alike.
    """

    @property
    def target(self) -> TextTarget:
        """Tokenizer, template and vocabulary, by which prompts become token ids and tokens text."""

    @property
    def head(self) -> Any:
        """The draft head's class attributes and `config`, or None."""

    @property
    def head_name(self) -> str | None: ...

    @property
    def device(self) -> str: ...

    @property
    def dtype(self) -> str | None:
        """Format of the weights; None where it is not known."""

    @property
    def weights(self) -> str:
        """Format of the matrices that compute; empty where it is not known."""

    # speculation

    @property
    def speculation(self) -> str:
        """The mode of drafting: auto, chain, tree, off, or upstream."""

    @property
    def rule(self) -> str | None:
        """The rule that accepts drafts when sampling; None where it is not known."""

    @property
    def head_length(self) -> int:
        """The most tokens that the head drafts in a row."""

    @property
    def lookup_length(self) -> int:
        """The most tokens drafted at a time where some are copied."""

    @property
    def longest_draft(self) -> int:
        """The most tokens drafted at a time."""

    @property
    def tree_size(self) -> int | None: ...

    @property
    def speculative_fields(self) -> frozenset[str] | None:
        """Fields of a request's `speculative` that have an effect; others are refused. None: all have."""

    @property
    def watch(self) -> AcceptanceWatch: ...

    def draft_counts(self) -> DraftCounts | None:
        """The counts that it keeps itself, of all its requests; None: they are counted as requests end."""

    # limits

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer."""

    @property
    def limit_note(self) -> str:
        """The reason for `max_length` in a sentence's words; empty where it is the target's own."""

    @property
    def max_batch(self) -> int:
        """Requests answered at once."""

    @property
    def max_waiting(self) -> int:
        """Requests that may wait behind those."""

    @property
    def max_waiting_tokens(self) -> int | None: ...

    def default_new_tokens(self, prompt_tokens: int) -> int:
        """Return the most tokens of an answer without a limit of its own."""

    # the life of it

    @property
    def alive(self) -> bool:
        """False once a restart would help."""

    @property
    def ready(self) -> bool:
        """False while requests are turned away, which may pass."""

    def start(self) -> None: ...

    def close(self) -> None: ...

    # requests

    def check_room(self, tokens: int = 0) -> None:
        """Raise Overloaded, EngineStopped or Unavailable when a request of so many tokens would be turned away now."""

    def submit_all(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        speculation: Speculation | None = None,
    ) -> list[Request]:
        """Take requests that belong together, all or none.

        Raises:
            UserError: for one that cannot be answered. The others as `check_room`.
        """

    # figures

    @property
    def running(self) -> int:
        """Requests whose tokens come."""

    @property
    def waiting(self) -> int:
        """Requests that wait for that."""

    @property
    def cache_tokens(self) -> float:
        """Tokens that the KV cache holds; NaN where it is not known."""

    @property
    def cache_usage(self) -> float:
        """Used share of the KV cache; NaN where it is not known."""

    def stats(self) -> dict[str, Any]:
        """Return figures for /info; JSON-able but for NaN."""
