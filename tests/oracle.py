"""A proposer that knows how texts go on, and requests whose answers are known.

Random heads are seldom right. The oracle knows how a sequence goes on and errs at random places, so that blocks are
accepted in part, in whole and not at all; and it checks all that the engine tells a proposer.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from tiny_targets import Text
from torch import Tensor

from draft.target import Target
from serving.engine import Completion, Engine, Request, SamplingParams, Speculation
from serving.engine.answer import GrowingAnswer, special_ids
from serving.engine.drafting import Job, Proposer
from serving.engine.estimates import OFF, DraftPlan, RequestEstimate
from serving.engine.heads import LoadedHead
from serving.engine.kv_cache import SlotCache
from serving.engine.planner import Controller, make_controller
from serving.engine.verification import DraftTree


@dataclass
class Script:
    """The continuation of a sequence, for the oracle."""

    tokens: list[int]  # prompt and answer
    auxiliary: Tensor | None = None  # the true states, where known
    observed: int = 0  # tokens that the target has read
    read: int = 0  # of these, what `catch_up` was called for


class Oracle:
    """Drafts what it knows to be right, with mistakes. Scripts go to sequences in the order in which they join."""

    def __init__(self, target: Target, errors: float = 0.0, seed: int = 0, *, tolerance: float = 1e-9) -> None:
        """errors: probability that a drafted token is wrong, or that a tree lacks the right child. tolerance: of the
        target's states."""
        self.tolerance = tolerance
        self.layers = target.default_auxiliary_layers
        self.vocab, self.errors, self.rng = target.vocab_size, errors, random.Random(seed)
        self.scripts: deque[Script] = deque()
        self.present: list[Script] = []

    def join(self, tokens: int) -> Script:
        self.present.append(self.scripts.popleft())
        return self.present[-1]

    def leave(self, state: Script) -> None:
        self.present.remove(state)

    def observe(self, state: Script, following: Sequence[int], auxiliary: Tensor) -> None:
        start, state.observed = state.observed, state.observed + len(following)
        known = state.tokens[start + 1 : state.observed + 1]
        assert list(following)[: len(known)] == known, "the engine left the continuation"
        assert len(auxiliary) == len(following)
        if state.auxiliary is not None:
            expected = state.auxiliary[start : state.observed]
            torch.testing.assert_close(auxiliary, expected, rtol=self.tolerance, atol=self.tolerance)

    def catch_up(self, states: Sequence[Script]) -> int:
        backlog = sum(state.observed - state.read for state in states)
        for state in states:
            state.read = state.observed
        return backlog

    def propose(self, jobs: Sequence[Job]) -> list[DraftTree]:
        self.catch_up([job.state for job in jobs])
        return [self._tree(job) if job.nodes else self._chain(job) for job in jobs]

    def _right(self, job: Job) -> list[int]:
        known = job.state.tokens[job.state.observed + 1 :][: job.length]
        return known + [self._any() for _ in range(job.length - len(known))]

    def _any(self) -> int:
        return self.rng.randrange(self.vocab)

    def _errs(self) -> bool:
        return self.rng.random() < self.errors

    def _chain(self, job: Job) -> DraftTree:
        return DraftTree.chain([self._any() if self._errs() else token for token in self._right(job)])

    def _tree(self, job: Job) -> DraftTree:
        """The right path hidden among wrong siblings and cousins, in any order that keeps parents before children."""
        path = [*itertools.takewhile(lambda _: not self._errs(), self._right(job))][: job.nodes]
        places = sorted(self.rng.sample(range(job.nodes), len(path)))
        tokens, parents, depths = list[int](), list[int](), list[int]()
        tip = -1  # the last node of the right path so far
        for node in range(job.nodes):
            if node in places:
                parent, token = tip, path[places.index(node)]
                tip = node
            else:
                parent = self.rng.choice([-1, *(above for above, depth in enumerate(depths) if depth < job.length)])
                token = self._any()
                while token in path or (parent, token) in zip(parents, tokens, strict=True):
                    token = self._any()
            tokens.append(token)
            parents.append(parent)
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return DraftTree(tokens, parents)


class Fickle(Controller):
    """Switches plans at every step, and for each request, whatever they cost."""

    def __init__(self, plans: Sequence[DraftPlan], seed: int = 0) -> None:
        super().__init__(8)
        self.any, self.rng = [OFF, *plans], random.Random(seed)

    def choose(self, rows: Sequence[RequestEstimate], prompts: int = 0, readers: int = 0) -> list[DraftPlan]:
        super().choose(rows, prompts, readers)  # its own bookkeeping must survive, too
        return [self.rng.choice(self.any).capped(row) for row in rows]


CHAINS = [DraftPlan.chain(k) for k in range(1, 9)]
TREES = [DraftPlan(*shape) for shape in ((2, 4), (3, 4), (5, 16), (8, 32))]
COPIES = [DraftPlan(head, head, copied) for head in (0, 0, 1, 3) for copied in (1, 4, 20)]
PLANS = [*CHAINS, *TREES, *COPIES]


def engine_of(target: Target, proposer: Proposer, controller: Controller | None = None, **options: Any) -> Engine:
    """An engine that drafts with any proposer, and with any controller."""
    options = {"tree_size": 32, "speculation_length": 8, **options}
    engine, tree_size = Engine(target, **options), options["tree_size"]
    weightless: Any = SimpleNamespace(fingerprint=None)
    engine.heads.add(LoadedHead("oracle", weightless, proposer, engine.speculation_length))
    engine.models.runner.layers = engine.heads.layers
    controller = controller or make_controller(engine.speculation, engine.speculation_length, tree_size)
    engine.controller = engine._decoder.controller = controller
    return engine


@dataclass(frozen=True)
class Case:
    """A request, when it comes, and what its answer must be."""

    prompt: list[int]
    params: SamplingParams
    expected: list[int]  # what unlimited decoding would give: at least as many tokens as are requested
    auxiliary: Tensor | None = field(default=None, repr=False)
    log_p: Tensor | None = field(default=None, repr=False)  # [tokens, vocab] of the expected tokens
    speculation: Speculation = Speculation()
    arrives: int = 0  # at which step

    @classmethod
    def greedy(cls, text: Text, prompt_length: int, params: SamplingParams, **rest: Any) -> Case:
        """Any beginning of a text is a prompt whose greedy continuation is known."""
        assert prompt_length >= text.written
        tokens, log_p = text.tokens, text.log_p[prompt_length - 1 : -1]
        return cls(tokens[:prompt_length], params, tokens[prompt_length:], text.auxiliary, log_p, **rest)

    @property
    def drafts(self) -> bool:
        """True where the head gets a slot: the first token and the last one are the target's own."""
        return self.speculation.enabled and self.speculation.num_tokens != 0 and self.params.max_new_tokens > 2


def submit(engine: Engine, case: Case) -> Request:
    """Submit a case, and give the oracle, if the engine has one, its continuation."""
    proposer = engine.proposer
    if isinstance(proposer, Oracle) and case.drafts:
        proposer.scripts.append(Script(case.prompt + case.expected, case.auxiliary))
    return engine.submit(case.prompt, case.params, case.speculation)


def serve(engine: Engine, cases: Sequence[Case], tolerance: float = 1e-9) -> list[Completion]:
    """Decode and check; requests arrive between steps, in any order. Returns completions in the order of the cases."""
    requests: dict[int, Request] = {}
    step = 0
    while len(requests) < len(cases) or engine.running or engine.waiting:
        requests |= {index: submit(engine, case) for index, case in enumerate(cases) if case.arrives == step}
        engine.step()
        step += 1
    completions = [requests[index].result(timeout=0) for index in range(len(cases))]
    for case, completion in zip(cases, completions, strict=True):
        check(engine.target, case, completion, tolerance)
    return completions


def check(target: Target, case: Case, completion: Completion, tolerance: float) -> None:
    """Check that the answer is the expected tokens, cut where they end; tolerance: of logprobs."""
    special = special_ids(target.tokenizer, target.eos_token_ids)
    answer = GrowingAnswer(case.prompt, case.params, target.tokenizer, target.eos_token_ids, special)
    for token in case.expected:
        answer.append(token)
        if answer.finish_reason:
            break
    assert completion.token_ids == [token.id for token in answer.tokens], case
    for name in ("text", "finish_reason", "stop_reason"):
        assert getattr(completion, name) == getattr(answer, name)
    assert [token.text for token in completion.tokens] == [token.text for token in answer.tokens]
    if case.params.logprobs is not None and case.log_p is not None:
        for given, log_p in zip(completion.tokens, case.log_p, strict=False):
            assert given.logprob is not None and given.top is not None
            assert abs(given.logprob - log_p[given.id].item()) < tolerance
            best = log_p.topk(case.params.logprobs)
            assert [token_id for token_id, _ in given.top] == best.indices.tolist()
            assert max(abs(p - q) for (_, p), q in zip(given.top, best.values.tolist(), strict=True)) < tolerance
    stats = completion.stats
    assert stats.emitted == max(0, len(completion.tokens) - 1)
    assert stats.accepted == sum(token.accepted_position is not None for token in completion.tokens)
    if not case.drafts:
        assert stats.drafted == 0


def all_free(cache: SlotCache) -> bool:
    """Return True when no slot and no block of a cache is in use."""
    return cache.free_blocks == cache.blocks and not any(cache.lengths) and bool((cache.table == -1).all())
