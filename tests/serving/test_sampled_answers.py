"""The law of sampled answers of a real, very small model, drafted by a real head: chi-square against the exact law.

The law is enumerated with transformers and the definition of each processing. Every combination of rule, shape of
drafts and processing is drawn; EXACTNESS_SAMPLES=20000 in the environment gives each of them as many samples.
"""

import itertools
import math
import os
import random
from functools import cache
from typing import Any

import pytest
import torch
from conftest import make_tiny_head, make_tiny_target
from enumeration import Law, deviations_of

from draft.heads import DraftHead
from draft.target import Target
from serving.engine import Engine, SamplingParams, verification
from serving.engine.drafting import HeadProposer
from serving.engine.planner import Controller
from serving.engine.sampling import Processor
from serving.engine.verification import DraftTree

VOCAB, LENGTH, PROMPT = 5, 3, [1, 2]
SAMPLES = int(os.environ.get("EXACTNESS_SAMPLES", 500))

PENALISED = {"temperature": 0.9, "repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.7,
             "logit_bias": {3: 1.0, 0: -0.5}}  # fmt: skip
PROCESSING: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0},
    "truncated": {"temperature": 1.4, "top_k": 4, "top_p": 0.95, "min_p": 0.03},
    "penalised": PENALISED,
    "min tokens": {"temperature": 1.1, "min_new_tokens": 2, "stop_ids": (4,)},
}
SHAPES: dict[str, dict[str, Any]] = {
    "off": {"speculation": "off"},
    "chain": {"speculation": "chain", "speculation_length": 2},
    "tree": {"speculation": "tree", "speculation_length": 1, "tree_size": 3},
}


@cache
def small(architecture: str = "eagle3") -> tuple[Target, DraftHead]:
    """Three layers, so that there are three auxiliary states, and five tokens, one of which most heads lack."""
    widths = {"vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 8, "initializer_range": 0.8}
    layers = {"num_hidden_layers": 3, "num_attention_heads": 1, "num_key_value_heads": 1, "tie_word_embeddings": False}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    target = make_tiny_target(max_length=16, **widths, **layers, **ids)
    return target, make_tiny_head(target, draft_vocab_size=4, architecture=architecture)


@torch.inference_mode()
def exact_law(fields: dict[str, Any]) -> Law:
    """The joint law of the tokens, by walking through all answers: plain decoding, a row at a time."""
    target, _ = small()
    params = SamplingParams(LENGTH, ignore_eos=True, **fields)

    def walk(text: tuple[int, ...], weight: float) -> None:
        if len(text) == LENGTH or (text and text[-1] in params.stop_ids):
            law[text] = law.get(text, 0.0) + weight
            return
        processor = Processor(params, PROMPT, VOCAB)
        for token in text:
            processor.append(token)
        logits = target.model(torch.tensor([[*PROMPT, *text]])).logits[:, -1]
        for token, log_p in enumerate(processor.warp(processor.adjust(logits, [[]]))[0].tolist()):
            if log_p > -math.inf:
                walk((*text, token), weight * math.exp(log_p))

    law: Law = {}
    walk((), 1.0)
    assert sum(law.values()) == pytest.approx(1, abs=1e-12)
    return law


def draw(
    rule: str, shape: str, fields: dict[str, Any], samples: int = SAMPLES, architecture: str = "eagle3"
) -> tuple[list[tuple[int, ...]], int]:
    """Draw answers; returns them, and the number of drafted tokens in them."""
    target, head = small(architecture)
    engine = Engine(target, head, rule=rule, max_batch=128, prefill_chunk=256, **SHAPES[shape])
    each = [SamplingParams(LENGTH, ignore_eos=True, seed=seed, **fields) for seed in range(samples)]
    answers = engine.generate([PROMPT] * samples, each)
    return [tuple(a.token_ids) for a in answers], sum(a.stats.accepted for a in answers)


# rejection without drafts is shared noise without drafts
DRAFTED = list(itertools.product(("shared-noise", "rejection"), ("chain", "tree")))
CASES = [(*pair, "eagle3", name) for pair in [("shared-noise", "off"), *DRAFTED] for name in PROCESSING]
CASES += [("rejection", shape, head, "plain") for shape in ("chain", "tree") for head in ("eagle", "medusa")]


@pytest.mark.parametrize(("rule", "shape", "architecture", "processing"), CASES)
def test_sampled_answers_follow_the_law(rule, shape, architecture, processing):
    law = exact_law(PROCESSING[processing])
    seen, accepted = draw(rule, shape, PROCESSING[processing], architecture=architecture)
    assert deviations_of(seen, law) < 5
    assert (accepted > SAMPLES / 20) == (shape != "off")  # speculation took part
    # what a wrong law would look like: another temperature
    assert deviations_of(seen, exact_law({**PROCESSING[processing], "temperature": 0.6})) > 5


BROKEN = {
    "every draft is accepted": ("chain", "draft_acceptance", lambda p, q, token: 1.0),
    "siblings are not renormalised": ("tree", "without", lambda left, token: left),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_drawing_notices_a_broken_sampler(mistake, monkeypatch):
    shape, name, broken = BROKEN[mistake]
    monkeypatch.setattr(verification, name, broken)
    seen, _ = draw("rejection", shape, PROCESSING["plain"], 800)
    assert deviations_of(seen, exact_law(PROCESSING["plain"])) > 5


COIN = random.Random(3)
WIDTHS = {
    "a coin of its own": lambda tree: COIN.random() < 0.8,
    "the token that was drawn": lambda tree: float(tree.q[0, tree.tokens[0]]) >= 0.25,
}


@pytest.mark.parametrize("decides", WIDTHS)
def test_how_many_tokens_are_drafted_must_not_depend_on_the_noise_that_drew_them(decides, monkeypatch):
    """Drafts are withheld now and then: by what has no part in them, or where the draw was an unlikely one."""
    propose, widths = HeadProposer.propose, list[int]()

    def narrowed(self, jobs):
        trees = [tree if WIDTHS[decides](tree) else DraftTree() for tree in propose(self, jobs)]
        widths.extend(map(len, trees))
        return trees

    monkeypatch.setattr(HeadProposer, "propose", narrowed)
    monkeypatch.setattr(Controller, "observe_draft", lambda *_: None)  # which knows of no step without drafts
    fields = {"temperature": 0.7}
    seen, _ = draw("rejection", "chain", fields, 1500)
    assert 0.1 < widths.count(0) / len(widths) < 0.4
    deviation = deviations_of(seen, exact_law(fields))
    assert deviation > 5 if decides == "the token that was drawn" else deviation < 4
