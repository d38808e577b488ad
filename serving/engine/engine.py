"""The engine: requests come in, wait for a slot, join the steps of the others, and leave when they are done."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Sequence
from numbers import Integral
from typing import Any, Unpack

import torch

from draft.errors import UserError
from draft.heads import DraftHead
from draft.heads.checkpoint import attach_head
from draft.target import Target
from draft.target.support import check_architecture
from serving.engine.answer import GrowingAnswer, special_ids
from serving.engine.estimates import BRANCHING, DraftPlan
from serving.engine.kv_cache import BLOCK
from serving.engine.lookup import LOOKUP_LENGTH, LookupProposer
from serving.engine.planner import Fixed, make_controller
from serving.engine.request import (
    MAX_SPECULATION_LENGTH,
    Completion,
    EngineStopped,
    Request,
    RequestQueue,
    Speculation,
    check_speculation_length,
)
from serving.engine.sampling import SEED_LIMIT, Processor, SamplingParams
from serving.engine.self_check import MAX_SECONDS, NEW_TOKENS, AcceptanceWatch, SelfCheck, check_prompts
from serving.engine.setup import ModelOptions, build_models, pass_seconds
from serving.engine.step import ActiveRequest, Decoder
from serving.engine.verification import RULES, make_rule

log = logging.getLogger(__name__)

SPECULATIONS = ("auto", "chain", "tree", "off")
# after one of these the accelerator's context is gone for good; running out of memory is not among them
_FATAL: Any = getattr(torch, "AcceleratorError", ())  # torch has had it since 2.8


class Engine:
    """Decodes with a target, and a draft head when there is one; the answers are the target's in either case.

    `generate` answers a list of prompts from the thread that calls it. `start` gives the engine a thread of its own,
    and then `submit` may be called from any thread.
    """

    def __init__(
        self,
        target: Target,
        head: DraftHead | None = None,
        *,
        speculation: str = "auto",
        speculation_length: int = 5,
        tree_size: int = 16,
        lookup: bool = True,
        rule: str = "shared-noise",
        max_batch: int = 16,
        max_length: int | None = None,
        kv_cache_memory: int | None = None,
        max_waiting: int = 1024,
        max_waiting_tokens: int | None = None,
        prefill_chunk: int = 128,
        **models: Unpack[ModelOptions],
    ) -> None:
        """
        speculation: `auto` chooses at every step, for each request, what should give the most tokens per second:
        nothing, a chain of the head, or tokens copied from the prompt and the answer so far; with `chain` and `tree`
        the head always drafts, with `off` never. speculation_length: the most tokens that the head drafts in a row, or
        as many as it knows positions of; 0 is off. tree_size: the most nodes of a tree. lookup: let `auto` copy, with
        or without a head.
        max_batch: requests decoded at once. max_length: the most tokens of prompt and answer together (default: what
        the target was made for, as far as the cache holds it). kv_cache_memory: bytes of the cache (default: most of
        what is free; never more than `max_batch` such requests need). max_waiting, max_waiting_tokens: what may wait
        behind those that run. prefill_chunk: prompt tokens read in one step.
        models: see `ModelOptions`.

        Raises:
            UserError: when the head is not of the target's shape, or a value is out of range.
        """
        check_architecture(target.config, target.name)
        if head is not None:
            attach_head(head, {}, target)
        self.head = head
        check_choice("speculation", speculation, SPECULATIONS)
        check_choice("rule", rule, tuple(RULES))
        check_speculation_length(speculation_length)
        check_sizes(
            max_batch=max_batch, max_waiting=max_waiting, max_waiting_tokens=max_waiting_tokens, tree_size=tree_size,
            kv_cache_memory=kv_cache_memory, prefill_chunk=prefill_chunk, threads=models.get("threads"),
        )  # fmt: skip
        self.speculation, self.rule = speculation, rule
        longest = speculation_length if head is None or head.longest is None else head.longest
        self.speculation_length = min(speculation_length, longest)
        self.lookup = lookup and speculation == "auto" and speculation_length > 0
        # the most tokens drafted at a time: by the head in a row; copied; and in all
        self.head_length = self.speculation_length if head is not None and speculation != "off" else 0
        self.lookup_length = LOOKUP_LENGTH if self.lookup else 0
        self.longest_draft = max(self.head_length, self.lookup_length)
        self.tree_size = tree_size if speculation == "tree" and self.head_length else None
        self.max_length = check_max_length(max_length, target)
        self.max_batch, self.max_waiting, self.max_waiting_tokens = max_batch, max_waiting, max_waiting_tokens
        self._queue = RequestQueue(max_waiting, max_waiting_tokens)
        self.controller = make_controller(speculation, self.head_length, tree_size)
        # drafts beyond a sequence's last token need places too, and those that the head reads but does not draft
        self._overhang = max(tree_size, BRANCHING * self.speculation_length, MAX_SPECULATION_LENGTH) + 1
        self.models = build_models(
            target,
            head if speculation != "off" else None,
            slots=self.max_batch,
            capacity=self.max_length + self._overhang,
            least=(max_length or 2) + self._overhang,
            memory=kv_cache_memory,
            **models,
        )
        fitting, size = self.models.cache_size.capacity - self._overhang, self.models.cache_size
        self.limit_note = f", which is what the KV cache holds ({size})" if fitting < self.max_length else ""
        self.max_length = min(self.max_length, fitting)
        self.target = self.models.runner.target
        self._decoder = Decoder(self.models.runner, self.models.proposer, self.controller, prefill_chunk=prefill_chunk)
        self._special_ids = special_ids(target.tokenizer, target.eos_token_ids)
        self._active: list[ActiveRequest] = []  # changed in `step` only
        self._step_lock = threading.RLock()  # one thread steps at a time
        self._thread: threading.Thread | None = None

    # what a backend of another kind has otherwise, see `serving.backend.Backend`
    ready = True
    speculative_fields = None

    def draft_counts(self) -> None:
        return None

    @property
    def device(self) -> str:
        return self.target.device.type

    @property
    def dtype(self) -> str:
        return str(self.target.dtype).removeprefix("torch.")

    @property
    def mode(self) -> str:
        """Execution of the models: eager or compiled."""
        return self.models.mode

    def warm_up(self) -> None:
        """Measure the cost of a step: before the first request, not while one waits."""
        for tokens, seconds in pass_seconds(self.models.runner).items():
            self.controller.costs.calibrate(tokens, seconds)

    def self_check(self) -> SelfCheck | None:
        """Check that the head's drafts are accepted: before `start`, by greedy answers to some built-in prompts.

        They go through the engine's own path, with a planner and a decoder of their own: no figure of the engine but
        `watch` knows of them. Returns None where nothing is ever drafted.
        """
        if self.models.proposer is None or not self.speculation_length:
            return None
        count = min(NEW_TOKENS, self.max_length // 2)
        prompts = check_prompts(self.target, self.max_length - count)
        with self._step_lock:
            ordinary = self.controller, self._decoder
            self.controller = Fixed(DraftPlan.chain(self.speculation_length))
            self._decoder = Decoder(
                self.models.runner, self.models.proposer, self.controller, prefill_chunk=ordinary[1].prefill_chunk
            )
            try:
                for ignore_eos in (False, True):  # an answer that ends at once says nothing
                    params = [SamplingParams(count, ignore_eos=ignore_eos)] * len(prompts)
                    requests = self._requests(prompts, params, Speculation())
                    self._queue.join(requests, None)
                    end = time.monotonic() + MAX_SECONDS
                    while any(not request.done for request in requests) and self.step():
                        for request in requests if time.monotonic() > end else ():
                            request.cancel()
                    check = SelfCheck.of([request.result().stats for request in requests])
                    if check.enough:
                        break
            finally:
                self.controller, self._decoder = ordinary
        check.report()
        self._decoder.watch = AcceptanceWatch(check)
        return check

    # requests

    def submit(
        self, prompt_ids: Sequence[int], params: SamplingParams, speculation: Speculation | None = None
    ) -> Request:
        """Put a request at the end of the queue; `async for event in engine.submit(...)` follows it.

        Raises:
            UserError: for an empty prompt, ids outside the vocabulary, an unknown rule, or a request that cannot fit.
            Overloaded: the queue is full.
            EngineStopped: the engine has ended.
        """
        return self.submit_all([prompt_ids], [params], speculation)[0]

    def submit_all(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        speculation: Speculation | None = None,
    ) -> list[Request]:
        """Submit requests that belong together: all are put into the queue, or none."""
        requests = self._requests(prompts, params, speculation or Speculation())
        self._queue.join(requests, self._free_slots)
        return requests

    def check_room(self, tokens: int = 0) -> None:
        """Raise Overloaded or EngineStopped when a request of so many tokens would be turned away now."""
        self._queue.check_room(tokens, self._free_slots)

    @property
    def _free_slots(self) -> int:
        return max(0, self.max_batch - len(self._active))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        speculation: Speculation | None = None,
    ) -> list[Completion]:
        """Answer prompts (lists of token ids), as many at once as the engine takes; params: of all, or one each.

        Raises:
            UserError: as `submit`, before anything is generated.
            EngineStopped: the engine has ended.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        requests = self._requests(prompts, each, speculation or Speculation())
        self._queue.join(requests, None)
        try:
            while self._thread is None and any(not request.done for request in requests) and self.step():
                pass
            return [request.result() for request in requests]
        finally:  # whoever interrupts this does not want the rest
            for request in requests:
                request.cancel()

    def _requests(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], speculation: Speculation
    ) -> list[Request]:
        for prompt, each in zip(prompts, params, strict=True):
            check_prompt(prompt, self.target.vocab_size, self.max_length, each.max_new_tokens, self.limit_note)
            each.check_vocabulary(self.target.vocab_size)
        if speculation.rule is not None:
            check_choice("rule", speculation.rule, tuple(RULES))
        return [Request(list(prompt), each, speculation) for prompt, each in zip(prompts, params, strict=True)]

    # the loop

    def step(self) -> bool:
        """Admit requests, advance all that run by one step, and dismiss those that are done. False: nothing to do."""
        with self._step_lock:
            self._admit()
            self._dismiss()  # those that were cancelled
            if self._active:
                self._advance()
                self._dismiss()
            elif len(self._queue) and self.cache_usage:
                raise RuntimeError("blocks were lost: no request runs, and not all are free")  # the loop would spin
            return bool(self._active or len(self._queue))

    def _admit(self) -> None:
        self._queue.drop_cancelled()
        while (request := self._queue.next(self._has_room)) is not None:
            request.times.started = time.monotonic()
            try:
                self._active.append(self._activate(request))
            except Exception as error:  # this request's misfortune, not the engine's
                request.context.run(log.exception, "a request could not be taken up")
                request.fail(error)
            except BaseException:  # the thread ends, and would not know of this one
                _turn_away([request])
                raise

    def _has_room(self, request: Request) -> bool:
        return self.models.runner.cache.has_room(self._places(request))

    def _places(self, request: Request) -> int:
        """Return the places that a request may need, which are reserved for it from its start to its end."""
        return len(request.prompt_ids) + request.params.max_new_tokens + self._overhang

    def default_new_tokens(self, prompt_tokens: int) -> int:
        """Return the most tokens of an answer without a limit of its own: `max_batch` such requests run at once.

        An answer to a prompt that fills its part of the cache may have half as much again.
        """
        part = self.models.cache_size.blocks // self.max_batch * BLOCK - self._overhang
        return min(self.max_length - prompt_tokens, max(1, part - prompt_tokens, part // 2))

    def _activate(self, request: Request) -> ActiveRequest:
        """Give a request a slot, of the target and where it drafts of the head."""
        target, params, speculation = self.target, request.params, request.speculation
        seed = params.seed
        if seed is None and params.temperature > 0:
            seed = secrets.randbelow(SEED_LIMIT)
        requested = self.longest_draft if speculation.num_tokens is None else speculation.num_tokens
        proposer, cache = self.models.proposer, self.models.runner.cache
        useful = max(0, params.max_new_tokens - 2)  # the first token and the last one are the target's own
        cap = min(requested, self.longest_draft, useful) if speculation.enabled else 0
        head_cap = min(cap, self.speculation_length) if proposer is not None else 0
        answer = GrowingAnswer(request.prompt_ids, params, target.tokenizer, target.eos_token_ids, self._special_ids)
        processor = Processor(params, request.prompt_ids, target.vocab_size, target.eos_token_ids)
        rule = make_rule(speculation.rule or self.rule, params, seed or 0, self.models.runner.compiled)
        lookup = LookupProposer(answer.end_ids) if self.lookup and cap else None
        estimate = self.controller.track()
        places = self._places(request)
        drafting = proposer.join(places) if proposer is not None and head_cap else None
        slot = cache.acquire(places)  # one is free: nothing fails after the head's slot has been taken
        drafts = (cap, head_cap, estimate, drafting, lookup)
        return ActiveRequest(request, answer, processor, rule, seed, slot, *drafts)

    def _advance(self) -> None:
        try:
            self._decoder.step(self._active)
        except _FATAL:
            raise
        except Exception as error:  # whose fault it was is not known: all that took part fail, the engine goes on
            log.exception("a step failed; the %d requests in it end with an error", len(self._active))
            self._dismiss()  # those that were done before it failed
            for active in list(self._active):
                active.request.context.run(log.error, "a step failed, and with it this request")
                self._release(active)
                active.request.fail(error)

    def _dismiss(self) -> None:
        """Answer the requests that are done or cancelled, and free their slots."""
        for active in self._active:
            if active.request.cancelled and not active.finished:
                active.answer.cancel()
        for active in [active for active in self._active if active.finished]:
            completion, tokens = active.completion(), active.answer.release()
            self._release(active)
            active.request.finish(completion, tokens)

    def _release(self, active: ActiveRequest) -> None:
        """Free the slots: before the answer, so that whoever has it finds them free. `_run` handles a failure."""
        self.models.runner.cache.release(active.slot)
        if active.drafting is not None and self.models.proposer is not None:
            self.models.proposer.leave(active.drafting)
        self._active.remove(active)

    # the thread

    def start(self) -> None:
        """Give the engine a thread of its own, once.

        Raises:
            UserError: it has one already.
        """
        with self._step_lock:  # a `generate` in another thread steps on beside it, in turn
            if self._thread is not None:
                raise UserError("the engine has been started already; call start once.")
            self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
            self._thread.start()

    @property
    def alive(self) -> bool:
        """True while requests are served: the thread runs, or there is none and the caller steps."""
        return not self._queue.closed and (self._thread is None or self._thread.is_alive())

    def close(self, timeout: float = 10.0) -> None:
        """End after the present step; whoever still waits gets EngineStopped."""
        left = self._queue.close()
        if self._thread is not None:
            self._thread.join(timeout)
        else:
            left += [active.request for active in self._active]
        _turn_away(left)

    def _run(self) -> None:
        try:
            while not self._queue.closed:
                if not self.step():
                    self._queue.wait()
        except BaseException:
            log.critical("the engine's thread died; restart the server", exc_info=True)
        finally:
            left = [*(active.request for active in self._active), *self._queue.close()]
            self._active = []
            _turn_away(left)

    # figures

    @property
    def watch(self) -> AcceptanceWatch:
        """The watch over the acceptance, with the self-check."""
        return self._decoder.watch

    @property
    def running(self) -> int:
        return len(self._active)

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def cache_tokens(self) -> int:
        return self.models.cache_size.tokens

    @property
    def cache_usage(self) -> float:
        """Reserved blocks of the cache / all of them."""
        cache = self.models.runner.cache
        return 1 - cache.free_blocks / cache.blocks

    def stats(self) -> dict[str, Any]:
        """Return the engine's and its controller's figures; JSON-able. Any thread may call it at any time."""
        size = self.models.cache_size
        return {
            "running": self.running,
            "waiting": self.waiting,
            "cache_usage": self.cache_usage,
            "kv_cache": {"bytes": size.blocks * size.block_bytes, "tokens": size.tokens, "block_tokens": BLOCK},
            "mode": self.mode,
            "arithmetic": self.models.arithmetic,
            "weights": self.models.weights,
            "head_weights": self.models.head_weights,
            "seconds": self._decoder.seconds.copy(),
            "speculation": self.controller.stats(),
        }


def _turn_away(requests: list[Request]) -> None:
    for request in requests:
        request.fail(EngineStopped("the engine has ended"))


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name} = {value!r}: it must be one of {', '.join(choices)}.")


def check_sizes(**sizes: int | None) -> None:
    """Refuse, by its name, what is no whole number of at least 1; `max_waiting` may be 0, and others None."""
    for name, value in sizes.items():
        least = 0 if name == "max_waiting" else 1
        if value is None and name in ("max_waiting_tokens", "kv_cache_memory", "threads"):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{name} = {value!r}: it must be a whole number of at least {least}.")


def check_max_length(length: int | None, target: Target) -> int:
    if length is None:
        return target.max_length
    if not isinstance(length, int) or not 2 <= length <= target.max_length:
        raise UserError(f"max_length = {length}: it must be from 2 to {target.max_length}; {target.limit_reason}.")
    return length


def check_prompt(
    prompt_ids: Sequence[int], vocab_size: int, max_length: int, max_new_tokens: int, limit_note: str = ""
) -> None:
    if not len(prompt_ids):
        raise UserError("the prompt is empty; give at least one token.")
    if not all(isinstance(token, Integral) for token in prompt_ids):
        raise UserError(
            f"the prompt is {prompt_ids!r:.80}, not a list of token ids; encode it with target.encode_chat."
        )
    wrong = [token for token in prompt_ids if not 0 <= token < vocab_size]
    if wrong:
        raise UserError(f"the prompt has token id {wrong[0]}; the target's go from 0 to {vocab_size - 1}.")
    if len(prompt_ids) + max_new_tokens > max_length:
        raise UserError(
            f"the prompt has {len(prompt_ids)} tokens and max_new_tokens is {max_new_tokens}: together they exceed the "
            f"context of {max_length}{limit_note}; shorten the prompt or ask for at most "
            f"{max(0, max_length - len(prompt_ids))} tokens."
        )
