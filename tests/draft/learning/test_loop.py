"""The loop from captured traffic to a swapped head: what it decides, and that it goes on wherever it was killed."""

import errno
import os
import signal
from dataclasses import replace
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_tiny_head, save_tiny_target
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from filelock import FileLock
from http_testing import eventually, live
from rich.console import Console
from training_runs import Run

from draft.data.capture import Captured, CapturedTarget, open_capture, shard_name, to_table
from draft.data.dataset import split_counts, write_dataset
from draft.data.from_capture import as_rows
from draft.errors import UserError
from draft.evaluation import report
from draft.evaluation.compare import record_trained_rows
from draft.evaluation.tau import Interval
from draft.heads.checkpoint import head_sha256, load_head, load_unchanged_head, save_head
from draft.learning import gate, loop
from draft.learning.ledger import Ledger
from draft.learning.loop import AttemptFailed, Learner, Options
from draft.learning.server import Server, ServerAway, WrongKey
from draft.training import run, trainer
from serving.api.app import create_app
from serving.capture import CaptureWriter
from serving.engine import Engine, SamplingParams

TRAINING = (
    "training.max_steps=24",
    "training.learning_rate=3e-3",
    "training.save_every=5",
    "data.tokens_per_batch=256",
)


def stand_in(first: str, *, heads: bool = True, key: str = "") -> FastAPI:
    """A server with metrics, and the list of heads that draft-serve has; it loads what it is given."""
    app = FastAPI()
    known = {"first": head_sha256(first)}
    app.state.known, app.state.default, app.state.events, app.state.refusal = known, "first", [], ""

    @app.middleware("http")
    async def check(request: Request, call_next):
        if key and request.headers.get("authorization") != f"Bearer {key}":
            return JSONResponse({"error": "send a valid API key"}, 401)
        return await call_next(request)

    @app.get("/metrics")
    async def metrics():
        return PlainTextResponse("draftsmith:num_requests_waiting 0.0\n")

    if not heads:
        return app

    @app.get("/heads")
    async def listed():
        rows = [
            {"name": name, "fingerprint": fingerprint, "default": name == app.state.default}
            for name, fingerprint in known.items()
        ]
        return {"default": app.state.default, "heads": rows, "events": app.state.events}

    @app.post("/heads")
    async def loaded(body: dict):
        if app.state.refusal:
            return JSONResponse({"error": app.state.refusal, "error_type": "validation"}, 422)
        if body["name"] in known:
            return JSONResponse({"error": "taken", "error_type": "conflict"}, 409)
        load_head(body["path"])
        known[body["name"]] = head_sha256(body["path"])
        app.state.default = body["name"] if body["default"] else app.state.default
        return JSONResponse({}, 201)

    @app.post("/heads/{name}/default")
    async def default(name: str):
        app.state.default = name
        return {}

    @app.delete("/heads/{name}")
    async def unloaded(name: str):
        del known[name]
        return {}

    return app


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A target and a head on disk, and greedy answers of the target, as a server captures them."""
    root = tmp_path_factory.mktemp("learning")
    target = save_tiny_target(root / "target")
    save_head(make_tiny_head(target), root / "head", dtype=torch.float32, about={})
    prompts = [target.tokenizer(f"<|im_start|>user\nnumber {n} and {n * 7 % 11}", add_special_tokens=False).input_ids
               for n in range(80)]  # fmt: skip
    answers = Engine(target, speculation="off").generate(prompts, SamplingParams(max_new_tokens=24))
    rows = [
        Captured(1000.0 + place, answer.prompt_ids, answer.token_ids, 0.0, False, False, answer.finish_reason)
        for place, answer in enumerate(answers)
    ]
    return root, target, rows


@pytest.fixture
def traffic(world, tmp_path):
    """Return a function that captures some of the rows, and gives the folder."""
    _, target, rows = world
    about = CapturedTarget("tiny", target.fingerprint, target.vocab_size, "float32")

    def capture(first: int, last: int, **fields) -> Path:
        folder = tmp_path / "captured"
        folder.mkdir(exist_ok=True)
        chosen = [replace(row, **fields) for row in rows[first:last]]
        pq.write_table(to_table(chosen, about), folder / shard_name(chosen[-1].time, "test"))
        return folder

    return capture


@pytest.fixture
def make_learner(world, tmp_path, monkeypatch):
    """Return a maker of learners of a server; what they print is in `lines`."""
    root = world[0]
    monkeypatch.setattr(gate, "_WINDOW", 0.0)
    monkeypatch.setattr(gate, "_LEAST_REST", 0.0)
    for module in (report, trainer):  # pictures take longer than all the rest
        monkeypatch.setattr(module, "draw", lambda *_: None)

    def make(server: Server, **options) -> Learner:
        given = {"min_rows": 40, "method": "full", "dtype": "float32", "overrides": TRAINING, **options}
        places = {"out": tmp_path / "out", "capture": tmp_path / "captured"}
        models = {"head": str(root / "head"), "target": str(root / "target")}
        return Learner(Options(**{**places, **models, **given}), server, Console(quiet=True))

    return make


def general_data(folder: Path, rows: list[Captured], fingerprint: str) -> Path:
    """A data set whose held-out rows these requests are."""
    held_out = [replace(row, split="held-out") for row in as_rows(rows)]
    about = {"target": "tiny", "target_fingerprint": fingerprint, "template_hash": "", "eos_token_ids": [], "seed": 0}
    folder.mkdir()
    write_dataset(folder, held_out, {**about, "sources": [], "counts": split_counts(held_out)})
    return folder


def events(tmp_path: Path) -> list[str]:
    return [event["event"] for event in Ledger(tmp_path / "out" / "ledger.jsonl").events()]


def test_a_better_head_is_served_and_the_next_attempt_starts_from_it(world, traffic, make_learner, tmp_path):
    app = stand_in(str(world[0] / "head"))
    with live(app) as url, Server(url) as server:
        learner = make_learner(server)
        traffic(0, 12)
        assert learner.tick() == "not enough new rows: 12 of 40" and events(tmp_path) == []
        traffic(12, 60)
        assert "served as learned-0001-" in learner.tick()
        name = app.state.default
        assert list(app.state.known) == ["first", name] and name.startswith("learned-0001-")
        assert events(tmp_path) == ["begun", "prepared", "trained", "judged", "served"]
        attempt = learner.ledger.attempts()[0]
        judged = attempt.events["judged"]
        assert judged["verdict"] == "ship" and judged["domain"]["gain"]["low"] > 0 and judged["conversations"] == 12
        assert attempt.begun["rows"] == 60 and attempt.begun["until"] == 1059.0
        place = tmp_path / "out" / "attempts" / "0001"
        assert {"head", "report"} <= {path.name for path in place.iterdir()}
        assert not (place / "data").exists() and not (place / "run").exists()  # the traffic itself is not kept
        assert head_sha256(place / "head") == attempt.events["served"]["fingerprint"] == app.state.known[name]
        assert learner.tick() == "not enough new rows: 0 of 40"
        traffic(60, 80)
        learner = make_learner(server, min_rows=20, overrides=(*TRAINING, "training.max_steps=1"))
        learner.tick()
        second = learner.ledger.attempts()[1]
        assert second.begun["base"] == {"name": name, "folder": str(place / "head")}
        assert second.events["judged"]["conversations"] == 16
        assert (tmp_path / "out" / "attempts" / "0002" / "report" / "comparison.md").is_file()


def test_a_head_that_is_not_proven_better_is_not_served(world, traffic, make_learner, tmp_path):
    app = stand_in(str(world[0] / "head"))
    with live(app) as url, Server(url) as server:
        traffic(0, 40)
        learner = make_learner(server, overrides=("training.max_steps=1", "training.learning_rate=1e-9"))
        told = learner.tick()
        assert "kept: Verdict at K = 5: don't ship" in told and app.state.default == "first"
        assert not (tmp_path / "out" / "attempts" / "0001" / "head").exists()
        assert learner.tick() == "not enough new rows: 0 of 40"


def test_a_head_that_cannot_be_served_or_judged_is_not_served(world, traffic, make_learner, tmp_path):
    app = stand_in(str(world[0] / "head"))
    with live(app) as url, Server(url) as server:
        traffic(0, 40)
        app.state.refusal = "the self-check failed"
        assert "kept: the server refuses the head: the self-check failed" in make_learner(server).tick()
        traffic(40, 80, temperature=1.0)
        learner = make_learner(server)
        assert "kept: no held-out request was greedy" in learner.tick() and app.state.default == "first"
        assert events(tmp_path)[-3:] == ["begun", "prepared", "kept"]  # without a training
        assert make_learner(server).tick() == "not enough new rows: 0 of 40"


def test_an_attempt_that_failed_loses_no_requests(world, traffic, make_learner, tmp_path, monkeypatch, draft_train):
    class Done(Exception):
        pass

    def wait(_):
        waited.append(1)
        if len(waited) == 3:
            raise Done

    def fail(_):
        raise UserError("the reason.")

    def rows_of_attempts():
        return [attempt.begun["rows"] for attempt in Ledger(tmp_path / "out" / "ledger.jsonl").attempts()]

    waited: list[int] = []
    monkeypatch.setattr(os, "nice", lambda _: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(loop._Work, "judged", fail)
    with live(stand_in(str(world[0] / "head"))) as url, Server(url) as server:
        traffic(0, 40)
        learner = make_learner(server)
        with pytest.raises(Done):
            learner.run(wait=wait)
        assert events(tmp_path) == ["begun", "failed"]  # and not again at each look
        traffic(40, 80)
        with pytest.raises(AttemptFailed, match="attempt 2: failed: the reason."):
            learner.tick()
        assert rows_of_attempts() == [40, 40]
        status, shown = draft_train(*learn(world, tmp_path, url))  # with --once, and started again
        assert status == 2 and "draft-train: attempt 3: failed: the reason." in shown
        assert events(tmp_path)[-2:] == ["begun", "failed"] and rows_of_attempts() == [40, 40, 80]
        monkeypatch.setattr(loop._Work, "judged", lambda _: {"ship": False, "reason": "no gain"})
        learner.ledger.append("begun", 4, rows=80, until=1079.0, settings=["others"])
        assert make_learner(server).tick() == "attempt 5: kept: no gain" and rows_of_attempts()[3:] == [80, 80]
        assert make_learner(server).tick() == "not enough new rows: 0 of 40"


def test_general_losses_are_bounded_against_the_first_head():
    class Measured:
        def __init__(self, low):
            self.measurements = {"domain": self}
            self.deciding_length, self.ship, self.verdict = 1, True, "ship"
            self.greedy = self
            self.conversations = 9
            self.taus = {"baseline": [Interval(1.0, 1.0, 1.0)], "candidate": [Interval(1.2, 1.1, 1.3)]}
            self.low = low

        def gain(self, _):
            return Interval(0.0, self.low, 0.1)

    for drift in (None, Measured(-0.01)):
        kept = loop._verdict(Measured(0.1), drift)
        assert kept["ship"] and kept["verdict"] == "ship" and kept["reason"].startswith("Verdict at K = 1: ship. ")
    for low in (-0.03, float("nan")):
        lost = loop._verdict(Measured(0.1), Measured(low))
        assert not lost["ship"] and lost["verdict"] == "don't ship"
        assert lost["reason"].startswith("Verdict at K = 1: don't ship. domain τ 1.000 -> 1.200")
        assert f"over the first head: +0.0 % [{100 * low:+.1f}, +10.0] (needs above -2 %)." in lost["reason"]


def test_general_rows_that_do_not_fit_are_refused_before_the_training(world, traffic, make_learner, tmp_path):
    root, target, rows = world
    own = general_data(tmp_path / "own", rows[:5], target.fingerprint)
    other = general_data(tmp_path / "other", rows[:5], "0" * 16)
    with live(stand_in(str(root / "head"))) as url, Server(url) as server:
        make_learner(server, general=own)
        learner = make_learner(server, general=other)  # no request says yet which target is served
        traffic(0, 40)
        with pytest.raises(AttemptFailed, match="failed: data set .* was prepared for target"):
            learner.tick()
        assert events(tmp_path) == ["begun", "failed"]
        with pytest.raises(UserError, match=f"fingerprint 0{{16}}, and .* answers of one with {target.fingerprint}"):
            make_learner(server, general=other)
        few = general_data(tmp_path / "few", [*rows[:4], replace(rows[4], temperature=1.0)], target.fingerprint)
        with pytest.raises(UserError, match="holds 4 held-out conversations that were written greedily"):
            make_learner(server, general=few)
        about = {"trained_rows": record_trained_rows(as_rows(rows[4:8]), {})}
        save_head(make_tiny_head(target), tmp_path / "head", dtype=torch.float32, about=about)
        with pytest.raises(UserError, match="--head was trained on 1 of its 5 held-out rows"):
            make_learner(server, general=own, head=str(tmp_path / "head"))


def test_general_rows_that_the_traffic_repeats_are_left_out(world, traffic, make_learner, tmp_path, monkeypatch):
    root, target, rows = world
    given = []
    monkeypatch.setattr(loop._Work, "_trained", lambda _: None)
    monkeypatch.setattr(loop, "merge_run", lambda *_: None)
    monkeypatch.setattr(
        loop._Work, "_compared", lambda _, held_out, general: given.append(general) or {"ship": False, "reason": "told"}
    )
    with live(stand_in(str(root / "head"))) as url, Server(url) as server:
        traffic(0, 40)
        repeated = general_data(tmp_path / "repeated", [*rows[:5], *rows[40:44]], target.fingerprint)
        with pytest.raises(AttemptFailed, match="4 general conversations are left that no head is trained on"):
            make_learner(server, general=repeated).tick()
        partly = general_data(tmp_path / "partly", [*rows[:5], *rows[40:45]], target.fingerprint)
        assert make_learner(server, general=partly).tick() == "attempt 2: kept: told"
    assert [row.id for row in given[0]] == [row.id for row in as_rows(rows[40:45])]


def test_a_server_without_a_list_of_heads_gets_an_export(world, traffic, make_learner, tmp_path):
    with live(stand_in(str(world[0] / "head"), heads=False)) as url, Server(url) as server:
        traffic(0, 50)
        told = make_learner(server).tick()
        export = tmp_path / "out" / "attempts" / "0001" / "export"
        assert "exported as learned-0001-" in told and f"{export}" in told and "vllm serve" in told
        assert {"config.json", "model.safetensors"} <= {path.name for path in export.iterdir()}
        learner = make_learner(server, min_rows=8, overrides=("training.max_steps=1",))
        traffic(50, 60)  # the operator has not loaded it
        learner.tick()
        assert learner.ledger.attempts()[1].begun["base"]["name"] == str(world[0] / "head")
        for first, folder in ((60, "head"), (70, "export")):  # the gateway's --head may be either
            fingerprint = head_sha256(tmp_path / "out" / "attempts" / "0001" / folder)
            traffic(first, first + 10, head="mine", head_fingerprint=fingerprint)
            learner.tick()
            base = learner.ledger.attempts()[-1].begun["base"]
            assert base["name"].startswith("learned-0001-") and base["folder"].endswith("0001/head")


def test_what_the_server_does_with_a_head_is_followed(world, traffic, make_learner, tmp_path):
    app = stand_in(str(world[0] / "head"))
    with live(app) as url, Server(url) as server:
        traffic(0, 60)
        learner = make_learner(server)
        learner.tick()
        name = app.state.default
        del app.state.known[name]  # a new server, with its first head
        app.state.default = "first"
        learner.tick()
        assert app.state.default == name and events(tmp_path)[-1] == "restored"
        app.state.default = "first"
        app.state.events.append({"time": 1.0, "kind": "rolled back", "head": name, "reason": "worse by 12 %"})
        learner.tick()
        learner.tick()
        assert events(tmp_path)[-2:] == ["restored", "rolled back"] and app.state.default == "first"
        assert learner.ledger.events()[-1]["reason"] == "worse by 12 %"
        app.state.known["first"] = "0" * 32
        traffic(60, 80)
        with pytest.raises(UserError, match="neither .* nor one that was learnt here; give its folder as --head"):
            make_learner(server, min_rows=8).tick()


def test_a_server_that_is_away_is_waited_for(world, traffic, make_learner, monkeypatch):
    class Done(Exception):
        pass

    waited = []

    def wait(seconds):
        waited.append(seconds)
        if len(waited) == 2:
            raise Done

    traffic(0, 60)
    with live(stand_in(str(world[0] / "head"))) as url:
        pass
    with Server(url) as server:
        learner = make_learner(server)
        with pytest.raises(Done):
            learner.run(wait=wait)
        with pytest.raises(UserError, match="does not answer .*; start it, and repeat the command"):
            learner.run(once=True)
        with pytest.raises(ServerAway):
            learner.tick()
    with live(stand_in(str(world[0] / "head"), key="secret")) as url:
        with Server(url) as server, pytest.raises(WrongKey, match="put its key into DRAFTSMITH_API_KEY"):
            make_learner(server).tick()
        monkeypatch.setenv("DRAFTSMITH_API_KEY", "secret")
        with Server(url) as server:
            assert server.heads()["default"] == "first"


@pytest.mark.parametrize(
    ("path", "body", "media"),
    [
        ("/heads", "<html>Welcome</html>", "text/html"),
        ("/heads", "[]", "application/json"),
        ("/heads", '{"heads": []}', "application/json"),
        ("/metrics", "<html>Welcome</html>", "text/html"),
        ("/metrics", "<style>\na:hover { color: red }\n</style>", "text/html"),
    ],
)
def test_a_server_that_answers_something_else_is_away(path, body, media):
    app = FastAPI()

    @app.get(path)
    async def answer():
        return Response(body, media_type=media)

    with live(app) as url, Server(url) as server, pytest.raises(ServerAway, match="with something else than"):
        server.heads() if path == "/heads" else server.load()


def test_a_full_disk_leaves_the_attempt_unfinished(world, traffic, make_learner, tmp_path, monkeypatch):
    saved = []

    def save(*arguments, of=run.save_file):
        if len(saved) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        saved.append(of(*arguments))

    with live(stand_in(str(world[0] / "head"))) as url, Server(url) as server:
        traffic(0, 60)
        with monkeypatch.context() as patch:
            patch.setattr(run, "save_file", save)
            with pytest.raises(UserError, match="step-0000010 is intact, the same command goes on from it"):
                make_learner(server).run(once=True)
        assert events(tmp_path) == ["begun", "prepared"]
        assert "served as learned-0001-" in make_learner(server).tick()
    assert "from step 10 of 24" in (place_of(tmp_path) / "training.log").read_text()


# In processes of their own.

QUICK = """
import draft.evaluation.report, draft.training.trainer
from draft.learning import gate
gate._WINDOW = gate._LEAST_REST = 0.0
draft.evaluation.report.draw = draft.training.trainer.draw = lambda *_: None
"""
KILL = "import os, signal\ndef kill(*_, **__): os.kill(os.getpid(), signal.SIGKILL)\n"
# what each of the following processes is killed at, in the order of an attempt
POINTS = {
    "while the data are written": "import draft.data.from_capture as m\nm.write_dataset = kill",
    "in the middle of the training": """
from draft.training.trainer import Trainer
step = Trainer.step
def stepping(self):
    if self.done == 13: kill()
    return step(self)
Trainer.step = stepping""",
    "in the middle of the merge": "import draft.heads.checkpoint as m\nm.write_head = kill",
    "before the comparison": "import draft.learning.loop as m\nm.compare = kill",
    "in the middle of a line of the ledger": """
from draft.learning.ledger import Ledger
append = Ledger.append
def appending(self, event, *a, **k):
    if event == 'judged':
        with self.path.open('ab') as file: file.write(b'{"time": 1, "attempt')
        kill()
    append(self, event, *a, **k)
Ledger.append = appending""",
    "after the swap": """
from draft.learning.server import Server
serve = Server.serve
def serving(self, *a):
    serve(self, *a)
    kill()
Server.serve = serving""",
    "before the rest is removed": "import draft.learning.loop as m\nm.shutil.rmtree = kill",
}


def learn(world, tmp_path: Path, url: str, *more: str) -> list[str]:
    places = f"--server {url} --capture {tmp_path}/captured --out {tmp_path}/out --head {world[0]}/head"
    settings = f"--target {world[0]}/target --dtype float32 --method full --min-rows 40 --once"
    return ["learn", *places.split(), *settings.split(), *TRAINING, *more]


def test_a_learner_that_is_killed_anywhere_goes_on(world, traffic, tmp_path):
    app = stand_in(str(world[0] / "head"))
    traffic(0, 60)
    with live(app) as url:
        arguments = learn(world, tmp_path, url)
        for place, script in POINTS.items():
            killed = Run(arguments, script=QUICK + KILL + script)
            assert killed.wait() == -signal.SIGKILL, (place, killed.output())
        last = Run(arguments, script=QUICK).succeed()
    assert "not enough new rows: 0 of 40" in last.output()  # the head had been served before
    assert list(app.state.known) == ["first", app.state.default] and app.state.default.startswith("learned-0001-")
    attempts = Ledger(tmp_path / "out" / "ledger.jsonl").attempts()
    assert [attempt.number for attempt in attempts] == [1]
    trained = attempts[0].events["trained"]
    assert trained["steps"] == 24 and "from step 10 of 24" in (place_of(tmp_path) / "training.log").read_text()
    assert {path.name for path in place_of(tmp_path).iterdir()} == {"head", "report", "training.log", "comparison.log"}


def place_of(tmp_path: Path) -> Path:
    return tmp_path / "out" / "attempts" / "0001"


def test_commands_and_their_mistakes(world, traffic, tmp_path, draft_train, monkeypatch):
    monkeypatch.setattr(os, "nice", lambda _: None)  # of this very process
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    traffic(0, 12)
    app = stand_in(str(world[0] / "head"))
    with live(app) as url:
        status, shown = draft_train(*learn(world, tmp_path, url))
        assert status == 0 and "not enough new rows: 12 of 40" in shown
        status, shown = draft_train(*learn(world, tmp_path, url), "--max-length", 8)
        assert status == 0 and "not enough new rows: 0 of 40" in shown
        for lock in (tmp_path / "out" / "learn.lock", tmp_path / "captured" / ".learn.lock"):
            with FileLock(lock):
                status, shown = draft_train(*learn(world, tmp_path, url))
                assert status == 2 and "another learner works on" in shown
            lock.unlink(missing_ok=True)
            lock.mkdir()  # it is no file: as on a disk that is mounted read-only
            status, shown = draft_train(*learn(world, tmp_path, url))
            assert status == 2 and f"{lock.name}' cannot be written" in shown and "let the learner write" in shown
            lock.rmdir()
        for wrong, message in (
            (("--method", "best"), "unknown, choose one of full"),
            (("training.epoch=3",), "unknown setting 'training.epoch'"),
            (("--head", tmp_path / "none"), "no config.json there"),
            (("--target", tmp_path / "none"), "is neither a folder here nor reachable on the hub"),
            (("--target-adapter", tmp_path / "none"), "no adapter_config.json there"),
            (("--general", tmp_path / "none"), "holds no data set"),
            (("--dtype", "float12"), "dtype 'float12' is unknown"),
            (("--server", "localhost:8000"), "is no address"),
            (("--server", "http://localhost:port"), "is no address"),
            (("--server", "http://[::1"), "is no address"),
            (("--server", "http://a..b"), "is no address"),
        ):
            status, shown = draft_train(*learn(world, tmp_path, url), *wrong)
            assert status == 2 and message in shown
        for key in ("schlüssel", "two\nlines"):
            with monkeypatch.context() as patch:
                patch.setenv("DRAFTSMITH_API_KEY", key)
                status, shown = draft_train(*learn(world, tmp_path, url))
                assert status == 2 and "$DRAFTSMITH_API_KEY holds letters that no key has" in shown
    ledger = Ledger(tmp_path / "out" / "ledger.jsonl")
    ledger.append("begun", 1, rows=7)
    status, shown = draft_train("learn", "--out", tmp_path / "out", "--status")
    assert status == 0 and "unfinished" in shown and "begun" in shown
    status, shown = draft_train("learn", "--out", tmp_path / "out")
    assert status == 2 and "--server is missing" in shown


def test_the_real_server_captures_learns_and_drafts_with_the_new_head(world, make_learner, tmp_path):
    root, target, rows = world
    engine = Engine(target, {"first": load_unchanged_head(root / "head", target)}, speculation="chain", mode="eager")
    engine.checks_heads = False  # by built-in prompts, of which this target's answers are nothing like the traffic
    writer = CaptureWriter(tmp_path / "captured", limit=10**7, shard_seconds=0.0)
    app = create_app(engine, loopback=True, capture=writer)
    with live(app) as url, Server(url) as server, httpx.Client(base_url=url, timeout=60) as client:

        def ask(row):
            body = {"prompt": row.prompt_ids, "max_tokens": 24, "temperature": 0, "return_token_ids": True}
            return client.post("/v1/completions", json=body).json()["choices"][0]["token_ids"]

        assert [ask(row) for row in rows[:60]] == [row.answer_ids for row in rows[:60]]
        eventually(lambda: writer.rows["written"] == 60)
        learner = make_learner(server)
        assert "served as learned-0001-" in learner.tick()
        served = learner.ledger.attempts()[0].events["served"]
        assert server.heads()["default"] == served["head"]
        assert [ask(row) for row in rows[60:]] == [row.answer_ids for row in rows[60:]]
        eventually(lambda: writer.rows["written"] == 80)
        newest = next(iter(open_capture(tmp_path / "captured").rows()))
        assert (newest.head, newest.head_fingerprint) == (served["head"], served["fingerprint"])
        assert learner.tick() == "not enough new rows: 20 of 40"
        engine.unload_head("first")
        learner = make_learner(server, min_rows=20, overrides=(*TRAINING, "training.max_steps=1"))
        learner.tick()
        assert learner.ledger.attempts()[1].begun["base"]["name"] == served["head"]
