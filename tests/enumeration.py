"""The law of speculative text by enumeration.

It runs the rules themselves: every random decision is read from a script, and the run is repeated until each
combination of outcomes has been seen, with its probability.
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from torch import Tensor
from toy_decoding import PROMPT, Model, Text, decode, drafted_tree, new_processor

from serving.engine import verification
from serving.engine.lookup import LookupProposer
from serving.engine.sampling import SamplingParams, apply_temperature
from serving.engine.verification import DraftTree, Rejection, Rule

VOCAB, LENGTH = 3, 3
VOCABULARY = torch.tensor([0, 2])  # the head lacks a token
TARGET, HEAD = Model(1, VOCAB), Model(2, VOCAB)
Law = dict[Text, float]
PROCESSING = {
    "plain": SamplingParams(temperature=0.8),
    "top-k": SamplingParams(temperature=0.7, top_k=2),
    "top-p, min-p": SamplingParams(temperature=1.2, top_p=0.8, min_p=0.1),
    "penalties": SamplingParams(
        temperature=1.0, repetition_penalty=1.5, presence_penalty=0.7, frequency_penalty=-0.6, logit_bias={1: 0.8}
    ),
    "min tokens": SamplingParams(temperature=1.0, top_k=2, min_new_tokens=2),
}

# children of a node, depth, nodes
SHAPES = {"siblings": (2, 1, 2), "path": (1, 2, 2), "tree": (2, 2, 4), "all there is": (2, 3, 14)}


def law_of_target(params: SamplingParams, length: int = LENGTH) -> Law:
    """The joint law of the first tokens in plain decoding: one row at a time, nothing drafted."""
    law: Law = {}
    for cell in itertools.product(range(VOCAB), repeat=length):
        processor, law[cell] = new_processor(params, VOCAB), 1.0
        for i, token in enumerate(cell):
            log_p = processor.warp(processor.adjust(TARGET(cell[:i])[None], [[]]))
            law[cell] *= log_p[0, token].exp().item()
            processor.append(token)
    return law


def deviations(seen: Sequence[float], expected: Sequence[float]) -> float:
    """Chi-square in standard deviations above its mean; cells that expect fewer than 5 are taken together."""
    cells = list(zip(seen, expected, strict=True))
    if any(count and not mean for count, mean in cells):
        return math.inf  # what cannot be
    pairs = [cell for cell in cells if cell[1] >= 5]
    rare, rare_mean = (sum(part) for part in zip((0.0, 0.0), *(cell for cell in cells if cell[1] < 5), strict=True))
    if rare_mean >= 5:
        pairs.append((rare, rare_mean))
    statistic, freedom = sum((count - mean) ** 2 / mean for count, mean in pairs), len(pairs) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


def deviations_of(texts: Iterable[Text], law: Law) -> float:
    """The same of sampled texts from a law."""
    counts = Counter(texts)
    cells = {**dict.fromkeys(counts, 0.0), **law}
    return deviations([counts[cell] for cell in cells], [mass * counts.total() for mass in cells.values()])


class Script:
    """Random decisions as written; one that is not takes its first outcome, and the others remain to be tried."""

    def __init__(self, written: list[int]) -> None:
        self.written, self.taken = written, 0
        self.weight = 1.0
        self.alternatives: list[list[int]] = []
        self._asked: set[tuple[str, int, int]] = set()
        self._cells: dict[int, int] = {}  # position -> where its drafting number lies

    def _decide(self, probabilities: list[float]) -> int:
        possible = [outcome for outcome, probability in enumerate(probabilities) if probability > 0]
        if self.taken == len(self.written):
            self.alternatives += [[*self.written, outcome] for outcome in possible[1:]]
            self.written = [*self.written, possible[0]]
        outcome = self.written[self.taken]
        self.taken += 1
        self.weight *= probabilities[outcome]
        return outcome

    def _ask_once(self, purpose: str, position: int, candidate: int = 0) -> None:
        assert (purpose, position, candidate) not in self._asked, "one random number for two decisions"
        self._asked.add((purpose, position, candidate))

    def accepts(self, probability: float, position: int, candidate: int) -> bool:
        self._ask_once("accepts", position, candidate)
        return bool(self._decide([1 - probability, probability]))

    def draw(self, log_p: Tensor, position: int) -> int:
        self._ask_once("draw", position)
        return self._decide(log_p.exp().tolist())

    def draft(self, q: Tensor, position: int, borders: list[float]) -> int:
        """A token from q [vocab]. A position has one number, however often and after whatever it is drafted.

        borders: of cells of (0, 1), such that all numbers of a cell draft the same token, after each prefix.
        """
        if position not in self._cells:
            self._cells[position] = self._decide([high - low for low, high in itertools.pairwise(borders)])
        low, high = borders[self._cells[position] :][:2]
        return int((q.cumsum(0) < (low + high) / 2).sum())


ScriptedPlan = Callable[[Text, Script], DraftTree]


def law_of_speculation(monkeypatch: pytest.MonkeyPatch, rule: Rule, params: SamplingParams, plan: ScriptedPlan) -> Law:
    """The joint law of the first tokens, over as many verifications as they take."""
    law: Law = defaultdict(float)
    untried: list[list[int]] = [[]]
    while untried:
        script = Script(untried.pop())
        monkeypatch.setattr(verification, "SeededSampler", lambda seed, script=script: script)
        text = decode(rule, TARGET, params, lambda tokens, script=script: plan(tokens, script), LENGTH)
        law[text] += script.weight
        untried += script.alternatives
    assert sum(law.values()) == pytest.approx(1, abs=1e-12)
    return law


def distance(
    monkeypatch: pytest.MonkeyPatch, rule: Rule, used: SamplingParams, plan: ScriptedPlan, right: SamplingParams
) -> float:
    """Total variation between the law of speculation, with the parameters `used`, and the right one of the target."""
    law, expected = law_of_speculation(monkeypatch, rule, used, plan), law_of_target(right)
    return sum(abs(law.get(cell, 0.0) - expected.get(cell, 0.0)) for cell in {*law, *expected}) / 2


def head_law(tokens: Text, temperature: float) -> Tensor:
    """q [vocab], over the target's vocabulary."""
    log_q = apply_temperature(HEAD(tokens)[VOCABULARY], temperature).log_softmax(dim=-1)
    return torch.zeros(VOCAB, dtype=torch.float64).index_copy(0, VOCABULARY, log_q.exp())


def chains(k: int, temperature: float = 0.8, reported: float | None = None) -> ScriptedPlan:
    """Chains of k tokens drawn from q; reported: the temperature of the q that the rule is given, where it differs."""
    borders = []  # of each position
    for position in range(LENGTH):
        prefixes = itertools.product(range(VOCAB), repeat=position)
        sums = {round(x, 15) for prefix in prefixes for x in head_law(prefix, temperature).cumsum(0).tolist()}
        borders.append(sorted({0.0, *sums, 1.0}))

    def plan(tokens: Text, script: Script) -> DraftTree:
        drafted: Text = ()
        rows = []
        for _ in range(min(k, LENGTH - len(tokens) - 1)):
            prefix = tokens + drafted
            rows.append(head_law(prefix, reported or temperature))
            drafted += (script.draft(head_law(prefix, temperature), len(prefix), borders[len(prefix)]),)
        return DraftTree.chain(drafted, torch.stack(rows) if rows else None)

    return plan


def copies(count: int) -> ScriptedPlan:
    """Tokens that are copied from the prompt and the text, where they have something to follow."""

    def plan(tokens: Text, script: Script) -> DraftTree:
        lookup, room = looking(tokens), min(count, LENGTH - len(tokens) - 1)
        return lookup.propose(room) if lookup.match.length and room > 0 else DraftTree()

    return plan


def looking(tokens: Text) -> LookupProposer:
    lookup = LookupProposer()
    lookup.observe([*PROMPT, *tokens])
    return lookup


def with_tails(heads: ScriptedPlan, count: int) -> ScriptedPlan:
    """Copied tokens behind what the head drafts."""

    def plan(tokens: Text, script: Script) -> DraftTree:
        lookup, chain = looking(tokens), heads(tokens, script)
        match, room = lookup.match_after(chain), min(count, LENGTH - len(tokens) - 1 - len(chain))
        return lookup.extend(chain, match, room) if match.length and room > 0 else chain

    return plan


def confident(k: int, floor: float, temperature: float = 0.8) -> ScriptedPlan:
    """Chains of up to k tokens that end before a token whose largest q is below the floor: known before its draw."""

    def plan(tokens: Text, script: Script) -> DraftTree:
        length = 1
        chain = chains(k, temperature)(tokens, script)
        for place in range(1, len(chain)):
            if head_law((*tokens, *chain.tokens[:place]), temperature).max() < floor:
                break
            length += 1
        return DraftTree.chain(chain.tokens[:length], None if chain.q is None else chain.q[:length])

    return plan


def trees(shape: str, params: SamplingParams) -> ScriptedPlan:
    """Trees of the likeliest tokens, as the rejection rule has them."""
    top_k, depth, size = SHAPES[shape]
    rule = Rejection(params, 0)
    return lambda tokens, _: drafted_tree(rule, HEAD, VOCABULARY, tokens, top_k=top_k, depth=depth, size=size)
