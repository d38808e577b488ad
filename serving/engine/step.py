"""One step of the loop: draft, read and verify in one pass of the target, emit. Tensors in, tokens out; no queues."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from draft.target import wait_for
from serving.engine.drafting import Job, Proposer
from serving.engine.kv_cache import Batch, Segment
from serving.engine.model import TargetRunner
from serving.engine.planner import OFF, Controller, Plan, RowStats
from serving.engine.request import Completion, Request, Sequence, SpeculationStats
from serving.engine.sampling import Processor, SamplingParams
from serving.engine.tree import DraftTree
from serving.engine.verification import Rule, Verdict, follow, greedy_choices

_NOTHING = DraftTree.chain([])


@dataclass
class _Work:
    """A row's part in a step."""

    row: Row
    segment: Segment
    tree: DraftTree  # without nodes: plain decoding, or a part of the prompt
    rows: range = range(0)  # where its tokens are in the batch

    @property
    def decides(self) -> range:
        """Which of its tokens' logits are wanted: the whole block, or the last token of a prompt."""
        if not self.row.reading:
            return self.rows
        whole = self.segment.past + len(self.segment.ids) == len(self.row.sequence.prompt_ids)
        return self.rows[-1:] if whole else self.rows[:0]


@dataclass
class Seconds:
    """Where the time of all steps without prompts went."""

    head: float = 0.0  # drafting, and reading what was accepted (of the steps with prompts, too)
    target: float = 0.0  # its pass, to the logits
    sampling: float = 0.0  # verification
    other: float = 0.0  # batches, text, bookkeeping


class Decoder:
    """Advances any number of rows, each by what it gets of a step: part of its prompt, or one verification."""

    def __init__(
        self, runner: TargetRunner, proposer: Proposer | None, controller: Controller, *, prefill_chunk: int
    ) -> None:
        """prefill_chunk: the most prompt tokens in one step, so that a long prompt does not stall those that stream."""
        self.runner, self.proposer, self.controller = runner, proposer, controller
        self.prefill_chunk = prefill_chunk
        self.seconds = Seconds()
        self._plans: dict[Row, Plan] = {}  # of the rows that may draft, in the present step

    @torch.inference_mode()
    def step(self, rows: list[Row]) -> None:
        """One pass of the target; rows may be finished afterwards."""
        decoding = [row for row in rows if not row.reading]
        recordings = self._recordings
        trees = self._draft(decoding)
        began = time.perf_counter()
        work = [self._block(row, tree) for row, tree in zip(decoding, trees, strict=True)]
        work += self._chunks([row for row in rows if row.reading])
        batch = Batch.of([part.segment for part in work], self.runner.target.device)
        entered = time.perf_counter()
        hidden, auxiliary = self.runner.forward(batch)
        for index, part in enumerate(work):
            part.rows = batch.rows(index)
        logits = self._logits(work, hidden)
        wait_for(logits.device)  # the next that is read of them would wait, too
        read = time.perf_counter()
        verdicts = self._verdicts(work, logits)
        decided = time.perf_counter()
        for part, (verdict, logits) in zip(work, verdicts, strict=True):
            self._advance(part, verdict, logits, auxiliary)
        seconds = time.perf_counter() - began
        if len(decoding) == len(work):
            self.seconds.target += read - entered
            self.seconds.sampling += decided - read
            self.seconds.other += seconds - (decided - entered)
        for row in decoding:
            row.stats.decode_seconds += seconds
        special = len(decoding) < len(work) or self._recordings > recordings
        self.controller.observe_target(batch.ids.shape[1], seconds, ignore=special)

    def _draft(self, rows: list[Row]) -> list[DraftTree]:
        """A tree for each row; most often all of one shape, which the controller chooses."""
        for row in rows:
            row.acceptance.cap = row.draftable if row.drafting is not None else 0
            row.acceptance.remaining = row.sequence.remaining
        plan = self.controller.choose([row.acceptance for row in rows])
        self._plans = {row: plan.capped(row.acceptance.cap) for row in rows}
        jobs = {
            row: Job(row.drafting, own.length, own.nodes if own.kind == "tree" else 0, row.rule)
            for row, own in self._plans.items()
            if own != OFF
        }
        if not jobs or self.proposer is None:
            return [_NOTHING] * len(rows)
        began, recordings = time.perf_counter(), self._recordings
        late = [row.drafting for row in jobs if row.acceptance.backlog]
        if late:
            tokens = self.proposer.catch_up(late)
            wait_for(self.runner.target.device)
            self.controller.observe_catch_up(tokens, time.perf_counter() - began)
        caught_up = time.perf_counter()
        trees = dict(zip(jobs, self.proposer.propose(list(jobs.values())), strict=True))
        drafted = time.perf_counter()
        if self._recordings == recordings:
            self.controller.observe_draft([self._plans[row] for row in jobs], drafted - caught_up)
        self.seconds.head += drafted - began
        for row in jobs:
            row.stats.decode_seconds += drafted - began
        return [trees.get(row, _NOTHING) for row in rows]

    @property
    def _recordings(self) -> int:
        return self.runner.recordings + (self.proposer.recordings if self.proposer else 0)

    def _block(self, row: Row, tree: DraftTree) -> _Work:
        """The last token, which the target has not read, and the drafts after it."""
        past = self.runner.cache.lengths[row.slot]
        parents = None if tree.is_chain else [-1, *(parent + 1 for parent in tree.parents)]
        return _Work(row, Segment(row.slot, past, past, [row.sequence.last_id, *tree.tokens], parents), tree)

    def _chunks(self, rows: list[Row]) -> list[_Work]:
        """The next parts of prompts, first come first served."""
        room, work = self.prefill_chunk, []
        for row in rows:
            ids = row.sequence.prompt_ids[row.read : row.read + room]
            if not ids:
                break
            room -= len(ids)
            work.append(_Work(row, Segment(row.slot, row.read, row.read, ids), _NOTHING))
        return work

    def _logits(self, work: list[_Work], hidden: Tensor) -> Tensor:
        """[wanted, vocab], part after part, of the tokens that decide something."""
        wanted = [index for part in work for index in part.decides]
        if not wanted:
            return hidden[:0]
        return self.runner.logits(hidden if len(wanted) == len(hidden) else hidden[wanted])

    def _verdicts(self, work: list[_Work], logits: Tensor) -> list[tuple[Verdict | None, Tensor]]:
        """What the target says, with the logits [n+1, vocab] it says it by; None where a prompt goes on."""
        greedy = [part.row.params.temperature == 0 and not part.row.processor.active for part in work]
        choices = greedy_choices(logits) if any(greedy) and len(logits) else []
        verdicts: list[tuple[Verdict | None, Tensor]] = []
        start = 0
        for part, is_greedy in zip(work, greedy, strict=True):
            own = slice(start, start + len(part.decides))
            start = own.stop
            if own.start == own.stop:
                verdicts.append((None, logits[own]))
            elif is_greedy:
                verdicts.append((follow(part.tree, choices[own].__getitem__), logits[own]))
            else:
                row = part.row
                verdict = row.rule.verify(logits[own], part.tree, row.sequence.length, row.processor)
                verdicts.append((verdict, logits[own]))
        return verdicts

    def _advance(self, part: _Work, verdict: Verdict | None, logits: Tensor, auxiliary: Tensor | None) -> None:
        """Emit, keep what stands in the cache, and tell the proposer."""
        row, count = part.row, len(part.segment.ids)
        if row.reading:
            row.read += count
            known = row.sequence.prompt_ids[row.read - count + 1 : row.read + 1]
            emitted = self._emit(row, part.tree, verdict, logits) if verdict else []
            row.acceptance.backlog += count
            following, kept = [*known, *emitted], list(part.rows)
        else:
            assert verdict is not None
            following = self._emit(row, part.tree, verdict, logits)
            entries = [0, *(node + 1 for node in verdict.path)][: len(following)]
            self.runner.cache.keep(row.slot, part.segment.base, entries)
            kept = [part.rows.start + entry for entry in entries]
            accepted = min(len(verdict.path), len(following))
            row.stats.count(part.tree.depth, len(part.tree), accepted, len(following))
            trimmed = row.finished and len(following) <= len(verdict.path)
            row.acceptance.observe(self._plans[row], accepted, trimmed=trimmed)
        if row.drafting is not None and auxiliary is not None and not row.finished:
            assert self.proposer is not None
            self.proposer.observe(row.drafting, following, _taken(auxiliary, kept))

    def _emit(self, row: Row, tree: DraftTree, verdict: Verdict, logits: Tensor) -> list[int]:
        """Append what stands until the sequence ends; returns the ids."""
        sequence = row.sequence
        ids = [*(tree.tokens[node] for node in verdict.path), verdict.bonus]
        nodes = [0, *(node + 1 for node in verdict.path)]  # the logits' row that each of them comes from
        emitted = []
        for place, token in enumerate(ids):
            logprob, top = _logprobs(logits[nodes[place]], token, row.params.logprobs)
            accepted_position = place if place < len(verdict.path) else None
            rejected = next(iter(tree.children[nodes[place]]), None) if accepted_position is None else None
            sequence.append(token, logprob, top, accepted_position, rejected, tree.depth)
            row.processor.append(token)
            emitted.append(token)
            if sequence.finish_reason is not None:
                break
        if not row.request.times.first_token:
            row.request.stamp(first_token=time.monotonic())
        if sequence.finish_reason is None:  # otherwise the last tokens come with the completion
            row.request.release(sequence.release())
        return emitted


def _taken(states: Tensor, rows: list[int]) -> Tensor:
    """A copy of these rows, which rise: states that wait for the head must not keep those of other sequences."""
    first, count = rows[0], len(rows)
    # an index costs several times what a slice does, for every sequence in every step
    return states[first : first + count].clone() if rows[-1] - first == count - 1 else states[rows]


def _logprobs(logits: Tensor, token: int, count: int | None) -> tuple[float | None, list[tuple[int, float]] | None]:
    """The target's own log-probability of a token, before any warping, and those of the `count` likeliest."""
    if count is None:
        return None, None
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    top = log_p.topk(min(count, len(log_p)))
    return float(log_p[token]), list(zip(top.indices.tolist(), top.values.tolist(), strict=True))


# A request while it has a slot: what the engine knows of it between steps.


@dataclass(eq=False)
class Row:
    """One sequence being read or decoded."""

    request: Request
    sequence: Sequence
    processor: Processor
    rule: Rule
    seed: int | None  # None: greedy, and nothing was random
    slot: int
    cap: int  # the most tokens drafted at a time; 0: plain decoding
    acceptance: RowStats
    drafting: Any = None  # the proposer's state of this sequence; None where nothing is ever drafted
    read: int = 0  # tokens of the prompt that the target has read
    stats: SpeculationStats = field(default_factory=SpeculationStats)

    @property
    def params(self) -> SamplingParams:
        return self.sequence.params

    @property
    def reading(self) -> bool:
        """Whether part of the prompt is still to be read."""
        return self.read < len(self.sequence.prompt_ids)

    @property
    def finished(self) -> bool:
        return self.sequence.finish_reason is not None

    @property
    def draftable(self) -> int:
        """The most tokens worth drafting now: a verification emits one token more than stand."""
        return max(0, min(self.cap, self.sequence.remaining - 1))

    def completion(self) -> Completion:
        sequence = self.sequence
        assert sequence.finish_reason is not None
        if len(sequence.tokens) != self.stats.emitted + 1:  # a stop string took some back
            self.stats.settle(sequence.tokens)
        times = self.request.times
        if times.first_token:
            self.stats.prefill_seconds = times.first_token - times.started
        return Completion(
            prompt_ids=sequence.prompt_ids,
            token_ids=[token.id for token in sequence.tokens],
            tokens=sequence.tokens,
            text=sequence.text,
            finish_reason=sequence.finish_reason,
            seed=self.seed,
            stats=self.stats,
            stop_reason=sequence.stop_reason,
        )
