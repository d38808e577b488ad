"""Does a server get faster on its own traffic? Capture, adapt, compare and swap, beside a client that never stops.

A closed loop of clients sends greedy requests of one domain to a draft-serve that captures; then of another domain. In
each of the two phases the first window is measured without a learner, then `draft-train learn` works until it has
swapped a head (or the time is over), and the last window is measured after it has ended: at the same load.

  tau        acceptance length of the answers that ended in a window: emitted / verifications, bonus included
  tokens/s   tokens of these answers / the window's length
  learning   tokens/s while the learner works, before its first swap, over those of the first window

The target is by default the one that ships fine-tuned on support tickets, for which the bundled head was not made. At
the end a server without speculation answers every prompt again, and the texts are compared.
"""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from benchmarks import domains, shared
from draft import demo
from draft.errors import UserError
from draft.evaluation.tau import acceptance_length
from draft.launcher import draft_serve
from draft.learning.ledger import Ledger
from draft.target import load_target, load_tokenizer, render_chat

MODULE = "benchmarks.learning"
EXAMPLES = f"""
examples:
  two domains in at most 25 minutes on two cores, with the bars:
    python -m {MODULE} --check --out runs/learning
  a look at all parts in about two minutes, which shows no gain:
    python -m {MODULE} --quick --out runs/learning
  the bundled target as it is, with your own settings of the training:
    python -m {MODULE} --plain --domains sql logs --settings "--method lora adapter.rank=32" --out runs/learning
"""
SETTINGS = "--method full model.rebuild_vocabulary=true training.learning_rate=5e-4"
QUICK = "--method full training.max_steps=4 data.tokens_per_batch=256"
VERIFIED_AT_ONCE = 16  # requests to the server without speculation
VERIFYING = 0.2  # of the time, for these
WINDOW = 0.16  # of a phase, the first and the last; the learner has the rest
TIMEOUT = 300.0  # seconds of one answer
PROMPTS = 1500  # of each domain, at most; none is sent twice
SMOOTHED = 15.0  # seconds on either side of a point of the picture

# bars
TAU_GAIN, SPEED_GAIN = 1.15, 1.08
RECOVERY = 1.0
WHILE_LEARNING = 0.9


@dataclass(frozen=True)
class Answer:
    """One request and its answer; times in seconds since the start of the traffic."""

    phase: int
    prompt: str
    sent: float
    ended: float
    text: str = ""
    tokens: int = 0
    emitted: int = 0
    verifications: int = 0
    error: str = ""


@dataclass
class Window:
    """A part of a phase in which the load is constant."""

    phase: int
    name: str  # first, learning or last
    start: float
    end: float


def parse(arguments: Sequence[str]) -> Namespace:
    parser = shared.Parser(MODULE, __doc__, EXAMPLES)
    parser.add_models(default=True)
    parser.add("--target-adapter", metavar="DIR", help="adapter of the target (default: the one that ships)")
    parser.add("--plain", action="store_true", help="the target without an adapter")
    parser.add("--domains", nargs=2, choices=tuple(domains.DOMAINS), default=["tickets", "sql"], help="in this order")
    parser.add("--minutes", shared.real(1, 1e4), default=24.0, metavar="M", help="of the whole run, about")
    parser.add("--clients", shared.whole(1), default=2, metavar="N", help="requests in flight")
    parser.add("--max-new-tokens", shared.whole(8), default=128, metavar="N", help="of an answer")
    parser.add("--min-rows", shared.whole(8), default=100, metavar="N", help="new requests of an attempt")
    parser.add("--max-rows", shared.whole(8), default=160, metavar="N", help="newest requests that an attempt uses")
    parser.add("--settings", default=SETTINGS, metavar="WORDS", help="of draft-train learn")
    parser.add("--seed", shared.whole(0), default=7, metavar="N", help="of the prompts")
    parser.add("--quick", action="store_true", help="two minutes, few rows and steps")
    parser.add_output(MODULE)
    return parser.parse_args(arguments)


def benchmark(arguments: Namespace, command: Sequence[str]) -> int:
    console = shared.make_console()
    out = shared.output_folder(arguments.out)
    if arguments.quick:
        arguments.minutes, arguments.min_rows, arguments.max_rows = 2.0, 10, 24
        arguments.max_new_tokens, arguments.settings = 32, QUICK
    for name in ("captured", "learned"):
        if (out / name).exists():
            raise UserError(f"--out {arguments.out!r} holds an earlier run ({name}); choose another, or delete it.")
    adapter = None if arguments.plain else arguments.target_adapter or str(demo.FINE_TUNED)
    model = ["--target", arguments.target, *(["--target-adapter", adapter] if adapter else [])]
    results: dict[str, Any] = {
        "benchmark": MODULE,
        **shared.provenance(MODULE, command, load_target(arguments.target, adapter=adapter)),
        "head": shared.head_provenance("first", arguments.head),
        "settings": vars(arguments),
    }
    traffic = Traffic(arguments, plain=adapter is None)
    cores = shared.cores()
    options = [*model, "--threads", str(max(1, cores - 1)), "--max-batch", str(max(4, arguments.clients))]
    windows = measure(arguments, traffic, model, options, out, console)
    console.print(f"{len(traffic.answers)} answers; a server without speculation answers the same prompts")
    different = verify(traffic.answers, [*model, "--max-batch", str(VERIFIED_AT_ONCE)], arguments.max_new_tokens)
    events = Ledger(out / "learned" / "ledger.jsonl").events()
    results |= {
        "windows": [asdict(window) | figures(window, traffic.answers) for window in windows],
        "failed": sum(bool(answer.error) for answer in traffic.answers),
        "different_texts": different,
        "ledger": [event | {"time": event["time"] - traffic.epoch} for event in events],
        "answers": [asdict(replace(answer, prompt="", text="")) for answer in traffic.answers],
    }
    results["bars"] = judge(results)
    show(console, results)
    shared.finish(console, results, out / "learning", draw)
    return shared.exit_status(results, arguments.check)


class Traffic:
    """Clients that send one request after the other, of the present phase's domain."""

    def __init__(self, arguments: Namespace, *, plain: bool) -> None:
        """plain: the target is not fine-tuned, and needs the domain's system prompt."""
        tokenizer = load_tokenizer(arguments.target)
        self.arguments = arguments
        self.answers: list[Answer] = []
        self.phase = 0
        self.epoch = 0.0  # time.time() at the start
        self._began = 0.0
        self._prompts = [
            iter([
                render_chat(tokenizer, messages, add_generation_prompt=True)
                for messages, _ in domains.conversations(name, PROMPTS, arguments.seed, system=plain)
            ])
            for name in arguments.domains
        ]  # fmt: skip
        self._lock = threading.Lock()
        self._stop = threading.Event()

    @property
    def now(self) -> float:
        return time.monotonic() - self._began

    @contextmanager
    def flowing(self, url: str) -> Iterator[None]:
        """Send requests while the block runs."""
        self.epoch, self._began = time.time(), time.monotonic()
        with ThreadPoolExecutor(self.arguments.clients) as pool:
            clients = [pool.submit(self._client, url) for _ in range(self.arguments.clients)]
            try:
                yield
            finally:
                self._stop.set()
        for client in clients:
            client.result()

    def _client(self, url: str) -> None:
        with httpx.Client(base_url=url, timeout=TIMEOUT, trust_env=False) as client:
            while not self._stop.is_set():
                with self._lock:
                    phase = self.phase
                    prompt = next(self._prompts[phase], None)
                if prompt is None:
                    raise UserError(f"{PROMPTS} prompts are not enough for --minutes; take fewer.")
                answer = ask(client, prompt, self.arguments.max_new_tokens, phase, lambda: self.now)
                with self._lock:
                    self.answers.append(answer)


def ask(client: httpx.Client, prompt: str, tokens: int, phase: int, clock: Callable[[], float]) -> Answer:
    """Send one greedy request; what goes wrong is in the answer's `error`."""
    sent = clock()
    body = {"inputs": prompt, "parameters": {"max_new_tokens": tokens, "details": True}}
    try:
        response = client.post("/generate", json=body)
    except httpx.HTTPError as error:
        return Answer(phase, prompt, sent, clock(), error=type(error).__name__)
    if response.is_error:
        return Answer(phase, prompt, sent, clock(), error=f"status {response.status_code}")
    found = response.json()
    details = found["details"]
    counts = [details["speculative"][name] for name in ("emitted", "verifications")]
    return Answer(phase, prompt, sent, clock(), found["generated_text"], details["generated_tokens"], *counts)


def measure(
    arguments: Namespace, traffic: Traffic, model: list[str], options: list[str], out: Path, console: Console
) -> list[Window]:
    """Let the traffic flow and the learner work; returns the windows."""
    captured, learned, windows = out / "captured", out / "learned", []
    phase_seconds = 60 * arguments.minutes * (1 - VERIFYING) / 2
    with draft_serve([*options, "--head", arguments.head, "--capture", str(captured)]) as server:
        learn = [sys.executable, "-m", "draft.cli", "learn", "--server", server.url, "--capture", str(captured)]
        learn += ["--out", str(learned), "--head", arguments.head, *model, "--min-rows", str(arguments.min_rows)]
        learn += ["--max-rows", str(arguments.max_rows), *arguments.settings.split()]
        with traffic.flowing(server.url):
            for phase in (0, 1):
                traffic.phase = phase
                console.print(f"{traffic.now:.0f} s: traffic of {arguments.domains[phase]}")
                start = traffic.now
                _sleep_until(traffic, start + WINDOW * phase_seconds)
                windows.append(Window(phase, "first", start, traffic.now))
                learning = traffic.now
                swapped = _learn(learn, learned, traffic, start + (1 - WINDOW) * phase_seconds, out / "learner.log")
                console.print(f"{traffic.now:.0f} s: {'a head was swapped' if swapped else 'no head was swapped'}")
                windows.append(Window(phase, "learning", learning, swapped or traffic.now))
                last = traffic.now
                _sleep_until(traffic, last + WINDOW * phase_seconds)
                windows.append(Window(phase, "last", last, traffic.now))
    return windows


def _sleep_until(traffic: Traffic, moment: float) -> None:
    time.sleep(max(0.0, moment - traffic.now))


def _learn(command: Sequence[str], learned: Path, traffic: Traffic, until: float, log: Path) -> float | None:
    """Run the learner until it has swapped a head, or the time is over; returns the time of the swap."""
    ledger, began = Ledger(learned / "ledger.jsonl"), time.time()
    with log.open("a") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None and traffic.now < until:
                for event in ledger.events():
                    if event["event"] == "served" and event["time"] >= began:
                        return float(event["time"] - traffic.epoch)
                time.sleep(0.5)
            if process.returncode:
                raise UserError(f"the learner ended with status {process.returncode}; see {log}.")
            return None
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)


def verify(answers: Sequence[Answer], options: Sequence[str], tokens: int) -> int:
    """Return the number of answers whose text is not that of a server without speculation."""
    given = [answer for answer in answers if not answer.error]
    with (
        draft_serve([*options, "--speculation", "off"]) as server,
        httpx.Client(base_url=server.url, timeout=TIMEOUT, trust_env=False) as client,
        ThreadPoolExecutor(VERIFIED_AT_ONCE) as pool,
    ):
        plain = pool.map(lambda answer: ask(client, answer.prompt, tokens, 0, time.monotonic), given)
        return sum(each.text != answer.text or bool(each.error) for each, answer in zip(plain, given, strict=True))


# ---- figures ----


def figures(window: Window, answers: Sequence[Answer]) -> dict[str, Any]:
    """Return tokens/s and the acceptance length of the answers of its phase that ended in a window."""
    inside = [
        answer
        for answer in answers
        if answer.phase == window.phase and window.start <= answer.ended < window.end and not answer.error
    ]
    tau = acceptance_length(sum(each.emitted for each in inside), sum(each.verifications for each in inside))
    seconds = window.end - window.start
    speed = sum(each.tokens for each in inside) / seconds if seconds > 0 else 0.0
    return {"answers": len(inside), "tau": tau if tau == tau else None, "tokens_per_second": speed}  # JSON has no NaN


def judge(results: dict[str, Any]) -> list[shared.Bar]:
    found = {(window["phase"], window["name"]): window for window in results["windows"]}
    bars = []
    for phase, (tau, speed) in enumerate(((TAU_GAIN, SPEED_GAIN), (RECOVERY, RECOVERY))):
        first, last = found[phase, "first"], found[phase, "last"]
        domain = results["settings"]["domains"][phase]
        for name, title, least in (("tau", "acceptance length", tau), ("tokens_per_second", "tokens/s", speed)):
            bars.append(shared.at_least(f"{domain}: {title}, last over first", _ratio(last[name], first[name]), least))
    learning = _ratio(found[0, "learning"]["tokens_per_second"], found[0, "first"]["tokens_per_second"])
    return [
        *bars,
        shared.at_least("tokens/s while learning, over first", learning, WHILE_LEARNING),
        shared.at_most("requests that failed", results["failed"], 0),
        shared.at_most("texts that differ from those without speculation", results["different_texts"], 0),
    ]


def _ratio(new: float | None, old: float | None) -> float | None:
    return new / old if new and old else None


# ---- output ----


def show(console: Console, results: dict[str, Any]) -> None:
    headings = ("domain", "window", "seconds", "answers", "tau", "tokens/s")
    table = shared.make_table("traffic", headings, headings[:2])
    for window in results["windows"]:
        tau = "-" if window["tau"] is None else f"{window['tau']:.3f}"
        seconds = f"{window['start']:.0f} - {window['end']:.0f}"
        row = (window["name"], seconds, str(window["answers"]), tau, f"{window['tokens_per_second']:.1f}")
        table.add_row(results["settings"]["domains"][window["phase"]], *row)
    console.print(table)
    for event in results["ledger"]:
        about = {
            name: event[name] for name in ("rows", "seconds", "loss", "verdict", "head", "reason") if name in event
        }
        console.print(f"{event['time']:6.0f} s  attempt {event['attempt']} {event['event']}  {json.dumps(about)}")
    shared.show_bars(console, results["bars"])


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw acceptance length and tokens/s against time, with the swaps, the change of the domain, and the training."""
    figure, axes = shared.make_figure(2, "a server that learns from its own traffic")
    answers = [answer for answer in results["answers"] if not answer["error"]]
    end = max((answer["ended"] for answer in answers), default=1.0)
    moments = list(itertools.takewhile(lambda moment: moment <= end, itertools.count(0.0, SMOOTHED / 3)))
    curves: tuple[list[float], list[float]] = ([], [])
    for moment in moments:
        low, high = max(0.0, moment - SMOOTHED), min(end, moment + SMOOTHED)
        near = [answer for answer in answers if low <= answer["ended"] <= high]
        counts = [sum(each[name] for each in near) for name in ("emitted", "verifications", "tokens")]
        curves[0].append(acceptance_length(counts[0], counts[1]))
        curves[1].append(counts[2] / max(high - low, 1e-9))
    events = results["ledger"]
    change = next(window["start"] for window in results["windows"] if window["phase"] == 1)
    for axis, curve, label in zip(axes, curves, ("acceptance length", "tokens/s"), strict=True):
        axis.plot([moment / 60 for moment in moments], curve, color="tab:blue")
        axis.axvline(change / 60, color="black", linestyle=":", label=" to ".join(results["settings"]["domains"]))
        for event in (event for event in events if event["event"] == "served"):
            axis.axvline(event["time"] / 60, color="tab:green", label="swap")
        for begun in (event for event in events if event["event"] == "begun"):
            same = (event["time"] for event in events if event["attempt"] == begun["attempt"])
            axis.axvspan(begun["time"] / 60, max(same) / 60, alpha=0.12, color="tab:orange", label="attempt")
        axis.set(xlabel="minutes", ylabel=label, ylim=(0, None))
        handles, labels = axis.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        axis.legend(unique.values(), unique.keys(), fontsize="small")
    shared.save_figure(figure, path)


main = partial(shared.run_program, parse, benchmark)

if __name__ == "__main__":
    sys.exit(main())
