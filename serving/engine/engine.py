"""The engine: requests come in, wait for a slot, join the steps of the others, and leave when they are done."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Sequence as Ids
from numbers import Integral
from typing import Any

import torch

from draft.errors import UserError
from draft.heads import DraftHead
from draft.heads.checkpoint import attach_head
from draft.target import Target
from draft.target.support import check_architecture
from serving.engine.planner import OFF, Controller, Fixed, Plan
from serving.engine.queue import Line
from serving.engine.request import (
    MAX_SPECULATION_LENGTH,
    SEED_LIMIT,
    Completion,
    EngineStopped,
    Request,
    SamplingParams,
    Sequence,
    Speculation,
    check_speculation_length,
    special_ids,
)
from serving.engine.sampling import Processor
from serving.engine.setup import Models, build_models, warm_up
from serving.engine.step import Decoder, Row
from serving.engine.tree import BRANCHING
from serving.engine.verification import RULES, make_rule

log = logging.getLogger(__name__)

# after one of these the accelerator's context is gone for good; running out of memory is not among them
_FATAL: tuple[type[BaseException], ...] = tuple(filter(None, [getattr(torch, "AcceleratorError", None)]))


class Engine:
    """Decodes with a target, and a draft head when there is one; the answers are the target's own either way.

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
        rule: str = "shared-noise",
        mode: str = "auto",
        attention: str = "auto",
        max_batch: int = 16,
        max_length: int | None = None,
        max_waiting: int = 1024,
        max_waiting_tokens: int | None = None,
        prefill_chunk: int = 128,
        threads: int | None = None,
    ) -> None:
        """
        speculation: `auto` chooses at every step what should give the most tokens per second, plain decoding and trees
        included; `chain` and `tree` always draft, `off` never. speculation_length: the most tokens drafted in a row,
        or as many as the head knows positions of.
        tree_size: the most nodes of a tree. mode: see `build_models`. max_batch: requests decoded at once. max_length:
        the most tokens of prompt and answer together (default: what the target was made for). max_waiting,
        max_waiting_tokens: what may wait behind those that run. prefill_chunk: prompt tokens read in one step.
        threads: of the arithmetic on a CPU.

        Raises:
            UserError: when the head is not of the target's shape, or a value is out of range.
        """
        check_architecture(target.config, target.name)
        if head is not None:
            attach_head(head, {}, target)
        self.target, self.head = target, head
        self.speculation = check_choice("speculation", speculation, SPECULATIONS)
        self.speculation_length = check_speculation_length(speculation_length)
        if head is not None and head.longest is not None:
            self.speculation_length = min(self.speculation_length, head.longest)
        self.rule = check_choice("rule", rule, tuple(RULES))
        self.max_length = check_max_length(max_length, target)
        self.max_batch = check_whole("max_batch", max_batch)
        self.max_waiting = check_whole("max_waiting", max_waiting, least=0)
        self.max_waiting_tokens = max_waiting_tokens
        for name, value in (("max_waiting_tokens", max_waiting_tokens), ("threads", threads)):
            if value is not None:
                check_whole(name, value)
        check_whole("tree_size", tree_size)
        self._line = Line(max_waiting, max_waiting_tokens)
        models = build_models(
            target,
            head if speculation != "off" else None,
            mode=mode,
            attention=attention,
            slots=self.max_batch,
            # drafts beyond a sequence's last token need places too, and those that the head reads but that
            # are not in its tree
            capacity=self.max_length + max(tree_size, BRANCHING * self.speculation_length, MAX_SPECULATION_LENGTH) + 1,
            threads=threads,
        )
        self.models: Models = models
        self.controller = make_controller(speculation, self.speculation_length, tree_size)
        self._decoder = Decoder(
            models.runner,
            models.proposer,
            self.controller,
            prefill_chunk=check_whole("prefill_chunk", prefill_chunk),
        )
        self._special_ids = special_ids(target.tokenizer, target.eos_token_ids)
        self._rows: list[Row] = []  # touched by the thread that steps only
        self._thread: threading.Thread | None = None

    def warm_up(self) -> None:
        """Compile, and learn what a step costs: before the first request, not while one waits. See `warm_up`."""
        for tokens, seconds in warm_up(self.models).items():
            self.controller.costs.target.seed(tokens, seconds)

    # requests

    def submit(self, prompt_ids: Ids[int], params: SamplingParams, speculation: Speculation | None = None) -> Request:
        """Put a request at the end of the line; `async for event in engine.submit(...)` follows it.

        Raises:
            UserError: for an empty prompt, ids outside the vocabulary, an unknown rule, or a request that cannot fit.
            Overloaded: the line is full.
            EngineStopped: the engine has ended.
        """
        return self.submit_all([prompt_ids], [params], speculation)[0]

    def submit_all(
        self, prompts: Ids[Ids[int]], params: Ids[SamplingParams], speculation: Speculation | None = None
    ) -> list[Request]:
        """The same for requests that belong together: all are put into the line, or none."""
        wishes = speculation or Speculation()
        for prompt, own in zip(prompts, params, strict=True):
            self._check_request(prompt, own, wishes)
        requests = [Request(list(prompt), own, wishes) for prompt, own in zip(prompts, params, strict=True)]
        self._line.join(requests, self._free_slots)
        return requests

    def check_room(self, tokens: int = 0) -> None:
        """Raises Overloaded or EngineStopped when a request of so many tokens would be turned away now."""
        self._line.check_room(tokens, self._free_slots)

    @property
    def _free_slots(self) -> int:
        return max(0, self.max_batch - len(self._rows))

    def generate(
        self,
        prompts: Ids[Ids[int]],
        params: SamplingParams | Ids[SamplingParams],
        speculation: Speculation | None = None,
    ) -> list[Completion]:
        """Answer prompts (lists of token ids), as many at once as the engine takes; params: of all, or one each.

        Raises:
            UserError: as `submit`, before anything is generated.
            EngineStopped: the engine has ended.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        wishes = speculation or Speculation()
        for prompt, own in zip(prompts, each, strict=True):
            self._check_request(prompt, own, wishes)
        requests = [Request(list(prompt), own, wishes) for prompt, own in zip(prompts, each, strict=True)]
        self._line.join_all(requests)
        try:
            if self._thread is None:
                while any(not request.done for request in requests) and self.step():
                    pass
            return [request.result() for request in requests]
        finally:  # whoever interrupts this does not want the rest
            for request in requests:
                request.cancel()

    def _check_request(self, prompt_ids: Ids[int], params: SamplingParams, wishes: Speculation) -> None:
        check_prompt(prompt_ids, self.target.vocab_size, self.max_length, params.max_new_tokens)
        params.check_vocabulary(self.target.vocab_size)
        if wishes.rule is not None:
            check_choice("rule", wishes.rule, tuple(RULES))

    # the loop

    def step(self) -> bool:
        """Let requests in, advance all that run by one step, and let those go that are done. False: nothing to do."""
        self._admit()
        self._dismiss()  # those that were cancelled
        if not self._rows:
            return bool(len(self._line))
        try:
            self._decoder.step(self._rows)
        except _FATAL:
            raise
        except Exception as error:  # whose fault it was cannot be told: all that took part fail, the engine goes on
            log.exception("a step failed; the %d requests in it end with an error", len(self._rows))
            self._dismiss()  # those that were done before it failed
            for row in list(self._rows):
                row.request.context.run(log.error, "a step failed, and with it this request")
                self._release(row)
                row.request.fail(error)
        self._dismiss()
        return bool(self._rows or len(self._line))

    def _admit(self) -> None:
        self._line.drop_cancelled()
        while self.models.runner.cache.free_slots and (request := self._line.next()) is not None:
            request.stamp(started=time.monotonic())
            try:
                self._rows.append(self._row(request))
            except Exception as error:  # this request's misfortune, not the engine's
                request.context.run(log.exception, "a request could not be taken up")
                request.fail(error)
            except BaseException:  # the thread ends, and would not know of this one
                _turn_away([request])
                raise

    def _row(self, request: Request) -> Row:
        params, wishes = request.params, request.speculation
        seed = params.seed
        if seed is None and params.temperature > 0:
            seed = secrets.randbelow(SEED_LIMIT)
        asked = self.speculation_length if wishes.num_tokens is None else wishes.num_tokens
        proposer = self.models.proposer
        cap = min(asked, self.speculation_length) if proposer is not None and wishes.enabled else 0
        return Row(
            request=request,
            sequence=Sequence(
                request.prompt_ids, params, self.target.tokenizer, self.target.eos_token_ids, self._special_ids
            ),
            processor=Processor(params, request.prompt_ids, self.target.vocab_size, self.target.eos_token_ids),
            rule=make_rule(wishes.rule or self.rule, params, seed or 0),
            seed=seed,
            slot=self.models.runner.cache.acquire(),
            cap=cap,
            acceptance=self.controller.row(cap),
            drafting=proposer.join() if proposer is not None and cap else None,
        )

    def _dismiss(self) -> None:
        """Answer the requests that are done or were given up, and free their slots."""
        for row in self._rows:
            if row.request.cancelled and not row.finished:
                row.sequence.cancel()
        for row in [row for row in self._rows if row.finished]:
            completion, tokens = row.completion(), row.sequence.release()
            self._release(row)
            row.request.finish(completion, tokens)

    def _release(self, row: Row) -> None:
        """Before the answer, so that whoever has it finds the slot free; a row that fails here is told by `_run`."""
        self.models.runner.cache.release(row.slot)
        if row.drafting is not None and self.models.proposer is not None:
            self.models.proposer.leave(row.drafting)
        self._rows.remove(row)

    # the thread

    def start(self) -> None:
        """Give the engine a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests are served: the thread runs, or there is none and the caller steps."""
        return not self._line.closed and (self._thread is None or self._thread.is_alive())

    def close(self, timeout: float = 10.0) -> None:
        """End after the present step; whoever still waits gets EngineStopped."""
        left = self._line.close()
        if self._thread is not None:
            self._thread.join(timeout)
        else:
            left += [row.request for row in self._rows]
        _turn_away(left)

    def _run(self) -> None:
        try:
            while not self._line.closed:
                if not self.step():
                    self._line.wait()
        except BaseException:
            log.critical("the engine's thread died; restart the server", exc_info=True)
        finally:
            left = [*(row.request for row in self._rows), *self._line.close()]
            self._rows = []
            _turn_away(left)

    # figures

    @property
    def mode(self) -> str:
        """eager or compiled; on CUDA compiled from when `warm_up` has found that passes can be recorded."""
        ragged = self.target.device.type == "cuda" and not self.models.runner.fixes_shapes
        return "eager" if ragged else self.models.mode

    @property
    def running(self) -> int:
        return len(self._rows)

    @property
    def waiting(self) -> int:
        return len(self._line)

    @property
    def cache_usage(self) -> float:
        """Used places of the cache / all of them."""
        cache = self.models.runner.cache
        return cache.used_tokens / (len(cache.lengths) * cache.capacity)

    def stats(self) -> dict[str, Any]:
        """What the engine is doing and how its controller decides; JSON-able."""
        return {
            "running": self.running,
            "waiting": self.waiting,
            "cache_usage": self.cache_usage,
            "mode": self.mode,
            "seconds": vars(self._decoder.seconds).copy(),
            "speculation": self.controller.stats(),
        }


def _turn_away(requests: list[Request]) -> None:
    for request in requests:
        request.fail(EngineStopped("the engine has ended"))


# What an engine can be told, and what makes no sense.


SPECULATIONS = ("auto", "chain", "tree", "off")


def make_controller(speculation: str, length: int, tree_size: int) -> Controller:
    sizes = [size for size in sorted({8, 16, 32, tree_size}) if 0 < length < size <= tree_size]
    trees = list(dict.fromkeys(Plan.tree(length, size) for size in sizes))
    if speculation == "auto":
        return Controller([*(Plan.chain(k) for k in range(1, length + 1)), *trees])
    if speculation == "tree" and length and not trees:
        raise UserError(
            f"tree_size = {tree_size}: a tree has more nodes than its depth, {length}; choose a larger one."
        )
    return Fixed({"off": OFF, "chain": Plan.chain(length), "tree": trees[-1] if trees else OFF}[speculation])


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise UserError(f"{name} = {value!r}: it must be one of {', '.join(choices)}.")
    return value


def check_whole(name: str, value: int, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{name} = {value!r}: it must be a whole number of at least {least}.")
    return value


def check_max_length(length: int | None, target: Target) -> int:
    if length is None:
        return target.max_length
    if not isinstance(length, int) or not 2 <= length <= target.max_length:
        raise UserError(f"max_length = {length}: it must be from 2 to {target.max_length}; {target.limit_reason}.")
    return length


def check_prompt(prompt_ids: Ids[int], vocab_size: int, max_length: int, max_new_tokens: int) -> None:
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
            f"context of {max_length}; shorten the prompt or ask for at most {max(0, max_length - len(prompt_ids))} "
            "tokens."
        )
