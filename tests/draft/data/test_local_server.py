"""The draft-serve that `prepare` starts: what it writes, how its errors are shown, and that none is left behind."""

import json
import signal
from pathlib import Path

import psutil
import pytest
from conftest import ended, python
from http_testing import eventually
from training_runs import start_prepare
from written_data import prepared, rows_of

from draft import launcher
from draft.data.dataset import open_dataset
from draft.data.generate import _visible_devices, check_local
from draft.errors import UserError
from draft.launcher import ServerEnded, draft_serve

SHAPE = ["--max-new-tokens", "12", "--max-length", "200", "--dtype", "float32", "--seed", "3"]
SLOW = (  # it stops after the first stored responses, as if the rest took long
    "import time, draft.data.dataset as d\nd._ROWS_PER_PART = 4\nflush = d.Parts.flush\n"
    "def slow(self, stage):\n    d.Parts.flush = flush\n    flush(self, stage)\n    time.sleep(600)\n"
    "d.Parts.flush = slow"
)


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"number {n}"}) + "\n" for n in range(40)))
    return path


def test_an_interrupted_one_leaves_no_server_and_goes_on(target, folder, questions, tmp_path):
    out, words = tmp_path / "data", [*SHAPE, "--prompts", questions]
    for number, status in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        stored = len([*out.glob("parts/*.parquet")])
        run = start_prepare(folder, out, *words, script=SLOW)
        eventually(lambda stored=stored: len([*out.glob("parts/*.parquet")]) > stored, every=0.05)
        (server,) = (each for each in psutil.Process(run.process.pid).children() if "serving.cli" in each.cmdline())
        psutil.Process(run.process.pid).send_signal(number)
        assert run.wait() == status, run.output()
        assert ("the same command goes on" in run.output()) == (number == signal.SIGINT)
        eventually(
            lambda server=server: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE, 30, every=0.05
        )
    shown = start_prepare(folder, out, *words).succeed().output()
    assert "starting draft-serve" in shown and "tokens/s" in shown, shown
    expected = prepared(target, tmp_path / "alone", prompts=[questions], max_new_tokens=12, max_length=200, seed=3)
    assert rows_of(open_dataset(out)) == rows_of(expected)
    assert open_dataset(out).manifest["answered_by"] is None


def test_what_it_cannot_load_is_its_own_sentence(folder, questions, tmp_path):
    run = start_prepare(folder, tmp_path / "data", *SHAPE, "--prompts", questions, "--head", tmp_path / "no-head")
    assert run.wait() == 2 and run.output().count("no-head") == 2  # in what is started, and in what is wrong
    assert run.output().splitlines()[-1].startswith("draft-train: ") and "Traceback" not in run.output()
    assert not (tmp_path / "data").exists()


def test_one_that_is_never_ready_is_given_up(monkeypatch):
    with pytest.raises(ServerEnded, match="No such option"), draft_serve(["--no-such-option"]):
        pass
    monkeypatch.setattr(launcher, "_READY_SECONDS", 0.01)  # no process has imported all that it needs
    with pytest.raises(ServerEnded, match="not ready after 0.01 seconds; read its log: ") as late, draft_serve([]):
        pass
    Path(str(late.value).rpartition(" ")[2]).unlink()
    assert not [each for each in psutil.Process().children() if "serving.cli" in each.cmdline()]


def test_one_whose_starter_has_ended_does_not_begin():
    assert ended(python("-m", "serving.cli", "--no-such-option", **{launcher._STARTER: "0"})) == (1, "")


def test_devices(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _visible_devices("cpu") == {"CUDA_VISIBLE_DEVICES": ""} and _visible_devices("cuda") == {}
    assert _visible_devices("cuda:1") == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert _visible_devices("cuda:1") == {"CUDA_VISIBLE_DEVICES": "6"}
    for dtype, device, words in (("auto", "meta", "--device meta is none that"), ("float8", "cpu", "float8")):
        with pytest.raises(UserError, match=words):
            check_local(dtype, device)
