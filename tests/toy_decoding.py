"""Speculative decoding with functions for networks: small enough to be enumerated, or run thousands of times."""

from collections.abc import Callable

import torch
from torch import Tensor

from serving.engine.drafting import TreeGrower
from serving.engine.sampling import Processor, SamplingParams
from serving.engine.verification import DraftTree, Rule

PROMPT = [0, 2]
EOS = 1
Text = tuple[int, ...]
Plan = Callable[[Text], DraftTree]  # the text so far -> what is drafted after it


class Model:
    """Logits [vocab] as a function of the tokens so far; a head resembles its target as much as `likeness` says."""

    def __init__(self, seed: int, vocab: int, *, like: "Model | None" = None, likeness: float = 0.0) -> None:
        self.seed, self.vocab, self.like, self.likeness = seed, vocab, like, likeness
        self._known: dict[Text, Tensor] = {}

    def __call__(self, tokens: Text) -> Tensor:
        if tokens not in self._known:
            generator = torch.Generator().manual_seed(hash((self.seed, tokens)) % 2**62)
            logits = torch.randn(self.vocab, generator=generator, dtype=torch.float64) * 1.5
            if self.like is not None:
                logits = self.likeness * self.like(tokens) + (1 - self.likeness) * logits
            self._known[tokens] = logits
        return self._known[tokens]


def new_processor(params: SamplingParams, vocab: int) -> Processor:
    return Processor(params, PROMPT, vocab, [EOS])


def rows_of(target: Model, tokens: Text, tree: DraftTree) -> Tensor:
    """The target's logits [n+1, vocab] at the rows of a tree."""
    return torch.stack([target((*tokens, *tree.prefix(row))) for row in range(len(tree) + 1)])


def decode(rule: Rule, target: Model, params: SamplingParams, plan: Plan, length: int) -> Text:
    """Draft and verify until `length` tokens are there."""
    tokens: Text = ()
    processor = new_processor(params, target.vocab)
    while len(tokens) < length:
        tree = plan(tokens)
        verdict = rule.verify(rows_of(target, tokens, tree), tree, len(tokens), processor)
        emitted = (*(tree.tokens[node] for node in verdict.path), verdict.bonus)
        tokens += emitted
        for token in emitted:
            processor.append(token)
    return tokens[:length]


def nothing(tokens: Text) -> DraftTree:
    """The plan of plain decoding."""
    return DraftTree()


def drafted_chain(rule: Rule, head: Model, vocabulary: Tensor, tokens: Text, k: int) -> DraftTree:
    """As the engine drafts a chain; vocabulary: target ids that the head knows."""
    drafted: Text = ()
    rows = []
    for _ in range(k):
        prefix = tokens + drafted
        ids, q = rule.draft(head(prefix)[vocabulary][None], vocabulary, [len(prefix)])
        drafted += tuple(ids.tolist())
        if q is not None:
            rows.append(torch.zeros(head.vocab, dtype=torch.float64).index_copy(0, vocabulary, q[0]))
    return DraftTree.chain(drafted, torch.stack(rows) if rows else None)


def drafted_tree(
    rule: Rule, head: Model, vocabulary: Tensor, tokens: Text, *, top_k: int, depth: int, size: int
) -> DraftTree:
    """As the engine grows a tree."""
    grower, paths, position = TreeGrower(top_k, depth, size), [tokens], len(tokens)
    while True:
        logits = torch.stack([head(path)[vocabulary] for path in paths])
        frontier = grower.grow(rule.candidate_scores(logits, vocabulary, [position] * len(paths)), vocabulary)
        if frontier is None:
            return grower.tree()
        paths = [(*paths[row], token) for row, token in zip(frontier.rows, frontier.tokens, strict=True)]
        position += 1
