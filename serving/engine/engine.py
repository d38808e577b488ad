"""The engine: requests come in, wait for a slot, join the steps of the others, and leave when they are done."""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar, Unpack

import torch

from draft.errors import UserError
from draft.heads import DraftHead, StepwiseHead
from draft.heads.checkpoint import attach_head, load_unchanged_head, weights_bytes
from draft.target import Target
from draft.target.support import check_architecture
from serving.engine.answer import GrowingAnswer, special_ids
from serving.engine.checks import check_choice, check_max_length, check_prompt, check_sizes
from serving.engine.drafting import HeadProposer, Proposer
from serving.engine.estimates import BRANCHING
from serving.engine.heads import ROUTES, Heads, LoadedHead
from serving.engine.kv_cache import BLOCK
from serving.engine.lookup import LOOKUP_LENGTH, LookupProposer
from serving.engine.memory import check_free
from serving.engine.model import head_shape
from serving.engine.planner import make_controller
from serving.engine.request import (
    MAX_SPECULATION_LENGTH,
    Completion,
    EngineStopped,
    Request,
    RequestQueue,
    Speculation,
    SpeculationStats,
    check_speculation_length,
)
from serving.engine.sampling import SEED_LIMIT, Processor, SamplingParams
from serving.engine.self_check import MAX_SECONDS, NEW_TOKENS, AcceptanceWatch, SelfCheck, check_prompts
from serving.engine.setup import ModelOptions, build_models, pass_seconds
from serving.engine.step import ActiveRequest, Decoder
from serving.engine.verification import RULES, make_rule

log = logging.getLogger(__name__)

SPECULATIONS = ("auto", "chain", "tree", "off")
T = TypeVar("T")
# after one of these the accelerator's context is gone for good; running out of memory is not among them
_FATAL: Any = getattr(torch, "AcceleratorError", ())  # torch has had it since 2.8


class Engine:
    """Decodes with a target, and draft heads when there are some; the answers are the target's in any case.

    `generate` answers a list of prompts from the thread that calls it. `start` gives the engine a thread of its own,
    and then `submit` may be called from any thread.
    """

    def __init__(
        self,
        target: Target,
        head: DraftHead | Mapping[str, DraftHead] | None = None,
        *,
        route: str = "default",
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
        head: that drafts, or several by their names, of which the first is the default; others come by `load_head`.
        route: `auto` gives a request that names no head the one with the best measured acceptance for its kind.
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
        named = {} if head is None else head if isinstance(head, Mapping) else {"head": head}
        for each in named.values():
            attach_head(each, {}, target)
        check_choice("route", route, ROUTES)
        check_choice("speculation", speculation, SPECULATIONS)
        check_choice("rule", rule, tuple(RULES))
        check_speculation_length(speculation_length)
        check_sizes(
            max_batch=max_batch, max_waiting=max_waiting, max_waiting_tokens=max_waiting_tokens, tree_size=tree_size,
            kv_cache_memory=kv_cache_memory, prefill_chunk=prefill_chunk, threads=models.get("threads"),
        )  # fmt: skip
        self.speculation, self.rule = speculation, rule
        self.speculation_length, self._tree_size = speculation_length, tree_size
        self.lookup = lookup and speculation == "auto" and speculation_length > 0
        self.max_length = check_max_length(max_length, target)
        self.max_batch, self.max_waiting, self.max_waiting_tokens = max_batch, max_waiting, max_waiting_tokens
        self._queue = RequestQueue(max_waiting, max_waiting_tokens)
        self.controller = make_controller(speculation, speculation_length, tree_size)
        # drafts beyond a sequence's last token need places too, and those that the head reads but does not draft
        self._overhang = max(tree_size, BRANCHING * self.speculation_length, MAX_SPECULATION_LENGTH) + 1
        self.models, proposers = build_models(
            target,
            [*named.values()] if speculation != "off" else [],
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
        self.heads = Heads(route)
        self.checks_heads = True  # that are loaded later, before a request may choose them
        self._no_watch = AcceptanceWatch()
        for place, (name, each) in enumerate(named.items()):
            self._enter(self._loaded(name, each, proposers[place] if proposers else None))
        self._decoder = Decoder(self.models.runner, self.heads, self.controller, prefill_chunk=prefill_chunk)
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
    def weights(self) -> str:
        """Format of the target's matrices: int8, int4, or its dtype's name."""
        return self.models.weights

    @property
    def mode(self) -> str:
        """Execution of the models: eager or compiled."""
        return self.models.mode

    def warm_up(self) -> None:
        """Measure the cost of a step: before the first request, not while one waits."""
        for tokens, seconds in pass_seconds(self.models.runner).items():
            self.controller.costs.calibrate(tokens, seconds)

    # heads

    @property
    def head(self) -> DraftHead | None:
        """The default head."""
        return self.heads.default.head if self.heads.default is not None else None

    @property
    def head_name(self) -> str | None:
        """The name of the default head."""
        return self.heads.default_name

    @property
    def proposer(self) -> Proposer | None:
        """That of the default head."""
        return self.heads.default.proposer if self.heads.default is not None else None

    @property
    def head_length(self) -> int:
        """The most tokens that the default head drafts in a row."""
        return self.heads.default.length if self.heads.default is not None else 0

    @property
    def lookup_length(self) -> int:
        """The most tokens drafted at a time where some are copied."""
        return LOOKUP_LENGTH if self.lookup else 0

    @property
    def longest_draft(self) -> int:
        """The most tokens drafted at a time, by any head or by copying."""
        return max(self.lookup_length, *(head.length for head in self.heads), 0)

    @property
    def tree_size(self) -> int | None:
        """The most nodes of a tree; None where chains are drafted."""
        return self._tree_size if self.speculation == "tree" and self.head_length else None

    def _loaded(self, name: str, head: DraftHead, proposer: Proposer | None) -> LoadedHead:
        if proposer is None:
            return LoadedHead(name, head, None, 0)
        length = self.speculation_length if head.longest is None else min(self.speculation_length, head.longest)
        return LoadedHead(name, proposer.head, proposer, length)

    def _enter(self, head: LoadedHead, *, default: bool = False) -> None:
        self.heads.add(head)
        if default:
            self.heads.make_default(head.name)
        self.models.runner.layers = self.heads.layers

    def load_head(self, name: str, folder: str | Path, *, default: bool = False) -> LoadedHead:
        """Load a head beside those that are there: in any thread but the engine's own, which goes on meanwhile.

        Requests may choose it once it has checked itself. default: then make it the default.

        Raises:
            HeadConflict: the name is taken. UserError: it is no head of this target, changed while it was read, fails
            its self-check, or does not fit into memory. EngineStopped: the engine has ended.
        """
        self.heads.check_name(name)
        if self.speculation == "off" or not self.speculation_length:
            raise UserError("this engine never drafts, with speculation off; start it with speculation = 'auto'.")
        self._check_free("the weights of the head", 2 * weights_bytes(folder))  # as they are in the file, and as used
        head = self.models.packed(load_unchanged_head(folder, self.target), in_place=True)
        if isinstance(head, StepwiseHead):
            size = self.models.cache_size
            self._check_free("the KV cache of the head", size.blocks * BLOCK * head_shape(head).nbytes)
        loaded = self._loaded(name, head, self.models.proposer(head))
        try:
            if self.checks_heads:
                self.between_steps(partial(self._present, loaded))
                check = self._checked(loaded)
                check.report(f"draft head {name!r}")
                if check.failed:
                    raise UserError(f"the head fails its self-check: {check.reason}")
            self.between_steps(partial(self._enter, loaded, default=default))
        except BaseException:
            self.between_steps(self._withdraw)
            raise
        return loaded

    def unload_head(self, name: str) -> None:
        """Remove a head, and free its memory; what it was drafting for is decoded on without it.

        Raises:
            UnknownHead, HeadConflict: see `Heads.remove`. EngineStopped: the engine has ended.
        """

        def remove() -> None:
            head = self.heads.remove(name)
            for active in self._active:
                if active.head is head:
                    active.lose_head()
            self.models.runner.layers = self.heads.layers

        self.between_steps(remove)

    def make_default_head(self, name: str) -> str:
        """Make a head the default, on trial beside the one before it, whose name is returned; raises UnknownHead."""
        return self.between_steps(partial(self.heads.make_default, name))

    def between_steps(self, work: Callable[[], T]) -> T:
        """Return the result of some work that is done while no step runs; EngineStopped once the engine has ended."""
        if self._thread is not None:
            return self._queue.post(work).result()
        with self._step_lock:
            return work()

    def _present(self, head: LoadedHead) -> None:
        self.heads.checked = head
        self.models.runner.layers = self.heads.layers

    def _withdraw(self) -> None:
        self.heads.checked = None
        self.models.runner.layers = self.heads.layers

    def _check_free(self, what: str, size: int) -> None:
        caches = [self.models.runner.cache]
        caches += [head.proposer.runner.cache for head in self.heads if isinstance(head.proposer, HeadProposer)]
        check_free(what, size, sum(cache.promised_bytes for cache in caches), self.target.device)

    def self_check(self) -> SelfCheck | None:
        """Check that the drafts of each head are accepted, by greedy answers to some built-in prompts.

        They go through the engine's own path: no figure of the engine but a head's `watch` knows of them. Returns that
        of the default head; None where nothing is ever drafted.
        """
        for head in self.heads:
            if head.length:
                check = self._checked(head)
                check.report(f"draft head {head.name!r}" if len(self.heads) > 1 else "the draft head")
        return self.watch.check

    @property
    def _check_tokens(self) -> int:
        return min(NEW_TOKENS, self.max_length // 2)

    @cached_property
    def _check_prompts(self) -> list[list[int]]:
        """The prompts of self-checks: read once, since a tokenizer is not for two threads at a time."""
        return check_prompts(self.target, self.max_length - self._check_tokens)

    def _checked(self, head: LoadedHead) -> SelfCheck:
        """Let a head check itself, beside whatever runs, and judge it from now on by what it has shown."""
        for ignore_eos in (False, True):  # an answer that ends at once says nothing
            params = SamplingParams(self._check_tokens, ignore_eos=ignore_eos)
            speculation = Speculation(num_tokens=head.length)
            requests = [Request(prompt, params, speculation, head) for prompt in self._check_prompts]
            self._queue.join(requests, None, first=True)
            self._finish(requests, MAX_SECONDS)
            check = SelfCheck.of([request.result().stats for request in requests])
            if check.enough:
                break
        head.watch = AcceptanceWatch(check)
        return check

    def _finish(self, requests: Sequence[Request], seconds: float) -> None:
        """Wait for requests, or step until they are done; they are cancelled so long after the first was taken up."""
        while any(not request.done for request in requests):
            if self._thread is None:
                self.step()
            else:
                wait([request.future for request in requests], timeout=0.1)
            started = min((each.times.started for each in requests if each.times.started), default=math.inf)
            if time.monotonic() > started + seconds:
                for request in requests:
                    request.cancel()

    # requests

    def submit(
        self, prompt_ids: Sequence[int], params: SamplingParams, speculation: Speculation | None = None
    ) -> Request:
        """Put a request at the end of the queue; `async for event in engine.submit(...)` follows it.

        Raises:
            UserError: for an empty prompt, ids outside the vocabulary, an unknown rule or head, or a request that
            cannot fit.
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
        if speculation.head is not None:
            _ = self.heads[speculation.head]
        return [Request(list(prompt), each, speculation) for prompt, each in zip(prompts, params, strict=True)]

    # the loop

    def step(self) -> bool:
        """Admit requests, advance all that run by one step, and dismiss those that are done. False: nothing to do."""
        with self._step_lock:
            self._queue.run_posted()
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
        longest = self.longest_draft if request.checks is None else request.checks.length
        requested = longest if speculation.num_tokens is None else speculation.num_tokens
        useful = max(0, params.max_new_tokens - 2)  # the first token and the last one are the target's own
        cap = min(requested, longest, useful) if speculation.enabled else 0
        head = request.checks or (self.heads.choose(speculation.head, request.prompt_ids) if cap else None)
        head_cap = min(cap, head.length) if head is not None else 0
        answer = GrowingAnswer(request.prompt_ids, params, target.tokenizer, target.eos_token_ids, self._special_ids)
        processor = Processor(params, request.prompt_ids, target.vocab_size, target.eos_token_ids)
        rule = make_rule(speculation.rule or self.rule, params, seed or 0, self.models.runner.compiled)
        lookup = LookupProposer(answer.end_ids) if self.lookup and cap and request.checks is None else None
        stats, places, drafting = SpeculationStats(), self._places(request), None
        if head is None or head.proposer is None or not head_cap:
            head = None
        else:
            drafting = head.proposer.join(places)
            stats.head, stats.head_fingerprint = head.name, head.head.fingerprint
            head.requests += request.checks is None
        estimate = self.controller.track(head.estimate if head is not None else None)
        slot = self.models.runner.cache.acquire(places)  # one is free: nothing fails after the head's was taken
        active = ActiveRequest(request, answer, processor, rule, seed, slot, cap, head_cap, estimate, drafting, lookup)
        active.head, active.stats = head, stats
        return active

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
        if active.head is not None and active.head.proposer is not None:
            active.head.proposer.leave(active.drafting)
        active.lose_head()
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
        """The watch over the default head's acceptance, with the self-check."""
        return self.heads.default.watch if self.heads.default is not None else self._no_watch

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
        size, default = self.models.cache_size, self.heads.default
        return {
            "running": self.running,
            "waiting": self.waiting,
            "cache_usage": self.cache_usage,
            "kv_cache": {"bytes": size.blocks * size.block_bytes, "tokens": size.tokens, "block_tokens": BLOCK},
            "mode": self.mode,
            "arithmetic": self.models.arithmetic,
            "weights": self.models.weights,
            "head_weights": self.models.head_weights if self.proposer is not None else None,
            "seconds": self._decoder.seconds.copy(),
            "speculation": self.controller.stats(default.estimate if default else None, self.head_length),
        }


def _turn_away(requests: list[Request]) -> None:
    for request in requests:
        request.fail(EngineStopped("the engine has ended"))
