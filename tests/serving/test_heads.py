"""Several draft heads in one engine: loaded, chosen, swapped, rolled back and removed while requests run."""

from __future__ import annotations

import copy
import gc
import itertools
import logging
import random
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_head, make_tiny_target, save_target
from oracle import CHAINS, COPIES, Fickle, all_free
from trained_heads import train_briefly

from draft.errors import UserError
from draft.heads import checkpoint
from draft.heads.checkpoint import head_sha256, load_unchanged_head, save_head
from draft.target import Target
from serving import cli
from serving.engine import Engine, Request, SamplingParams, Speculation
from serving.engine.drafting import HeadProposer
from serving.engine.estimates import DraftPlan, HeadEstimate, RequestEstimate
from serving.engine.heads import HeadConflict, UnknownHead
from serving.engine.planner import Controller, Fixed
from serving.engine.routing import EXPLORATION, KINDS, PREFIX, Router
from serving.engine.self_check import NEW_TOKENS, check_prompts
from serving.engine.trial import ANSWERS, EARLY_ANSWERS, EARLY_VERIFICATIONS, KNOWN, VERIFICATIONS, Survival
from serving.engine.verification import DraftTree

ARCHITECTURES = ("eagle3", "eagle", "medusa")
LENGTH, CONTEXT = 3, 96
PROMPTS = [[7], list(range(90, 107)), list(range(3, 40)), [5, 6, 7, 8] * 6]
_PLAIN: dict[Any, list[int]] = {}  # all targets here write the same
SAMPLINGS: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 20}]


@pytest.fixture(scope="module")
def target() -> Target:
    return make_tiny_target(max_length=CONTEXT)


@pytest.fixture(scope="module")
def good(target: Target) -> Any:
    """A head that knows the target's answers to the built-in prompts nearly by heart."""
    prompts = check_prompts(target, CONTEXT - NEW_TOKENS)
    answers = Engine(target, speculation="off").generate(prompts, SamplingParams(NEW_TOKENS, ignore_eos=True))
    texts = [prompt + answer.token_ids for prompt, answer in zip(prompts, answers, strict=True)]
    ids = torch.tensor([text[: min(map(len, texts))] for text in texts])
    head = make_tiny_head(target, draft_vocab_size=258)
    return train_briefly(head, target, ids, draft_steps=LENGTH, rate=0.01, steps=100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, target: Target, good: Any) -> Path:
    """Folders of heads: one that is good, and a random one of each architecture."""
    folder, about = tmp_path_factory.mktemp("heads"), {"target_fingerprint": target.fingerprint}
    save_head(good, folder / "good", dtype=torch.float64, about=about)
    for name in ARCHITECTURES:
        options = {"num_heads": 2} if name == "medusa" else {}
        save_head(make_tiny_head(target, architecture=name, **options), folder / name, dtype=torch.float64, about=about)
    return folder


def heads_of(target: Target) -> dict[str, Any]:
    return {name: make_tiny_head(target, seed=place, architecture=name) for place, name in enumerate(ARCHITECTURES)}


def engine_of(target: Target, heads: Any, **options: Any) -> Engine:
    options = {"speculation": "chain", "speculation_length": LENGTH, "mode": "eager", "max_batch": 4, **options}
    engine = Engine(target, heads, **options)
    engine.checks_heads = False
    return engine


def params(count: int = 30, **fields: Any) -> SamplingParams:
    return SamplingParams(count, **{"ignore_eos": True, **fields})


def each_request() -> list[tuple[list[int], SamplingParams]]:
    return [
        (prompt, params(20 + place, seed=place, **sampling))
        for place, (prompt, sampling) in enumerate(itertools.product(PROMPTS, SAMPLINGS))
    ]


def plain(target: Target, requests: Sequence[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    """The answers without speculation, one after the other."""
    engine = Engine(target, speculation="off", max_batch=1, mode="eager")
    for prompt, each in requests:
        if (key := (tuple(prompt), each)) not in _PLAIN:
            _PLAIN[key] = engine.generate([prompt], each)[0].token_ids
    return [_PLAIN[tuple(prompt), each] for prompt, each in requests]


def finish(engine: Engine) -> None:
    while engine.step():
        pass


def decode(engine: Engine, rounds: int = 1, **speculation: Any) -> None:
    """Answer the built-in prompts: some 40 verifications with drafts a round, 120 where nothing is accepted."""
    prompts = check_prompts(engine.target, CONTEXT - NEW_TOKENS)
    for _ in range(rounds):
        engine.generate(prompts, params(NEW_TOKENS), Speculation(**speculation))


@torch.no_grad()
def shuffle(head: Any) -> None:
    """Corrupt a head in place: its weights are those of another place each."""
    for index, weight in enumerate(head.parameters()):
        order = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(index))
        weight.copy_(weight.flatten()[order].view_as(weight))


# one batch


@pytest.mark.parametrize("speculation", ["chain", "tree", "auto"])
def test_requests_with_different_heads_share_the_targets_passes(target: Target, speculation: str) -> None:
    """Heads of every architecture, whose states are of different layers; each request is drafted for by its own."""
    engine = engine_of(target, heads_of(target), speculation=speculation, max_batch=12)
    if speculation == "auto":
        engine.controller = engine._decoder.controller = Fickle([*CHAINS, *COPIES], 3)
    requests, names = each_request(), itertools.cycle((*ARCHITECTURES, None))
    passes: list[int] = []
    forward = engine.models.runner.forward
    engine.models.runner.forward = lambda batch: passes.append(len(batch.segments)) or forward(batch)  # type: ignore
    submitted = [
        engine.submit(prompt, each, Speculation(head=name))
        for (prompt, each), name in zip(requests, names, strict=False)
    ]
    finish(engine)
    answers = [request.result(0) for request in submitted]
    assert [answer.token_ids for answer in answers] == plain(target, requests)
    assert max(passes) == len(requests) and len(passes) < 60  # one pass a step for all of them
    drafted = [answer.stats.head for answer in answers]
    assert drafted == [name or "eagle3" for name, _ in zip(names, requests, strict=False)] or set(drafted) == {
        *ARCHITECTURES
    }
    for head in engine.heads:
        own = [answer.stats for answer in answers if answer.stats.head == head.name]
        counts = [stats.by_source["head"] for stats in own]
        assert head.requests == len(own) > 0
        assert head.drafted == sum(each["drafted"] for each in counts) > 0
        assert head.accepted == sum(each["accepted"] for each in counts)
        assert not isinstance(head.proposer, HeadProposer) or all_free(head.proposer.runner.cache)


def test_each_head_reads_the_states_of_its_own_layers(target: Target, good: Any) -> None:
    """A head is accepted as often beside others as alone."""
    alone = engine_of(target, {"good": good})
    beside = engine_of(target, {**heads_of(target), "good": good})
    assert beside.models.runner.layers == (2, 4, 5, target.output_layer)
    taus = []
    for engine in (alone, beside):
        decode(engine, head="good")
        taus.append(engine.heads["good"].acceptance_length)
    assert taus[0] == taus[1] > 2


# swaps


def swaps(engine: Engine, folder: Path, seed: int) -> Iterator[None]:
    """Load, remove and choose heads at random, between steps."""
    pick, number = random.Random(seed), itertools.count()
    while True:
        names = [head.name for head in engine.heads]
        others = [name for name in names if name != engine.heads.default_name]
        match pick.choice(("load", "remove", "default", "nothing")):
            case "load" if len(names) < 5:
                engine.load_head(f"more-{next(number)}", folder / pick.choice(ARCHITECTURES))
            case "remove" if others:
                engine.unload_head(pick.choice(others))
            case "default":
                engine.make_default_head(pick.choice(names))
        yield


@pytest.mark.parametrize(("speculation", "route"), [("chain", "default"), ("tree", "auto"), ("auto", "default")])
def test_swaps_in_mid_answer_change_no_text(target: Target, folder: Path, speculation: str, route: str) -> None:
    """And a storm of cancellations between them leaves no slot behind."""
    engine = engine_of(target, heads_of(target), speculation=speculation, route=route, prefill_chunk=8)
    if speculation == "auto":
        engine.controller = engine._decoder.controller = Fickle([*CHAINS, *COPIES], 5)
    requests, pick = each_request(), random.Random(1)
    swap, stays, leaves = swaps(engine, folder, 2), list[Request](), list[Request]()
    for prompt, each in requests:
        names = [None, *(head.name for head in engine.heads)]
        stays.append(engine.submit(prompt, each, Speculation(head=pick.choice(names))))
        leaves.append(engine.submit(prompt, params(50), Speculation(head=pick.choice(names))))
        for _ in range(pick.randrange(9)):
            next(swap)
            engine.step()
            pick.choice(leaves).cancel()
    for request in leaves:
        request.cancel()
    while engine.step():
        next(swap)
    assert [request.result(0).token_ids for request in stays] == plain(target, requests)
    assert all_free(engine.models.runner.cache)
    for head in engine.heads:
        assert not isinstance(head.proposer, HeadProposer) or all_free(head.proposer.runner.cache)
    kinds = [event["kind"] for event in engine.heads.events]
    assert {"loaded", "default", "unloaded"} <= {*kinds} and engine.heads.swaps > 0


def test_a_running_request_keeps_its_head_and_new_ones_get_the_default(target: Target) -> None:
    engine = engine_of(target, heads_of(target))
    first = engine.submit([50], params(40))
    engine.step()
    assert engine.make_default_head("eagle") == "eagle3"
    second, third = engine.submit([51], params(40)), engine.submit([52], params(40), Speculation(head="eagle3"))
    finish(engine)
    assert [each.result(0).stats.head for each in (first, second, third)] == ["eagle3", "eagle", "eagle3"]
    assert engine.make_default_head("eagle") == "eagle"  # nothing to do
    assert engine.heads.swaps == 1


def test_a_request_whose_head_is_removed_is_decoded_on_without_it(target: Target) -> None:
    engine = engine_of(target, heads_of(target))
    request = engine.submit([50], params(60), Speculation(head="eagle"))
    waiting = [engine.submit([51 + place], params(60)) for place in range(3)]
    late = engine.submit([60], params(20), Speculation(head="eagle"))  # waits, and gets the default then
    for _ in range(6):
        engine.step()
    stats = engine._active[0].stats
    before = stats.drafted
    engine.unload_head("eagle")
    finish(engine)
    assert stats.drafted == before > 0 and stats.head == "eagle" and late.result(0).stats.head == "eagle3"
    prompts = [([prompt], params(60)) for prompt in (50, 51, 52, 53)]
    answers = [each.result(0).token_ids for each in (request, *waiting)]
    assert answers == plain(target, prompts)
    assert engine.models.runner.layers == (2, 4, 5, target.output_layer)
    engine.unload_head("medusa")
    assert engine.models.runner.layers == (2, 4, 5)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_the_memory_of_a_removed_head_is_freed(tmp_path: Path, mode: str) -> None:
    target = make_tiny_target(dtype=torch.float32, max_length=CONTEXT)
    save_head(make_tiny_head(target, seed=3), tmp_path / "new", dtype=torch.float32, about={})
    engine = engine_of(target, make_tiny_head(target), mode=mode)
    loaded = engine.load_head("new", tmp_path / "new", default=True)
    for _ in range(2):
        engine.submit([50], params(40), Speculation(head="new"))
    for _ in range(8):
        engine.step()
    assert loaded.verifications and isinstance(loaded.proposer, HeadProposer)
    cache = loaded.proposer.runner.cache
    held = [loaded, loaded.head, *loaded.head.parameters(), *loaded.head.buffers(), *cache._stacks, cache]
    kept = [weakref.ref(each) for each in held]
    del loaded, cache, held
    gc.disable()  # or a collection at this moment would hide what only that frees
    try:
        engine.make_default_head("head")
        engine.unload_head("new")
        assert [each() for each in kept if each() is not None] == []
    finally:
        gc.enable()
    finish(engine)


# loading


def test_a_head_is_loaded_beside_requests_once_it_has_checked_itself(
    target: Target, folder: Path, good: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "serving")
    engine = engine_of(target, make_tiny_head(target), max_batch=2)
    engine.checks_heads = True
    engine.start()
    try:
        running = [engine.submit([50 + place], params(60)) for place in range(4)]
        loaded = engine.load_head("good", folder / "good", default=True)
        assert loaded.watch.check is not None and loaded.watch.check.stats.acceptance_length > 2
        assert loaded.head.fingerprint == head_sha256(folder / "good")
        assert (loaded.requests, loaded.verifications) == (0, 0)  # the check's are no traffic
        answers = [request.result(60) for request in running]
        assert engine.submit([60], params(5)).result(60).stats.head == "good"
    finally:
        engine.close()
    assert [answer.token_ids for answer in answers] == plain(target, [([50 + n], params(60)) for n in range(4)])
    assert {answer.stats.head for answer in answers[:2]} == {"head"}
    assert "self-check of draft head 'good': τ = " in caplog.text
    assert [event["kind"] for event in engine.heads.events] == ["loaded", "loaded", "default"]


def test_a_self_check_beside_requests_is_no_figure_of_theirs(target: Target, folder: Path, good: Any) -> None:
    """Not of the planner's, either: the built-in prompts are not the traffic."""
    engine = engine_of(target, good, speculation="auto", lookup=False)
    engine.submit([50], params(80), Speculation(enabled=False))
    engine.step()
    engine.checks_heads = True
    before = engine.stats()["speculation"]
    loaded = engine.load_head("other", folder / "good")
    assert loaded.watch.check is not None and loaded.watch.check.enough
    after = engine.stats()["speculation"]
    assert {**after["steps"], "off": 0} == {**before["steps"], "off": 0}
    for name in ("acceptance", "confidence", "draft_step_seconds", "catch_up_seconds", "target_seconds", "probes"):
        assert after[name] == before[name], name
    assert loaded.estimate.acceptance.rate(0, 0) == HeadEstimate().acceptance.rate(0, 0)
    finish(engine)


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda folder: shutil.rmtree(folder), "no config.json there"),
    "half a file": (lambda folder: damage(folder / "model.safetensors"), "not a whole safetensors file"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "is missing"),
    "another target": (
        lambda folder: (folder / "draftsmith.json").write_text('{"target_fingerprint": "0123"}'),
        "made for target 0123",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_head_of_this_target_is_refused(target: Target, folder: Path, tmp_path: Path, what: str) -> None:
    engine = engine_of(target, make_tiny_head(target))
    shutil.copytree(folder / "good", tmp_path / "bad")
    REFUSED[what][0](tmp_path / "bad")
    with pytest.raises(UserError, match=REFUSED[what][1]):
        engine.load_head("bad", tmp_path / "bad")
    assert [head.name for head in engine.heads] == ["head"]
    decode(engine)


def test_a_head_that_fails_its_check_is_refused_and_leaves_nothing(
    target: Target, folder: Path, tmp_path: Path, good: Any
) -> None:
    broken = copy.deepcopy(good)
    shuffle(broken)
    save_head(broken, tmp_path / "broken", dtype=torch.float64, about={})
    engine = engine_of(target, make_tiny_head(target, architecture="medusa"))
    engine.checks_heads = True
    with pytest.raises(UserError, match="fails its self-check"):
        engine.load_head("broken", tmp_path / "broken", default=True)
    assert engine.heads.default_name == "head" and len(engine.heads) == 1
    assert engine.models.runner.layers == (target.output_layer,) and all_free(engine.models.runner.cache)


def test_names_and_memory(target: Target, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(target, {"base": make_tiny_head(target)}, max_batch=64)
    with pytest.raises(HeadConflict, match="'base' is loaded already"):
        engine.load_head("base", folder / "good")
    with pytest.raises(HeadConflict, match="'base' is the default"):
        engine.unload_head("base")
    for change in (engine.unload_head, engine.make_default_head):
        with pytest.raises(UnknownHead, match="no head 'gone' is loaded; the loaded ones: base"):
            change("gone")
    with pytest.raises(UserError, match="'gone' is loaded; the loaded ones: base"):
        engine.submit([50], params(), Speculation(head="gone"))
    for name in ("", "a/b", "a=b", "..", "x" * 65, "a\nb"):
        with pytest.raises(UserError, match="1 to 64 printable"):
            engine.load_head(name, folder / "good")
    size = (folder / "good" / "model.safetensors").stat().st_size
    promised = engine.models.runner.cache.promised_bytes + engine.heads["base"].proposer.runner.cache.promised_bytes  # type: ignore[union-attr]
    assert promised == engine.models.runner.cache.nbytes + engine.heads["base"].proposer.runner.cache.nbytes  # type: ignore[union-attr]
    for free, words in ((2 * size - 1, "weights of the head"), (2 * size, "KV cache of the head")):
        monkeypatch.setattr("serving.engine.memory.free_memory", lambda device, free=free: promised + free)
        with pytest.raises(UserError, match=f"the {words} takes .*B, and .* kB are free on cpu beside"):
            engine.load_head("new", folder / "good")
    monkeypatch.undo()
    for options in ({"speculation": "off"}, {"speculation_length": 0}):
        with pytest.raises(UserError, match="never drafts"):
            engine_of(target, None, **options).load_head("new", folder / "good")


def test_a_server_without_a_head_takes_one(target: Target, folder: Path) -> None:
    engine = engine_of(target, None, lookup=False)
    assert (engine.head_length, engine.longest_draft, engine.head) == (0, 0, None)
    engine.load_head("medusa", folder / "medusa")
    assert (engine.head_length, engine.heads.default_name) == (2, "medusa")
    engine.load_head("good", folder / "good", default=True)
    assert (engine.head_length, engine.longest_draft) == (LENGTH, LENGTH)
    (answer,) = engine.generate([[50]], params(30))
    assert answer.stats.head == "good" and answer.stats.drafted > 0


@pytest.mark.parametrize("whole", [True, False])
def test_a_folder_that_changes_while_it_is_loaded_gives_no_torn_head(
    target: Target, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """Its weights are replaced after its configuration was read, by others or by half of them."""
    shutil.copytree(folder / "good", tmp_path / "head")
    inner = checkpoint.read_tensors

    def replaced(path: Path) -> Any:
        if whole:
            shutil.copy(folder / "eagle3" / "model.safetensors", path)
            shutil.copy(folder / "eagle3" / "config.json", path.parent)
        else:
            damage(path)
        return inner(path)

    monkeypatch.setattr(checkpoint, "read_tensors", replaced)
    with pytest.raises(UserError, match="files changed while they were read"):
        load_unchanged_head(tmp_path / "head", target)
    monkeypatch.undo()
    if whole:
        loaded = load_unchanged_head(tmp_path / "head", target)
        assert loaded.fingerprint == head_sha256(folder / "eagle3") != head_sha256(folder / "good")


def test_the_servers_options(folder: Path, tmp_path: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    save_target(tmp_path / "target", target)
    monkeypatch.setattr(cli, "serve_until_stopped", lambda app, load, *_: loaded.append(load()))
    loaded: list[Engine] = []
    words = ["--target", str(tmp_path / "target"), "--dtype", "float64", "--port", "0", "--no-warm-up"]
    words += ["--no-self-check", "--head", str(folder / "eagle"), "--head", f"other={folder / 'good'}"]
    monkeypatch.setattr(sys, "argv", ["draft-serve", *words, "--route", "auto"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    [engine] = loaded
    assert [head.name for head in engine.heads] == ["eagle", "other"] and engine.heads.default_name == "eagle"
    assert engine.heads.route == "auto" and not engine.checks_heads
    assert engine.heads["other"].head.fingerprint == head_sha256(folder / "good")


# trials


@pytest.fixture
def short_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real numbers are tested without an engine."""
    for name, value in (("VERIFICATIONS", 100), ("EARLY_VERIFICATIONS", 32), ("KNOWN", 20)):
        monkeypatch.setattr(f"serving.engine.trial.{name}", value)


def traffic(engine: Engine, rounds: int) -> None:
    """Greedy and sampled."""
    for place in range(rounds):
        decode(engine)
        engine.generate(check_prompts(engine.target, 20), params(16, temperature=1.0, seed=place))


@pytest.mark.usefixtures("short_trials")
@pytest.mark.parametrize("known", ["live figures", "self-check", "nothing"])
def test_a_head_that_is_corrupted_after_its_check_is_rolled_back(
    target: Target, folder: Path, good: Any, known: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The field's failure: drafts of a head that was updated are no longer accepted, and nothing else fails."""
    caplog.set_level(logging.INFO, "serving")
    engine = engine_of(target, {"old": good})
    engine.checks_heads = known == "self-check"
    if known == "self-check":
        engine.self_check()
    elif known == "live figures":
        traffic(engine, 1)
    new = engine.load_head("new", folder / "good", default=True)
    shuffle(new.head)
    request = engine.submit([50], params(60))
    for _ in range(3):
        engine.step()
    traffic(engine, 1)
    assert engine.heads.default_name == "old" and engine.heads.trial is None
    assert (engine.heads.swaps, engine.heads.rollbacks) == (1, 1)
    event = engine.heads.events[-1]
    assert (event["kind"], event["head"]) == ("rolled back", "new") and "'old'" in event["reason"]
    [warning] = [line for line in caplog.records if "rolled back" in line.message]
    assert warning.levelname == "WARNING" and warning.message.startswith("draft head 'new' is rolled back to 'old': ")
    assert "new" in engine.heads and request.result(0).stats.head == "new"
    [expected] = plain(target, [([50], params(60))])
    assert request.result(0).token_ids == expected


@pytest.mark.usefixtures("short_trials")
def test_a_corrupted_head_is_rolled_back_though_the_planner_hardly_uses_it(target: Target, good: Any) -> None:
    """In automatic mode it drafts in probes only, once it is known to be rejected."""
    engine = engine_of(target, {"old": good, "new": copy.deepcopy(good)}, speculation="auto", lookup=False)
    observe = engine.controller.observe_target  # of passes whose width costs little, on any machine

    def observe_cheap(tokens: int, seconds: float, *, ignore: bool = False) -> None:
        observe(tokens, 1.0 + 0.001 * tokens, ignore=ignore)

    engine.controller.observe_target = observe_cheap  # type: ignore[method-assign]
    traffic(engine, 1)
    engine.make_default_head("new")
    shuffle(engine.heads["new"].head)
    for _ in range(80):
        decode(engine)
        if engine.heads.rollbacks:
            break
    assert engine.heads.default_name == "old"


@pytest.mark.usefixtures("short_trials")
def test_a_head_that_is_as_good_proves_itself(target: Target, good: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "serving")
    engine = engine_of(target, {"old": good, "new": copy.deepcopy(good)})
    traffic(engine, 2)
    engine.make_default_head("new")
    assert engine.heads.trial is not None
    traffic(engine, 2)
    assert engine.heads.trial is None and engine.heads.rollbacks == 0
    assert engine.heads.default_name == "new" and "'new' has proven itself beside 'old'" in caplog.text


@pytest.mark.usefixtures("short_trials")
def test_who_names_a_head_decides_no_trial_and_teaches_no_route(target: Target, good: Any) -> None:
    engine = engine_of(target, {"old": good, "new": copy.deepcopy(good)}, route="auto")
    engine.make_default_head("new")
    shuffle(engine.heads["new"].head)
    decode(engine, 2, head="new")
    assert engine.heads["new"].verifications > 200 and engine.heads.default_name == "new"
    assert engine.heads.router is not None and engine.heads.router.routed == 0 and not engine.heads.router._overall


def test_what_a_trial_comes_back_to(target: Target) -> None:
    """The last head that has proven itself, as long as it is there."""
    heads = {name: make_tiny_head(target, seed=place) for place, name in enumerate("abcd")}
    engine = engine_of(target, heads)

    def previous() -> str | None:
        trial = engine.heads.trial
        return trial.previous.name if trial is not None else None

    for name, expected in (("b", "a"), ("c", "a"), ("a", None), ("d", "a")):
        engine.make_default_head(name)
        assert previous() == expected
    engine.unload_head("b")
    assert previous() == "a"
    engine.unload_head("a")
    assert previous() is None and engine.heads.default_name == "d"
    decode(engine)
    assert engine.heads.default_name == "d"


def trial_of(
    old: Sequence[tuple[int, int]], new: Sequence[tuple[int, int]], answers: int, rounds: int, **options: Any
) -> str:
    """The end of a trial with repeated (planned, accepted) verifications; options: of the old head."""
    target = make_tiny_target(max_length=CONTEXT)
    heads = engine_of(target, {"old": make_tiny_head(target, **options), "new": make_tiny_head(target, seed=1)}).heads
    requests = [Request([5], params(), Speculation()) for _ in range(answers)]
    for _ in range(KNOWN):
        for planned, accepted in old:
            heads.judge(heads["old"], requests[0], planned, planned, accepted, samples=False)
    heads.make_default("new")
    for place in range(rounds):
        planned, accepted = new[place % len(new)]
        heads.judge(heads["new"], requests[place % answers], planned, planned, accepted, samples=False)
    return "rolled back" if heads.rollbacks else "on trial" if heads.trial is not None else "proven"


def test_the_margin_of_a_trial() -> None:
    many, few = VERIFICATIONS, EARLY_VERIFICATIONS
    old = [(3, 3), (3, 2), (3, 1), (3, 0), (3, 2)]  # 1.6 of 3
    assert trial_of(old, old, ANSWERS, many - 1) == "on trial"
    assert trial_of(old, old, ANSWERS, many) == "proven"
    assert trial_of(old, [(3, 2), (3, 1), (3, 1)], ANSWERS, many) == "proven"  # 1.33
    assert trial_of(old, [(3, 1), (3, 1), (3, 1), (3, 2)], ANSWERS, many) == "rolled back"  # 1.25
    assert trial_of(old, [(3, 1), (3, 1), (3, 1), (3, 2)], ANSWERS, many - 1) == "on trial"
    assert trial_of(old, [(3, 1), (3, 0)], EARLY_ANSWERS, few) == "rolled back"
    assert trial_of(old, [(3, 1), (3, 0)], EARLY_ANSWERS, few - 1) == "on trial"
    assert trial_of(old, [(3, 1), (3, 0)], EARLY_ANSWERS - 1, many) == "on trial"  # one odd answer decides nothing
    # plans of one token are compared with the first token of longer ones, of which 4/5 were accepted
    assert trial_of(old, [(1, 1), (1, 1), (1, 1), (1, 0)], ANSWERS, many) == "proven"
    assert trial_of(old, [(1, 1), (1, 0)], ANSWERS, many) == "rolled back"
    # the old head drafts one token in a row at most, of which it had 0.9 accepted
    short: dict[str, Any] = {"architecture": "medusa", "num_heads": 1}
    nearly = [(1, 1)] * 9 + [(1, 0)]
    assert trial_of(nearly, [(3, 1), (3, 0), (3, 1)], ANSWERS, many, **short) == "rolled back"  # 0.67
    assert trial_of(nearly, [(3, 1), (3, 0), (3, 2)], ANSWERS, many, **short) == "proven"


def test_a_head_that_ends_its_chains_early_is_compared_by_what_was_planned() -> None:
    survival = Survival()
    for _ in range(KNOWN):
        survival.observe(4, 2)
    assert survival.expected(4) is None  # by what has faded
    for _ in range(KNOWN // 10):
        survival.observe(4, 2)
    survival.observe(1, 0)
    assert survival.expected(4) == pytest.approx(1.99, abs=0.02) and survival.expected(2) == survival.expected(3)
    assert survival.expected(5) is None


def test_what_is_compared_is_the_plan_and_not_the_chain_that_ended_by_itself(target: Target, good: Any) -> None:
    class Ending(Fixed):
        def calibration(self, row: RequestEstimate, *, samples: bool) -> tuple[float, ...]:
            row.drafter.floor = 0.9  # a chain goes on while the head is sure
            return row.drafter.calibrations[samples].rates

    engine, seen = engine_of(target, good), list[tuple[int, int]]()
    engine.controller = engine._decoder.controller = Ending(DraftPlan.chain(LENGTH))
    observe: Any = lambda head, request, planned, drafted, *_, **__: seen.append((planned, drafted))  # noqa: E731
    engine.heads.judge = observe  # type: ignore[method-assign]
    decode(engine)
    assert any(drafted < planned == LENGTH for planned, drafted in seen)
    assert all(drafted <= planned for planned, drafted in seen)


# routes


def routed(engine: Engine, prompt: Sequence[int], count: int) -> list[str | None]:
    return [engine.generate([list(prompt)], params(8))[0].stats.head for _ in range(count)]


def test_auto_gives_requests_the_head_that_they_accept_best(target: Target, good: Any) -> None:
    engine = engine_of(target, {"random": make_tiny_head(target), "good": good}, route="auto")
    prompts = check_prompts(target, CONTEXT - NEW_TOKENS)
    got = [engine.generate([prompts[place % 4]], params(12))[0].stats.head for place in range(24)]
    assert got[-8:].count("good") >= 7, got
    router = engine.heads.router
    assert router is not None and router.routed == 24
    assert 1 <= router.explored == engine.heads.explorations <= 1 + EXPLORATION * 24
    assert engine.heads.default_name == "random"


def test_each_kind_of_request_has_a_best_head_of_its_own(target: Target) -> None:
    engine = engine_of(target, {name: make_tiny_head(target, seed=place) for place, name in enumerate("ab")})
    (one, other), router, explored = list(engine.heads), Router(), list[int]()
    kinds = [[60 + place] * PREFIX for place in range(2)]
    right = {0: one, 1: other}
    got: dict[int, list[Any]] = {0: [], 1: []}
    for number in range(400):
        place = number % 2
        prompt = [*kinds[place], number]  # what comes after the prefix does not count
        head = router.choose(prompt, [one, other])
        explored.append(router.explored)
        got[place].append(head)
        router.observe(prompt, head, 3, 3 if head is right[place] else 0)
    for place, head in right.items():
        assert got[place][20:].count(head) >= 0.85 * len(got[place][20:])
    assert router.explored <= 1 + EXPLORATION * router.routed
    steps = [later - before for before, later in itertools.pairwise(explored)]
    assert all(sum(steps[place : place + 20]) <= 1 for place in range(len(steps)))  # no bursts


def test_what_the_router_knows_is_bounded_and_forgotten_with_the_head(target: Target) -> None:
    engine = engine_of(target, {name: make_tiny_head(target, seed=place) for place, name in enumerate("ab")})
    heads, router = list(engine.heads), Router()
    for number in range(2 * KINDS):
        prompt = [number]
        router.observe(prompt, router.choose(prompt, heads), 3, 1)
    assert len(router._kinds) == KINDS and router.explored <= 1 + EXPLORATION * router.routed
    for _ in range(50):
        router.observe([1], heads[0], 3, 0)
        router.observe([1], heads[1], 3, 3)
    best = [router.choose([1], heads) for _ in range(10)]
    assert best.count(heads[1]) >= 9
    assert router.choose([4000], heads) is heads[1]  # a new kind: by all requests
    router.forget(heads[1].name)
    assert not any(heads[1].name in known for known in (*router._kinds.values(), router._overall))


# the planner


def test_a_head_that_is_never_right_is_not_used_beside_one_that_is_and_is_looked_at_again() -> None:
    controller = Controller(LENGTH)
    for width, seconds in ((1, 0.010), (4, 0.0105), (8, 0.011), (32, 0.016)):
        controller.costs.calibrate(width, seconds)
    good, bad = HeadEstimate(), HeadEstimate()
    rows = [controller.track(head) for head in (good, bad)]
    rate = {good: 1.0, bad: 0.0}
    used: dict[HeadEstimate, list[bool]] = {good: [], bad: []}

    def step() -> None:
        for row in rows:
            row.room = row.head = LENGTH
        plans = controller.choose(rows)
        width = 0
        for row, plan in zip(rows, plans, strict=True):
            used[row.drafter].append(plan.length > 0)
            accepted = plan.length if rate[row.drafter] else 0
            width += 1 + plan.nodes
            row.observe(1 + accepted, by_head=plan.length > 0)
            if plan.length:
                row.observe_head(plan.length, plan.length, accepted)
        for head in (good, bad):
            longest = max(plan.length for row, plan in zip(rows, plans, strict=True) if row.drafter is head)
            if longest:
                controller.observe_draft([DraftTree.chain(range(longest))], 0.0005 * longest, head)
        controller.observe_target(width, 0.010 + 0.0002 * width)

    for _ in range(400):
        step()
    assert all(used[good][5:]) and sum(used[bad][20:]) < 0.1 * 380, sum(used[bad][20:])
    assert good.acceptance.rate(0, 0) > 0.9 > 0.5 > bad.acceptance.rate(0, 0)
    probes = controller.probes
    for _ in range(3000):
        step()
    assert controller.probes > probes and any(used[bad][400:])  # it keeps looking, at the cost of a few steps
    assert sum(used[bad][400:]) < 0.1 * 3000
    rate[bad] = 1.0
    for _ in range(3000):
        step()
    assert all(used[bad][-100:])
