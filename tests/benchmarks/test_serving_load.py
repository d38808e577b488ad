"""The figures out of synthetic traces, the bars both ways, the plan, and a whole small run."""

import json

import pytest

from benchmarks import serving_load, serving_plan
from benchmarks.clients import Load, Request, Trace, closed_loop, poisson
from benchmarks.core_binding import Cores
from benchmarks.serving_figures import Key, automatic_over_better, judge, latencies, percentiles, summarise
from benchmarks.serving_plan import Plan, Rates


def trace(sent: float, first: float, ended: float, tokens: int, **more: int | str) -> Trace:
    return Trace(sent, first, ended, tokens, **more)  # type: ignore[arg-type]


def test_latencies_are_of_good_requests_of_all_repeats():
    # sent at 10, first token after 0.5 s, the other 4 within 2 s
    one = trace(10.0, 10.5, 12.5, 5)
    assert (one.first_token_seconds, one.seconds_per_token, one.seconds) == (0.5, 0.5, 2.5)
    assert trace(10.0, 10.5, 10.5, 1).seconds_per_token is None  # nothing came after the first
    assert trace(10.0, 0.0, 11.0, 5).first_token_seconds is None  # was not streamed
    firsts = (range(1, 51), range(51, 102))
    loads = [Load([trace(0.0, 0.001 * place, 1.0, 3) for place in each], 1.0) for each in firsts]
    loads += [Load([trace(0.0, 9.0, 9.0, 0, error="status 500")], 1.0)]  # is in no percentile
    assert latencies(loads)["ttft"] == {"p50": pytest.approx(0.051), "p99": pytest.approx(0.100)}
    assert percentiles([None, None]) is None
    assert percentiles([1.0, 2.0]) == {"p50": 1.5, "p99": pytest.approx(1.99)}


def test_rates_count_good_requests_and_tau_pools_steps():
    traces = [trace(0, 1, 2, 10, accepted=6, steps=3), trace(0, 1, 2, 20, accepted=0, steps=1)]
    failed = trace(0, 1, 2, 99, error="ReadError", accepted=50, steps=1)
    load, plain = Load([*traces, failed], 2.0), Load([trace(0, 1, 2, 10)], 2.0)
    assert (load.rate, load.requests_per_second) == (15.0, 1.0)
    loads = {Key("closed", 2, "on"): [load], Key("closed", 2, "off"): [plain], Key("closed", 2, "automatic"): []}
    on, off = summarise(loads, {})
    assert on["acceptance_length"] == pytest.approx((6 + 4) / 4)  # bonus tokens included
    assert (on["requests"], on["errors"]) == (3, ["ReadError"])
    assert (off["acceptance_length"], off["mode"]) == (None, "off")


def rows(automatic: list[float], on: list[float], off: list[float]) -> list[dict]:  # type: ignore[type-arg]
    rates = {"automatic": automatic, "on": on, "off": off}
    return [{"arrivals": "closed", "concurrency": 4, "mode": mode, "repeats": each} for mode, each in rates.items()]


def judged(**results: object) -> dict[str, bool | None]:
    found = judge({"loads": rows([9.8, 9.8], [10, 10], [5, 5]), **results})
    return {bar["bar"].split(",")[0].split(" in ")[0].split(" after")[0]: bar["met"] for bar in found}


def test_automatic_is_compared_with_what_is_better_overall_within_each_repeat():
    rates = {"automatic": [5.0, 5, 20, 20, 20], "on": [10.0, 10, 10, 1, 1], "off": [9.0, 9, 9, 40, 40]}
    assert automatic_over_better(rates) == 2.0  # on is better overall: 0.5, 0.5, 2, 20, 20
    assert automatic_over_better({"automatic": [10], "on": [8], "off": [10.5]}) == pytest.approx(10 / 10.5)
    assert automatic_over_better({"automatic": [10], "on": [8]}) is None


def test_each_bar_is_met_and_missed():
    automatic, http = "automatic / the better of on and off", "tokens/s over HTTP / by the engine alone"
    errors, memory = "errors", "server's memory"
    assert judged() == {automatic: True, http: None, errors: None, memory: None}
    good = {"concurrency": 8, "over_engine": 0.951}
    lasting = {"requests": 2000, "early": 200, "errors": 0, "memory_growth": 1.049}
    assert judged(http=good, endurance=lasting) == {automatic: True, http: True, errors: True, memory: True}
    bad, leaking = {"concurrency": 8, "over_engine": 0.949}, lasting | {"errors": 1, "memory_growth": 1.051}
    loads = rows([9.6, 9.6], [5, 5], [10, 10])
    missed = judged(loads=loads, http=bad, endurance=leaking)
    assert missed == {automatic: False, http: False, errors: False, memory: False}


def test_a_plan_fits_its_time_and_counts_every_part():
    measured = {("off", 1): 1.0, ("off", 16): 4.0, ("on", 1): 2.0, ("on", 16): 1.0}
    rates = Rates(16, measured, endurance=10.0)
    assert rates.of("off", 4) == pytest.approx(2.0) and rates.of("on", 4) == pytest.approx(2**0.5)
    assert rates.of("automatic", 16) == 1.0
    plan = Plan((1, 16), ("closed", "poisson"), repeats=2, http_repeats=3, endurance=100)
    requests = plan.requests(rates, 8.0)
    assert requests == {1: 8, 8: 24, 16: 32}
    closed = 2 * ((8 / 1 + 32 / 4) + (8 / 2 + 32 / 1) + (8 / 1 + 32 / 1))
    open_loop = (8 / 0.7 + 8 / 0.7 + 8 / 0.7) + (8 / 0.7 + 32 + 32)
    http = 2 * (3 + 1) * 24 / rates.of("off", 8)
    assert plan.seconds(rates, requests) == pytest.approx(closed + open_loop + http + 10)
    for seconds in (100.0, 300.0, 1000.0):
        fitting = plan.fit(rates, seconds)
        assert plan.seconds(rates, fitting) <= seconds or fitting == plan.requests(rates, 2)
    assert plan.fit(rates, 1000.0)[16] > plan.fit(rates, 300.0)[16] and plan.fit(rates, 0.0)[16] == 16


def test_cores_are_split_in_halves(monkeypatch):
    for allowed, expected in (({3}, ((3,), (3,))), ({0, 1}, ((0,), (1,))), ({2, 4, 6}, ((2,), (4, 6)))):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, allowed=allowed: allowed)
        cores = Cores.split()
        assert (cores.engine, cores.io) == expected


def test_what_goes_wrong_is_told_by_the_trace():
    requests = [
        Request("/v1/completions", {"prompt": "a", "max_tokens": 2, "stream": streamed}) for streamed in (True, False)
    ]
    for load in (closed_loop("http://127.0.0.1:9", requests, 2), poisson("http://127.0.0.1:9", requests, 1000.0, 0)):
        assert len(load.traces) == 2 and load.rate == 0
        assert all(each.error and each.error.startswith("ConnectError") for each in load.traces)


def test_a_whole_run_with_its_bars(small, two_prompts, tmp_path, capsys, monkeypatch):
    for module in (serving_load, serving_plan):
        monkeypatch.setattr(module, "HTTP_CONCURRENCY", 2)
    status = serving_load.main(
        f"{small} {two_prompts} --out {tmp_path} --mode eager --concurrency 1 2 --requests 2 --repeats 1 "
        "--max-new-tokens 4 --num-tokens 2 --endurance 10 --check".split()
    )
    written = json.loads((tmp_path / "serving_load.json").read_text())
    keys = [(row["arrivals"], row["concurrency"], row["mode"]) for row in written["loads"]]
    modes = ("off", "on", "automatic")
    assert keys == [(arrivals, n, mode) for arrivals in ("closed", "poisson") for n in (1, 2) for mode in modes]
    for row in written["loads"]:
        assert row["errors"] == [] and row["requests"] == 2 and row["tokens_per_second"]["median"] > 0
        assert all(0 < row[name]["p50"] <= row[name]["p99"] for name in ("ttft", "tpot", "e2e"))
        assert (row["acceptance_length"] is None) == (row["mode"] == "off") or row["mode"] == "automatic"
        assert (row["arrivals_per_second"] is None) == (row["arrivals"] == "closed")
    assert (written["endurance"]["requests"], written["endurance"]["errors"]) == (10, 0)
    assert written["endurance"]["memory_late"] > 2**20 and written["http"]["over_http"]["median"] > 0
    assert status == (1 if any(bar["met"] is False for bar in written["bars"]) else 0)
    assert len(written["bars"]) == 2 + 3 and None not in [bar["met"] for bar in written["bars"]]
    assert (tmp_path / "serving_load.png").stat().st_size > 0
    assert written["command"].startswith("python -m benchmarks.serving_load --target") and written["commit"]
    printed = capsys.readouterr().out
    assert "engine on core" in printed and "minutes from now" in printed and "errors in 10 requests" in printed


def test_mistakes_are_one_sentence(small, tmp_path, capsys):
    assert serving_load.main(f"{small} --head {tmp_path} --mode eager --out {tmp_path}/out".split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and str(tmp_path) in error
