"""The check of a head at the start, and the watch over its acceptance: in the engine, /info, /metrics and the log."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, make_tiny_head, make_tiny_target
from fastapi.testclient import TestClient
from http_testing import ask, idle, metric
from oracle import Fickle, all_free
from trained_heads import train_briefly

from draft.target import Target
from serving import cli
from serving.api.app import create_app
from serving.engine import Engine, SamplingParams, SpeculationStats
from serving.engine.estimates import DraftPlan
from serving.engine.heads import LoadedHead
from serving.engine.request import Verification
from serving.engine.self_check import WATCHED, AcceptanceWatch, SelfCheck, check_prompts

CONTEXT, LENGTH = 64, 3
CHAIN: dict[str, Any] = {"speculation": "chain"}


@pytest.fixture(scope="module")
def head(tiny_target: Target) -> Any:
    """A head that knows the target's answers to the built-in prompts nearly by heart."""
    prompts = check_prompts(tiny_target, CONTEXT // 2)
    answers = Engine(tiny_target, speculation="off").generate(prompts, SamplingParams(CONTEXT // 2, ignore_eos=True))
    ids = torch.tensor([prompt + answer.token_ids for prompt, answer in zip(prompts, answers, strict=True)])
    untrained = make_tiny_head(tiny_target, draft_vocab_size=258)
    return train_briefly(untrained, tiny_target, ids, draft_steps=LENGTH, rate=0.01, steps=150)


def engine_of(target: Target, head: Any, **options: Any) -> Engine:
    return Engine(target, head, **{"speculation_length": LENGTH, "mode": "eager", "max_length": CONTEXT, **options})


def default_of(engine: Engine) -> LoadedHead:
    assert engine.heads.default is not None
    return engine.heads.default


def decode(engine: Engine, rounds: int = 3) -> None:
    """Answer the built-in prompts again: at least 40 verifications a round, and 100 where nothing is accepted."""
    for _ in range(rounds):
        engine.generate(check_prompts(engine.target, CONTEXT // 2), SamplingParams(CONTEXT // 2, ignore_eos=True))


def shuffle_vocabulary(head: Any) -> None:
    order = torch.randperm(len(head.vocabulary), generator=torch.Generator().manual_seed(0))
    head.set_vocabulary(head.vocabulary[order])


def zero(head: Any) -> None:
    for weight in head.parameters():
        weight.zero_()


FAULTS: dict[str, Callable[[Any], Any]] = {
    "shuffled vocabulary": shuffle_vocabulary,
    "vocabulary off by one": lambda head: head.d2t.add_(1),
    "zeroed": zero,
    "states not read": lambda head: head.fc.weight.zero_(),
}


# at the start


def test_a_good_head_passes_and_leaves_no_trace(
    tiny_target: Target, head: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "serving")
    engine = engine_of(tiny_target, head)
    before = engine.stats()
    check = engine.self_check()
    assert check is not None and check.stats.acceptance_length > 2 and not check.failed
    assert check.stats.acceptance_length == check.stats.emitted / check.stats.verifications
    assert engine.watch.check is check and engine.watch.degraded is None
    [line] = caplog.records
    assert line.levelname == "INFO" and f"τ = {check.stats.acceptance_length:.2f}" in line.message
    assert engine.stats() == before and idle(engine)
    assert all_free(engine.proposer.runner.cache)  # type: ignore[union-attr]
    prompts = [[5, 6, 7], [9] * 12]
    expected = Engine(tiny_target, speculation="off").generate(prompts, SamplingParams(20, ignore_eos=True))
    answers = engine.generate(prompts, SamplingParams(20, ignore_eos=True))
    assert [each.token_ids for each in answers] == [each.token_ids for each in expected]


@pytest.mark.parametrize("fault", FAULTS)
@torch.no_grad()
def test_a_head_that_does_not_fit_is_warned_of(
    tiny_target: Target, head: Any, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    broken = copy.deepcopy(head)
    FAULTS[fault](broken)
    engine = engine_of(tiny_target, broken, max_batch=2)
    check = engine.self_check()
    assert check is not None and check.failed and check.stats.acceptance_length < 1.2
    [line] = caplog.records
    assert line.levelname == "WARNING" and "auxiliary layers" in line.message and "d2t" in line.message
    assert engine.watch.degraded == check.reason


def test_another_targets_head_and_a_head_with_other_layers(tiny_target: Target, head: Any) -> None:
    other = engine_of(make_tiny_target(seed=5), head).self_check()
    assert other is not None and other.failed
    shifted = copy.deepcopy(head)
    shifted.config.auxiliary_layers = [1, 3, 4]  # in the place of 2, 4, 5
    check, good = (engine_of(tiny_target, each).self_check() for each in (shifted, head))
    assert check is not None and good is not None
    assert check.stats.acceptance_length < 0.7 * good.stats.acceptance_length


@pytest.mark.parametrize("architecture", ["eagle", "medusa"])
@pytest.mark.parametrize("speculation", ["auto", "tree"])
def test_it_checks_heads_of_every_kind_in_every_mode(tiny_target: Target, architecture: str, speculation: str) -> None:
    options = {"num_heads": 2} if architecture == "medusa" else {}
    engine = engine_of(
        tiny_target, make_tiny_head(tiny_target, architecture=architecture, **options), speculation=speculation
    )
    check = engine.self_check()
    assert check is not None and check.enough
    assert len(check.acceptance_per_position) == (2 if architecture == "medusa" else LENGTH)


def test_it_is_skipped_where_nothing_is_drafted(tiny_target: Target, head: Any) -> None:
    for engine in (Engine(tiny_target), Engine(tiny_target, head, speculation="off")):
        assert engine.self_check() is None and engine.watch.check is None


def test_targets_without_a_template_short_contexts_and_answers_that_end_at_once(head: Any) -> None:
    target = make_tiny_target()
    target.tokenizer = byte_tokenizer()
    for template in (None, "{{ raise_exception('no') }}", "{{ messages[0]['content'] + 1 }}"):
        target.tokenizer.chat_template = template
        assert all(len(ids) == 20 for ids in check_prompts(target, 20))
    target.__dict__["eos_token_ids"] = frozenset(range(target.vocab_size))
    check = engine_of(target, head).self_check()
    assert check is not None and check.enough
    assert engine_of(target, head, max_length=2).self_check() is not None


def test_slow_engines_are_judged_by_what_they_have_done(
    tiny_target: Target, head: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("serving.engine.engine.MAX_SECONDS", -1.0)
    caplog.set_level(logging.INFO, "serving")
    engine = engine_of(tiny_target, head)
    check = engine.self_check()
    assert check is not None and not check.enough and not check.failed and idle(engine)
    assert engine.watch.degraded is None and "too few" in caplog.text


# while it runs


@torch.no_grad()
def test_a_running_engine_notices_a_break_and_its_end(
    tiny_target: Target, head: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "serving")
    changing = copy.deepcopy(head)
    engine = engine_of(tiny_target, changing, **CHAIN)
    engine.self_check()
    decode(engine, 6)
    assert engine.watch.degraded is None
    changing.fc.weight.zero_()
    decode(engine)
    reason = engine.watch.degraded
    assert reason is not None and "% of the drafted tokens" in reason
    zero(changing)
    decode(engine, 4)
    assert engine.watch.degraded == reason  # one episode
    changing.load_state_dict(head.state_dict())
    decode(engine, 12)
    assert engine.watch.degraded is None
    assert [line.levelname for line in caplog.records] == ["INFO", "WARNING", "INFO"]


def test_acceptance_that_stays_at_zero_is_noticed_without_a_self_check(tiny_target: Target, head: Any) -> None:
    broken = copy.deepcopy(head)
    with torch.no_grad():
        zero(broken)
    engine = engine_of(tiny_target, broken, **CHAIN)
    assert engine.watch.degraded is None
    decode(engine)
    assert (
        engine.watch.degraded is not None and "no drafted token was accepted in the last 200" in engine.watch.degraded
    )


def seen(depths: list[tuple[int, int]], watch: AcceptanceWatch, *, samples: bool = False) -> bool:
    for _ in range(200):
        for depth, accepted in depths:
            watch.observe(depth, accepted, samples=samples)
    return watch.is_degraded


def test_short_chains_are_compared_with_short_chains() -> None:
    # positions 1 to 3 are accepted in 80, 60 and 40 % of 20 verifications
    check = SelfCheck(
        SpeculationStats(
            60, 56, [Verification(3, n) for n, count in ((3, 8), (2, 4), (1, 4), (0, 4)) for _ in range(count)]
        )
    )
    assert check.acceptance_per_position == [0.8, 0.6, 0.4] and check.expected(3) == pytest.approx(1.8)
    assert not seen([(1, 1), (1, 1), (1, 0), (1, 0)], AcceptanceWatch(check))  # 50 of 80 %
    assert seen([(1, 1), (1, 0), (1, 0), (1, 0)], AcceptanceWatch(check))
    assert not seen([(3, 1)], AcceptanceWatch(check))
    assert seen([(3, 2), (3, 0), (3, 0)], AcceptanceWatch(check))
    assert not seen([(0, 0)], AcceptanceWatch(check))  # plain decoding
    assert not seen([(48, 40)], AcceptanceWatch(check))  # of another server, which drafts more than ours
    # of samples 1.2 of 3 are expected, where greedy answers have 1.8
    assert not seen([(3, 2), (3, 0), (3, 0)], AcceptanceWatch(check), samples=True)
    assert seen([(3, 1), (3, 1), (3, 0), (3, 0)], AcceptanceWatch(check), samples=True)


@pytest.mark.parametrize("broken", [False, True])
def test_copies_do_not_count_as_the_heads_whatever_becomes_of_them(
    tiny_target: Target, head: Any, broken: bool
) -> None:
    """Plans change at every step; copies are all wrong, or beside a head that is wrong."""
    engine = engine_of(tiny_target, copy.deepcopy(head), max_batch=1)
    if broken:
        with torch.no_grad():
            zero(engine.head)
    engine.controller = engine._decoder.controller = Fickle([DraftPlan(n, n, m) for n in (0, 2) for m in (0, 4)], 1)
    counted: list[tuple[int, int]] = []

    class Watch(AcceptanceWatch):
        def observe(self, depth: int, accepted: int, *, samples: bool = False) -> None:
            counted.append((depth, accepted))
            super().observe(depth, accepted, samples=samples)

    everything = SelfCheck(SpeculationStats(60, 80, [Verification(3, 3)] * 20))  # all were accepted
    default_of(engine).watch = Watch(everything)
    copies = 0
    for prompt in check_prompts(tiny_target, CONTEXT // 2) * 8:
        counted.clear()
        stats = engine.generate([prompt], SamplingParams(CONTEXT // 2, ignore_eos=True))[0].stats
        heads = [step for step in stats.steps if step.depth > step.copied]
        own = [(step.depth - step.copied, step.accepted - step.accepted_copies) for step in heads]
        assert counted in (own, own[:-1])  # the answer may have ended within the last
        copies += sum(step.copied for step in stats.steps)
    assert copies > 100
    assert engine.watch.is_degraded is broken


def test_few_verifications_and_a_single_hit_change_nothing() -> None:
    watch = AcceptanceWatch()
    for _ in range(WATCHED - 1):
        watch.observe(5, 0)
    assert watch.degraded is None
    watch.observe(5, 0)
    assert watch.degraded is not None
    for _ in range(10):
        watch.observe(5, 1)
    assert watch.degraded is not None
    trees = AcceptanceWatch()
    for accepted in [5] * 1000 + [0] * WATCHED:
        trees.observe(5, accepted)
    assert trees.degraded is not None
    trees.observe(5, 1)
    assert trees.degraded is not None  # what was accepted before the break does not end it


# what others see of it


@pytest.mark.parametrize("prefix", ["draftsmith", "vllm"])
def test_info_and_metrics(tiny_target: Target, head: Any, prefix: str) -> None:
    labels = '{engine="0",model_name="tiny"}' if prefix == "vllm" else ""
    engine = engine_of(tiny_target, copy.deepcopy(head), **CHAIN)
    check = engine.self_check()
    assert check is not None
    with TestClient(create_app(engine, metrics_prefix=prefix)) as client:

        def read(name: str) -> float:
            return metric(client, name + labels, prefix)

        about = client.get("/info").json()["head"]
        assert about["self_check"]["tau"] == check.stats.acceptance_length == read("speculation_self_check_tau")
        assert about["self_check"]["verifications"] == check.stats.verifications
        assert about["degraded"] is None and read("speculation_degraded") == 0
        assert read("spec_decode_num_drafts_total") == read("generation_tokens_total") == 0
        with torch.no_grad():
            zero(engine.head)
        for _ in range(8):
            ask(client, "abc", max_new_tokens=50)
        assert read("speculation_degraded") == 1
        assert client.get("/info").json()["head"]["degraded"] == engine.watch.degraded


def test_requests_that_sample_wildly_are_not_judged(tiny_target: Target, head: Any) -> None:
    broken = copy.deepcopy(head)
    with torch.no_grad():
        zero(broken)
    engine = engine_of(tiny_target, broken, **CHAIN)
    everything = SelfCheck(SpeculationStats(60, 80, [Verification(3, 3)] * 20))  # all were accepted
    default_of(engine).watch = AcceptanceWatch(everything)
    for temperature, degraded in ((1.5, False), (1.0, True)):
        engine.generate([[5, 6]] * 8, SamplingParams(50, temperature=temperature, top_k=1, seed=1, ignore_eos=True))
        assert engine.watch.is_degraded is degraded


def test_the_servers_option(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = ["--target", str(folders / "my-target"), "--head", str(folders / "my-head"), "--dtype", "float64"]
    monkeypatch.setattr(cli, "serve_until_stopped", lambda app, load, *_: loaded.append(load()))
    loaded: list[Engine] = []
    for words in ([], ["--no-self-check"]):
        monkeypatch.setattr(sys, "argv", ["draft-serve", "--port", "0", "--no-warm-up", *models, *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
    assert loaded[0].watch.check is not None and loaded[1].watch.check is None
