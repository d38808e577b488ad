"""The draft-serve that `prepare` starts: what it writes, how its errors are shown, and that none is left behind."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import psutil
import pytest
from http_testing import eventually
from written_data import prepared, rows_of, start_prepare

from draft.data.dataset import open_dataset
from draft.data.generate import _visible_devices, check_local
from draft.errors import UserError
from draft.target import Target

SHAPE = ["--max-new-tokens", "12", "--max-length", "200", "--dtype", "float32"]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"number {n}"}) + "\n" for n in range(40)))
    return path


SLOW = (  # it stops after the first stored responses, as if the rest took long
    "import time, draft.data.dataset as d\nd._ROWS_PER_PART = 4\nflush = d.Parts.flush\n"
    "def slow(self, stage):\n    d.Parts.flush = flush\n    flush(self, stage)\n    time.sleep(600)\n"
    "d.Parts.flush = slow"
)


def test_it_writes_the_targets_text_and_ends(target: Target, folder: Path, questions: Path, tmp_path: Path) -> None:
    process = start_prepare(folder, tmp_path / "data", *SHAPE, "--prompts", str(questions), "--seed", "3")
    shown = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and "starting draft-serve" in shown and "tokens/s" in shown, shown
    expected = prepared(target, tmp_path / "alone", prompts=[questions], max_new_tokens=12, max_length=200, seed=3)
    data = open_dataset(tmp_path / "data")
    assert rows_of(data) == rows_of(expected)
    assert data.manifest["answered_by"] is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_one_leaves_no_server(
    number: signal.Signals, folder: Path, questions: Path, tmp_path: Path
) -> None:
    process = start_prepare(folder, tmp_path / "data", *SHAPE, "--prompts", str(questions), script=SLOW)
    eventually(lambda: any(tmp_path.glob("data/parts/*.parquet")), every=0.05)
    (server,) = (each for each in psutil.Process(process.pid).children() if "serving.cli" in each.cmdline())
    process.send_signal(number)
    shown = process.communicate(timeout=60)[0]
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number], shown
    assert ("the same command goes on" in shown) == (number == signal.SIGINT)
    eventually(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE, 30, every=0.05)


def test_what_it_cannot_load_is_its_own_sentence(folder: Path, questions: Path, tmp_path: Path) -> None:
    process = start_prepare(
        folder, tmp_path / "data", *SHAPE, "--prompts", str(questions), "--head", str(tmp_path / "no-head")
    )
    shown = process.communicate(timeout=300)[0]
    assert process.returncode == 2 and shown.count("no-head") == 2, shown  # in what is started, and in what is wrong
    assert shown.splitlines()[-1].startswith("draft-train: ") and "Traceback" not in shown
    assert not (tmp_path / "data").exists()


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _visible_devices("cpu") == {"CUDA_VISIBLE_DEVICES": ""} and _visible_devices("cuda") == {}
    assert _visible_devices("cuda:1") == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert _visible_devices("cuda:1") == {"CUDA_VISIBLE_DEVICES": "6"}
    with pytest.raises(UserError, match="--device meta is none that draft-serve runs on"):
        check_local("auto", "meta")
    with pytest.raises(UserError, match="float8"):
        check_local("float8", "cpu")
