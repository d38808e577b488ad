"""One step of the loop: draft, read and verify in one pass of the target, emit. Tensors in, tokens out; no queues."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from draft.target import wait_for
from serving.engine.answer import GrowingAnswer
from serving.engine.drafting import Job
from serving.engine.estimates import DraftPlan, RequestEstimate
from serving.engine.heads import Heads, LoadedHead
from serving.engine.kv_cache import RaggedBatch, Segment
from serving.engine.lookup import LookupProposer
from serving.engine.model import TargetRunner
from serving.engine.planner import Controller
from serving.engine.request import Completion, Request, SpeculationStats
from serving.engine.sampling import Processor, SamplingParams
from serving.engine.verification import DraftTree, Rule, Verdict, follow, greedy_choices

_NO_DRAFT = DraftTree.chain([])
BESIDE_STREAMS = 32  # tokens of prompts that are read while others stream: fewer read the weights too often
MOST_UNREAD = 4096  # tokens of a sequence that the head leaves unread: their states take memory


@dataclass(eq=False)
class ActiveRequest:
    """A request while it has a slot: being read or decoded."""

    request: Request
    answer: GrowingAnswer
    processor: Processor
    rule: Rule
    seed: int | None  # None: greedy, and nothing was random
    slot: int
    cap: int  # the most tokens drafted at a time; 0: plain decoding
    head_cap: int  # the most of them that the head drafts
    estimate: RequestEstimate
    drafting: Any = None  # the proposer's state of this sequence; None where no head drafts
    lookup: LookupProposer | None = None  # None where nothing is ever copied
    head: LoadedHead | None = None  # that drafts, where one does
    read: int = 0  # tokens of the prompt that the target has read
    stats: SpeculationStats = field(default_factory=SpeculationStats)

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def reading(self) -> bool:
        """True while part of the prompt is still to be read."""
        return self.read < len(self.request.prompt_ids)

    @property
    def checks(self) -> bool:
        """True for a request of a head's self-check: whole chains are drafted, and nothing is learned from it."""
        return self.request.checks is not None

    def lose_head(self) -> None:
        """Draft with no head from now on."""
        self.head = self.drafting = None

    @property
    def finished(self) -> bool:
        return self.answer.finish_reason is not None

    @property
    def samples(self) -> bool:
        """True above temperature 0."""
        return self.params.temperature > 0

    @property
    def draftable(self) -> int:
        """The most tokens worth drafting now: a verification emits one token more than it accepts."""
        return max(0, min(self.cap, self.answer.remaining - 1))

    def completion(self) -> Completion:
        answer, times = self.answer, self.request.times
        assert answer.finish_reason is not None
        if len(answer.tokens) != self.stats.emitted + 1:  # a stop string took some back
            self.stats.settle(max(0, len(answer.tokens) - 1))  # the first is the prefill's
        if times.first_token:
            self.stats.prefill_seconds = times.first_token - times.started
        ids = [token.id for token in answer.tokens]
        end, stop = answer.finish_reason, answer.stop_reason
        return Completion(answer.prompt_ids, ids, answer.tokens, answer.text, end, self.seed, self.stats, stop)


@dataclass
class _Part:
    """A request's part in a step."""

    active: ActiveRequest
    segment: Segment
    tree: DraftTree  # without nodes: plain decoding, or a part of the prompt
    rows: range = range(0)  # its tokens' places in the batch

    @property
    def deciding(self) -> range:
        """The tokens whose logits are needed: the whole block, or the last token of a prompt."""
        if not self.active.reading:
            return self.rows
        whole = self.segment.reach == len(self.active.request.prompt_ids)
        return self.rows[-1:] if whole else self.rows[:0]


class Decoder:
    """Advances any number of requests, each by its share of a step: part of its prompt, or one verification."""

    def __init__(self, runner: TargetRunner, heads: Heads, controller: Controller, *, prefill_chunk: int) -> None:
        """prefill_chunk: the most prompt tokens in one step, so that a long prompt does not stall those behind it."""
        self.runner, self.heads, self.controller = runner, heads, controller
        self.prefill_chunk = prefill_chunk
        # of all steps without prompts: head: drafting, and reading what was accepted (of the steps with prompts, too);
        # target: its pass, to the logits; sampling: verification; other: batches, text, bookkeeping
        self.seconds = {"head": 0.0, "target": 0.0, "sampling": 0.0, "other": 0.0}
        self._asynchronous = runner.target.device.type != "cpu"
        self._plans: dict[ActiveRequest, DraftPlan] = {}  # of the present step

    @torch.inference_mode()
    def step(self, requests: list[ActiveRequest]) -> None:
        """Run one pass of the target; requests may be finished afterwards."""
        start = time.perf_counter()
        decoding = [active for active in requests if not active.reading]
        chunks = self._chunks([active for active in requests if active.reading], beside=bool(decoding))
        trees = self._draft(decoding, requests, sum(len(part.segment.ids) for part in chunks))
        began = time.perf_counter()
        parts = []
        for active, tree in zip(decoding, trees, strict=True):  # the last token, not read yet, and the drafts after it
            past = self.runner.cache.lengths[active.slot]
            parents = None if tree.is_chain else [-1, *(parent + 1 for parent in tree.parents)]
            segment = Segment(active.slot, past, past, [active.answer.last_id, *tree.tokens], parents)
            parts.append(_Part(active, segment, tree))
        parts += chunks
        batch = RaggedBatch.of([part.segment for part in parts], self.runner.target.device)
        entered = time.perf_counter()
        hidden, auxiliary = self.runner.forward(batch)
        for index, part in enumerate(parts):
            part.rows = batch.rows(index)
        deciding = [index for part in parts for index in part.deciding]
        logits = hidden[:0]  # [deciding, vocab]
        if deciding:
            logits = self.runner.logits(hidden if len(deciding) == len(hidden) else hidden[deciding])
        self._wait()  # the next that is read of them would wait, too
        read = time.perf_counter()
        verdicts = self._verify(parts, logits)
        decided = time.perf_counter()
        states = self._states(requests, auxiliary)
        for part, (verdict, own) in zip(parts, verdicts, strict=True):
            self._advance(part, verdict, own, states.get(part.active.head))
        seconds = time.perf_counter() - began
        ordinary = len(decoding) == len(parts) and not any(active.checks for active in decoding)
        if ordinary:
            self.seconds["target"] += read - entered
            self.seconds["sampling"] += decided - read
            self.seconds["other"] += seconds - (decided - entered)
        for active in decoding:  # with planning and drafting
            active.stats.decode_seconds += time.perf_counter() - start
        self.controller.observe_target(batch.ids.shape[1], seconds, ignore=not ordinary)
        # the readers wake up, and take Python's lock whenever the engine gives it up: not before all else is done
        for part, (verdict, _) in zip(parts, verdicts, strict=True):
            if verdict is not None and not part.active.finished:  # the last tokens come with the completion
                part.active.request.release(part.active.answer.release())

    def _states(self, requests: list[ActiveRequest], auxiliary: Tensor | None) -> dict[LoadedHead | None, Tensor]:
        """Return the auxiliary states that each head reads, [N, its layers * hidden], of those that any does."""
        layers, states = self.runner.layers, dict[LoadedHead | None, Tensor]()
        if auxiliary is None:
            return states
        parts = dict(zip(layers, auxiliary.chunk(len(layers), dim=-1), strict=True))
        for head in {active.head for active in requests}:
            if head is not None and head.proposer is not None:
                own = head.proposer.layers
                states[head] = auxiliary if own == layers else torch.cat([parts[layer] for layer in own], dim=-1)
        return states

    def _wait(self) -> None:
        """Wait for the device, so that the clock may be read."""
        if self._asynchronous:
            wait_for(self.runner.target.device)

    def _draft(self, requests: list[ActiveRequest], everyone: list[ActiveRequest], prompts: int) -> list[DraftTree]:
        """Draft a tree for each request, by the plans that the controller chooses; a self-check drafts whole chains.

        everyone: those whose prompt is being read, too. Where others draft the head reads it along, so that no step
        waits until it has read the whole of it. prompts: tokens of prompts in this step.
        """
        for active in requests:
            row = active.estimate
            row.room, row.remaining = active.draftable, active.answer.remaining
            row.head = min(row.room, active.head_cap) if active.drafting is not None else 0
            row.match = active.lookup.match.length if active.lookup is not None and row.room else 0
        planned = [active for active in requests if not active.checks]
        chains = {active: DraftPlan.chain(active.estimate.head) for active in requests if active.checks}
        prompts += sum(1 + plan.length for plan in chains.values())  # in this step's pass for others' sake, too
        chosen = self.controller.choose([active.estimate for active in planned], prompts, len(everyone) - len(requests))
        self._plans = {**dict(zip(planned, chosen, strict=True)), **chains}
        jobs = {active: self._job(active, plan) for active, plan in self._plans.items() if plan.length}
        drafted: dict[ActiveRequest, DraftTree] = {}
        for head in dict.fromkeys(active.head for active in everyone if active.drafting is not None):
            assert head is not None
            own = {active: job for active, job in jobs.items() if active.head is head}
            drafted |= self._head_drafts(head, own, [active for active in everyone if active.head is head])
        trees = {active: self._with_copies(active, drafted.get(active, _NO_DRAFT)) for active in requests}
        self.controller.observe_plans([self._plans[active].with_copies(trees[active].copied) for active in planned])
        return [trees[active] for active in requests]

    def _job(self, active: ActiveRequest, plan: DraftPlan) -> Job:
        floor, calibration = 0.0, None
        if not active.checks:
            calibration = self.controller.calibration(active.estimate, samples=active.samples)
            floor = 0.0 if plan.tree_nodes else active.estimate.drafter.floor
        active.rule.first_position = active.answer.length
        return Job(active.drafting, plan.length, plan.tree_nodes, active.rule, floor, calibration)

    def _with_copies(self, active: ActiveRequest, tree: DraftTree) -> DraftTree:
        """Return copied tokens, behind the head's chain where there is one."""
        plan, lookup = self._plans[active], active.lookup
        if lookup is None or plan.tree_nodes or not (plan.length or plan.copied):
            return tree
        if not len(tree):
            return lookup.propose(plan.copied)
        match = lookup.match_after(tree)
        count = plan.copied or self.controller.tail(active.estimate, tree, match.length, samples=active.samples)
        return lookup.extend(tree, match, count) if match.length and count else tree

    def _head_drafts(
        self, head: LoadedHead, jobs: dict[ActiveRequest, Job], everyone: list[ActiveRequest]
    ) -> dict[ActiveRequest, DraftTree]:
        """Let a head draft, and read what it must before; everyone: see `_draft`, of those that have this head."""
        assert head.proposer is not None
        ordinary = not any(active.checks for active in everyone)
        along = jobs and self.controller.drafting  # what only a probe looks at, the next step may not need
        late = [
            active
            for active in everyone
            if active.estimate.backlog >= (1 if active in jobs or (along and active.reading) else MOST_UNREAD)
        ]
        if not (jobs or late):
            return {}
        began = time.perf_counter()
        if late:
            tokens = head.proposer.catch_up([active.drafting for active in late])
            self._wait()
            if tokens and ordinary:
                self.controller.observe_catch_up(tokens, time.perf_counter() - began, head.estimate)
            for active in late:
                active.estimate.backlog = 0
        if not jobs:
            return {}
        caught_up = time.perf_counter()
        trees = dict(zip(jobs, head.proposer.propose(list(jobs.values())), strict=True))
        drafted = time.perf_counter()
        if ordinary:
            self.controller.observe_draft(list(trees.values()), drafted - caught_up, head.estimate)
            self.seconds["head"] += drafted - began
        return trees

    def _chunks(self, requests: list[ActiveRequest], *, beside: bool) -> list[_Part]:
        """Take the next parts of prompts: half of the chunk for the one that came first, so that it goes on, and the
        rest for those that end soonest, so that a long prompt does not hold up short ones.

        beside: others stream in this step, and get one token for each chunk, so it is a small one on a CPU, where a
        pass takes as long as its tokens.
        """
        chunk = min(self.prefill_chunk, BESIDE_STREAMS) if beside and not self._asynchronous else self.prefill_chunk
        left = {active: len(active.request.prompt_ids) - active.read for active in requests}
        counts = dict.fromkeys(requests, 0)
        for first in requests[:1]:
            counts[first] = min(left[first], -(-chunk // 2))
        for active in sorted(requests, key=lambda active: left[active] - counts[active]):
            counts[active] += min(left[active] - counts[active], chunk - sum(counts.values()))
        parts = []
        for active, count in counts.items():
            ids = active.request.prompt_ids[active.read : active.read + count]
            if ids:
                parts.append(_Part(active, Segment(active.slot, active.read, active.read, ids), _NO_DRAFT))
        return parts

    def _verify(self, parts: list[_Part], logits: Tensor) -> list[tuple[Verdict | None, Tensor]]:
        """Decide for each part, with its logits [n+1, vocab]; None where a prompt goes on."""
        greedy = [part.active.params.temperature == 0 and not part.active.processor.active for part in parts]
        choices = greedy_choices(logits, self.runner.compiled) if any(greedy) and len(logits) else []
        verdicts: list[tuple[Verdict | None, Tensor]] = []
        start = 0
        for part, is_greedy in zip(parts, greedy, strict=True):
            active, rows, verdict = part.active, slice(start, start + len(part.deciding)), None
            if part.deciding and is_greedy:
                verdict = follow(part.tree, choices[rows].__getitem__)
            elif part.deciding:
                verdict = active.rule.verify(logits[rows], part.tree, active.answer.length, active.processor)
            verdicts.append((verdict, logits[rows]))
            start = rows.stop
        return verdicts

    def _advance(self, part: _Part, verdict: Verdict | None, logits: Tensor, auxiliary: Tensor | None) -> None:
        """Emit, keep what was accepted in the cache, and let the proposer observe."""
        active, count = part.active, len(part.segment.ids)
        if active.reading:
            active.read += count
            known = active.request.prompt_ids[active.read - count + 1 : active.read + 1]
            emitted = self._emit(active, part.tree, verdict, logits) if verdict else []
            active.estimate.backlog += count
            following, kept = [*known, *emitted], list(part.rows)
            if active.lookup is not None:
                active.lookup.observe([*part.segment.ids, *emitted])
        else:
            assert verdict is not None
            following = self._emit(active, part.tree, verdict, logits)
            entries = [0, *(node + 1 for node in verdict.path)][: len(following)]
            self.runner.cache.keep(active.slot, part.segment.base, entries)
            kept = [part.rows.start + entry for entry in entries]
            accepted = min(len(verdict.path), len(following))
            active.stats.count(part.tree.depth, len(part.tree), accepted, len(following), part.tree.copied)
            self._learn(part, following, accepted, trimmed=active.finished and len(following) <= len(verdict.path))
        head = active.head
        if head is not None and head.proposer is not None and auxiliary is not None and not active.finished:
            # a copy: states that wait for the head must not keep those of other sequences. And an index costs several
            # times what a slice does, for every sequence in every step
            together = kept == list(range(kept[0], kept[-1] + 1))
            states = auxiliary[kept[0] : kept[-1] + 1].clone() if together else auxiliary[kept]
            head.proposer.observe(active.drafting, following, states)

    def _learn(self, part: _Part, following: list[int], accepted: int, *, trimmed: bool) -> None:
        """Let the estimates observe a verification; trimmed: the answer ended within it, the rest was not judged."""
        active, tree, row, head = part.active, part.tree, part.active.estimate, part.active.head
        depth = tree.depth - tree.copied  # of what the head drafted
        by_head = min(accepted, depth)
        row.observe(len(following), by_head=depth > 0, copied=accepted - by_head)
        if active.checks:
            return
        if depth and head is not None:
            head.count(tree.drawn, by_head, min(len(following), by_head + 1))
            if not trimmed:
                planned = self._plans[active].length
                row.observe_head(planned, depth, by_head)
                self.controller.observe_confidence(row, tree, by_head, samples=active.samples)
                if active.params.temperature <= 1:  # above, any head is accepted less
                    self.heads.judge(head, active.request, planned, depth, by_head, samples=active.samples)
        if active.lookup is not None:
            if match := active.lookup.match.length:
                row.observe_lookup(match, active.lookup.continues(following), len(following))
            active.lookup.observe(following)

    def _emit(self, active: ActiveRequest, tree: DraftTree, verdict: Verdict, logits: Tensor) -> list[int]:
        """Append the accepted tokens and the target's own until the answer ends; returns their ids."""
        answer = active.answer
        ids = [*(tree.tokens[node] for node in verdict.path), verdict.bonus]
        rows = [0, *(node + 1 for node in verdict.path)]  # of the logits, that each of them comes from
        emitted = []
        for place, token in enumerate(ids):
            logprob, top = _logprobs(logits[rows[place]], token, active.params.logprobs)
            drafts = tree.children[rows[place]]  # in its place
            accepted_position = place if place < len(verdict.path) else None
            rejected = next(iter(drafts), None) if accepted_position is None else None
            copied = min(drafts.values(), default=-1) >= tree.drawn  # a chain's only one
            answer.append(token, logprob, top, accepted_position, rejected, tree.depth, copied)
            active.processor.append(token)
            emitted.append(token)
            if answer.finish_reason is not None:
                break
        if not active.request.times.first_token:
            active.request.times.first_token = time.monotonic()
        return emitted


def _logprobs(logits: Tensor, token: int, count: int | None) -> tuple[float | None, list[tuple[int, float]] | None]:
    """Return the target's log-probability of a token, before any warping, and those of the `count` likeliest."""
    if count is None:
        return None, None
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    top = log_p.topk(min(count, len(log_p)))
    return float(log_p[token]), list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
