"""The comparison with llama.cpp: its bars, what is sent, and a whole run where a llama-server was built."""

import json
import subprocess
import sys
from argparse import Namespace

import psutil
import pytest
import torch
from conftest import make_tiny_target

from benchmarks import decode_speed, llama_cpp
from benchmarks.llama_cpp import FIRST_TOKEN, FORMATS, Peer, Rival
from benchmarks.timing import Key, Timing
from draft.launcher import draft_serve

HAVE_SERVER = (llama_cpp.FOLDER / "build-llama-cpp" / "bin" / "llama-server").is_file()


def key(name: str, weights: str | None = None, batch: int = 1) -> Key:
    return Key(batch, 0.0, None, name, weights)


def parts(ours: float) -> dict:  # type: ignore[type-arg]
    """Timings of two repeats, the second ten times as slow for all: ours at a rate of `ours`, theirs and off at 10."""

    def timings(rates: dict[Key, float]) -> dict:  # type: ignore[type-arg]
        return {key: [Timing(10, 10 / rate), Timing(10, 100 / rate)] for key, rate in rates.items()}

    theirs = {key(f"llama.cpp {format}"): 10.0 for format in FORMATS}
    engines = {key("plain"): ours, key("plain", "int8"): ours, key("automatic"): ours}
    served = {key("draft-serve, off"): 10.0, key("draft-serve, automatic"): ours}
    return {
        "decoding": timings(
            {**engines, **theirs, key("llama.cpp q4_0, ngram-cache"): 20.0, key("plain", None, 2): 99.0}
        ),
        "reading": timings({**engines, **theirs}),
        **{f"first token after {length}": timings({**served, **theirs}) for length in FIRST_TOKEN},
        "HTTP, 1 at once": timings({**served, **theirs}),
    }


def judged(ours: float, formats: list[str] | None = None, **more: float) -> dict:  # type: ignore[type-arg]
    results: dict = {
        "busy_share": more.get("busy", 0.0),
        "ratios": llama_cpp.ratios(parts(ours), "bfloat16", formats or list(FORMATS)),
    }
    results["texts"] = [{"name": "llama.cpp bf16", "in_common": more.get("texts", 1.0)}]
    return {bar["bar"]: bar for bar in llama_cpp.judge(results)}


def test_each_bar_can_be_met_and_missed():
    assert {bar["met"] for bar in judged(22.1).values()} == {True}
    assert {bar["met"] for bar in judged(9.9, texts=0.29, busy=0.11).values()} == {False}
    assert {bar["met"] for bar in llama_cpp.judge(None)} == {None}
    assert judged(22.1).keys() == judged(9.9).keys() == {bar["bar"] for bar in llama_cpp.judge(None)}


def test_ratios_are_taken_within_a_repeat():
    found = {row["name"]: row for row in llama_cpp.ratios(parts(15.0), "bfloat16", list(FORMATS))}
    plain = found["plain / llama.cpp bf16"]
    assert plain["ratio"] == pytest.approx({"median": 1.5, "least": 1.5, "most": 1.5})
    assert (plain["ours"], plain["theirs"]) == pytest.approx((8.25, 5.5))  # medians of 15 and 1.5, of 10 and 1
    waiting = found["first token after 300, automatic / llama.cpp bf16"]
    assert waiting["ratio"]["median"] == pytest.approx(10 / 15) and waiting["unit"] == "ms"
    fastest = found["automatic / llama.cpp's fastest"]
    assert fastest["of"] == ["automatic", "llama.cpp q4_0, ngram-cache"]
    assert fastest["ratio"]["median"] == pytest.approx(0.75)


def test_the_fastest_of_any_format_needs_them_all():
    bars = judged(22.1, formats=["bf16", "q8_0"])
    unknown = [name for name, bar in bars.items() if bar["met"] is None]
    assert unknown == ["automatic / llama.cpp's fastest", "HTTP, 1 at once: automatic / llama.cpp's fastest"]


def test_other_widths_are_not_compared():
    found = llama_cpp.ratios(parts(15.0), "float32", list(FORMATS))
    assert not any(row["name"] == "plain / llama.cpp bf16" for row in found)


def test_texts_are_compared_up_to_their_end():
    end = 9

    def share(ours: tuple[int, ...], theirs: tuple[int, ...]) -> float | None:
        decoded = {key("plain"): [Timing(3, 1.0, (ours,))], key("llama.cpp bf16"): [Timing(3, 1.0, (theirs,))]}
        return llama_cpp.in_common(decoded, key("llama.cpp bf16"), [end])

    assert share((1, 2, 3, 4), (1, 2, 5, 4)) == 0.5
    assert share((1, 2, end, 4), (1, 2, 5, 4)) == 1.0  # they never write an end
    assert share((end, 2), (1, 2)) is None


def test_long_prompts_are_as_long_as_they_can_be():
    target = make_tiny_target()
    room = target.max_length
    lengths = [len(ids) for (ids,) in llama_cpp.long_prompts(target, ["one two three", "four five"], room - 1)]
    assert len(lengths) == llama_cpp.LONG_PROMPTS and all(room - 16 < length < room for length in lengths)
    assert llama_cpp.long_prompts(target, ["one"], room) == []


def test_others_that_compute_are_noticed():
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert llama_cpp.busy_share() > 0.4 / psutil.cpu_count()
    finally:
        process.kill()
        process.wait()


def test_a_missing_build_is_one_sentence(small, two_prompts, tmp_path, capsys):
    options = f"{small} {two_prompts} --out {tmp_path} --vs bf16 --llama-cpp {tmp_path}/none"
    assert decode_speed.main(options.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"run.sh {tmp_path}/none llama_server" in error


def test_answers_of_a_draft_serve_are_timed(small):
    target = make_tiny_target(dtype=torch.float32)
    arguments = Namespace(repeats=1, max_new_tokens=4, vs=[])
    with draft_serve([*small.split(), "--threads", "1", "--no-warm-up"]) as server:
        peer = Peer("draft-serve, automatic", None, server.url)
        rival = Rival(arguments, target, ["one two"], [[3, 4, 5]], "none", [], [peer])
        found = rival.compare({}, [])
        timing = peer.stream(4)([[3, 4, 5], [5, 6]])
    assert (timing.tokens, timing.seconds > 0) == (8, True)
    assert {row["part"] for row in found["rows"]} >= {"HTTP, 1 at once", "HTTP, 8 at once"}
    assert all(row["figure"]["least"] > 0 for row in found["rows"]) and found["ratios"] == []


@pytest.mark.skipif(not HAVE_SERVER, reason=f"needs {llama_cpp.BUILD}")
def test_a_whole_run_beside_llama_cpp(tmp_path):
    options = "--target smollm2 --head smollm2-eagle3 --baseline none --speculation-length 2 --tree --limit 1 --vs bf16"
    assert decode_speed.main(f"{options} --repeats 1 --max-new-tokens 16 --out {tmp_path}".split()) == 0
    written = json.loads((tmp_path / "decode_speed.json").read_text())
    bars = {bar["bar"]: bar for bar in written["bars"]}
    assert bars["greedy text in common with llama.cpp bf16"]["figure"] > 0.3
    measured = {name for name, bar in bars.items() if "llama.cpp" in name and bar["met"] is not None}
    unmeasured = {"plain / llama.cpp q8_0", "automatic / llama.cpp's fastest"}
    assert measured >= {bar["bar"] for bar in llama_cpp.judge(None)} - unmeasured - {
        "HTTP, 1 at once: automatic / off",
        "HTTP, 1 at once: automatic / llama.cpp's fastest",
    }
