"""Decoding speed: our engine with and without speculation, against transformers, and against what a step must cost.

Decoding only: the clock starts when the prompts have been read. All variants run in one process, in an order that
rotates from repeat to repeat; figures are medians over repeats, ratios are taken within a repeat. EOS is ignored, so
that every answer has the same length.
"""

from __future__ import annotations

import shlex
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from benchmarks import llama_cpp, shared
from benchmarks.shared import at_least, at_most, spread
from benchmarks.timing import Key, Samples, Timing, Variant, batches, measure
from draft.heads import DraftHead
from draft.launcher import draft_serve
from draft.target import Target, load_target, wait_for
from serving.engine import Engine, SamplingParams, Speculation
from serving.engine.drafting import HeadProposer, HeadState, Job
from serving.engine.kv_cache import RaggedBatch, Segment
from serving.engine.model import TargetRunner
from serving.engine.setup import MODES, WEIGHTS
from serving.engine.verification import RULES, greedy_choices, make_rule

MODULE = "benchmarks.decode_speed"
EXAMPLES = f"""
examples:
  batch 1, with what a user would run instead (some 15 minutes on two cores):
    python -m {MODULE} --target smollm2 --head smollm2-eagle3 --out runs/decode_speed
  lookup beside the head, on prompts whose answers copy them, and on the usual ones:
    python -m {MODULE} --target smollm2 --head smollm2-eagle3 --workload copy --out runs/copy
    python -m {MODULE} --target smollm2 --head smollm2-eagle3 --workload chat --out runs/chat
  how it scales, without the baselines:
    python -m {MODULE} --target smollm2 --head smollm2-eagle3 --batch 1 2 4 8 16 --baseline none --out runs/decode_speed
  beside llama.cpp, built by `{llama_cpp.BUILD}`:
    python -m {MODULE} --target smollm2 --head smollm2-eagle3 --vs bf16 q8_0 q4_0 --out runs/decode_speed
"""
COPYING = Path(__file__).parent / "copying.jsonl"  # prompts of --workload copy: answers that repeat much of them
# of transformers' generate; prompt lookup takes one prompt at a time only
BASELINES: dict[str, dict[str, Any]] = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 5},
}
WIDTHS = (1, 2, 4, 8, 16, 32)  # tokens of the passes that are timed
PAST = 128  # tokens in the cache of these passes
LONG_CHAIN = 5  # drafts
STEP_ROUNDS = 60
GOOD_HEAD = 2.8  # acceptance length from which higher bars hold

# ---- the program ----


def parse(arguments: Sequence[str]) -> Namespace:
    parser = shared.Parser(MODULE, __doc__, EXAMPLES)
    whole = shared.whole(1)
    several: dict[str, Any] = {"nargs": "+"}
    parser.add_models()
    parser.add("--target-adapter", metavar="DIR", help="PEFT LoRA adapter of the target, merged in memory")
    parser.add_prompts()
    parser.add("--workload", choices=("copy", "chat"), help="compare lookup beside the head with the head alone, only")
    parser.add("--batch", whole, default=[1], metavar="N", help="prompts at once", **several)
    parser.add("--speculation-length", whole, default=[1, 2, 3, 4, 5, 6, 7, 8], metavar="K", **several)
    parser.add("--tree", shared.whole(2), nargs="*", default=[16], metavar="N", help="sizes of trees")
    parser.add("--temperature", shared.real(0, 100), default=[0.0], metavar="T", **several)
    parser.add("--rule", choices=RULES, default=list(RULES), help="for temperatures above 0", **several)
    parser.add("--baseline", choices=("none", *BASELINES), default=list(BASELINES), help="of transformers", **several)
    formats = list(llama_cpp.FORMATS)
    parser.add("--vs", choices=formats, default=[], help="llama.cpp beside it, with the target in these", **several)
    parser.add("--llama-cpp", metavar="DIR", default=str(llama_cpp.FOLDER), help="its build, from tests/interop/run.sh")
    parser.add("--server", metavar="COMMAND", help="start this server and time it on the same prompts")
    parser.add("--server-url", metavar="URL", default="http://127.0.0.1:8000", help="of its OpenAI API")
    parser.add(
        "--weights", choices=WEIGHTS[1:], default=["float"], help="beside float, which is always timed", **several
    )
    parser.add("--repeats", whole, default=5, metavar="N")
    parser.add("--limit", whole, default=5, metavar="N", help="prompts, or --batch if more")
    parser.add("--max-new-tokens", shared.whole(2), default=128, metavar="N")
    parser.add("--baseline-tokens", shared.whole(2), default=32, metavar="N", help="of transformers' answers")
    parser.add("--seed", shared.whole(0), default=0, metavar="N")
    parser.add_dtype("bfloat16")
    parser.add("--mode", choices=MODES, default="auto")
    parser.add("--threads", whole, metavar="N", help="CPU threads (default: all of this process's)")
    parser.add_output(MODULE)
    parsed = parser.parse_args(arguments)
    if min(parsed.tree, default=max(parsed.speculation_length) + 1) <= max(parsed.speculation_length):
        parser.error("a --tree needs more nodes than the largest --speculation-length, which is its depth")
    return parsed


def benchmark(arguments: Namespace, command: Sequence[str]) -> int:
    console = shared.make_console()
    out = shared.output_folder(arguments.out)
    disable_progress_bar()
    build = llama_cpp.Build.find(Path(arguments.llama_cpp)) if arguments.vs else None
    copying = arguments.workload == "copy" and arguments.prompts is None
    chosen = shared.load_prompts(COPYING if copying else arguments.prompts)
    target = load_target(arguments.target, arguments.dtype, adapter=arguments.target_adapter)
    head = shared.load_fitting_head(arguments.head, target)
    threads = arguments.threads or shared.cores()
    if arguments.workload:
        return compare_lookup(console, target, head, chosen, arguments, command)
    others = baselines(arguments, target.dtype, threads)
    kinds = {weights: Engines(target, head, arguments, weights) for weights in weight_formats(arguments)}
    engines = kinds[None]
    ids = fitting(target, chosen.prompts, arguments)
    groups = {size: batches(ids, size) for size in {1, *arguments.batch}}
    bandwidth = read_bandwidth(threads, target.device)
    costs = step_costs(engines.plain, engines.chain)
    beside = None
    with ExitStack() as stack:
        variants = [variant for kind in kinds.values() for variant in kind.variants(arguments)] + others
        if arguments.server:
            stack.enter_context(shared.served(shlex.split(arguments.server), arguments.server_url))
            variants += external(target, arguments)
        if build:
            texts = [prompt.turns[0] for prompt in chosen.prompts]
            rival = stack.enter_context(llama_cpp.started(build, arguments, target, texts, ids, threads, kinds))
            variants += rival.decoding()
        samples = measure(variants, groups, arguments.repeats)
        if build:
            beside = rival.compare(samples, [kind.reading() for kind in kinds.values()])
    results = {
        "benchmark": MODULE,
        **shared.provenance(MODULE, command, target),
        "heads": [shared.head_provenance(arguments.head, arguments.head)],
        "prompts": chosen.provenance(len(ids)),
        "settings": vars(arguments),
        "mode": engines.plain.mode,
        "threads": threads,
        "floor": floor(weight_bytes(engines.plain), bandwidth),
        "steps": costs,
        "rates": summarise(samples),
        "llama_cpp": beside,
        "controller": engines.automatic.stats()["speculation"],
    }
    if arguments.check:
        variant = engines.variants(arguments)[0]
        prompts = groups[variant.key.batch][0]
        options = ["--target", arguments.target, "--head", arguments.head, "--dtype", arguments.dtype]
        results["surroundings"] = {
            "busy_share": busy_share(lambda: variant.run(prompts), arguments.repeats),
            **second_start([*options, "--mode", arguments.mode]),
        }
    results["predicted"] = predict(results)
    results["bars"] = judge(results)
    show(console, results)
    shared.finish(console, results, out / "decode_speed", draw)
    return shared.exit_status(results, arguments.check)


def weight_formats(arguments: Namespace) -> list[str | None]:
    """Return the engines' weight formats; None, first of them, stands for those of --dtype."""
    return [None, *dict.fromkeys(weights for weights in arguments.weights if weights != "float")]


def fitting(target: Target, prompts: Sequence[shared.Prompt], arguments: Namespace) -> list[list[int]]:
    """Return token ids of the first prompts that fit the context together with their answers."""
    room = target.max_length - arguments.max_new_tokens
    found = (ids for prompt in prompts if len(ids := shared.chat_ids(target, prompt.turns[0])) <= room)
    chosen = [ids for ids, _ in zip(found, range(max(arguments.limit, *arguments.batch)), strict=False)]
    if not chosen:
        raise shared.nothing_fits(target, arguments.max_new_tokens)
    return chosen


# ---- what is timed ----


class Engines:
    """Our engines over one target, in one format of its weights."""

    def __init__(self, target: Target, head: DraftHead, arguments: Namespace, weights: str | None = None) -> None:
        self.new_tokens, self.seed, self.weights = arguments.max_new_tokens, arguments.seed, weights
        format: dict[str, Any] = {} if weights is None else {"weights": weights}

        def build(head: DraftHead | None, **options: Any) -> Engine:
            engine = Engine(
                target,
                head,
                mode=arguments.mode,
                threads=arguments.threads,
                max_batch=max(arguments.batch),
                # all prompts in one step: none is decoded, and no clock runs, while another is still read
                prefill_chunk=max(arguments.batch) * target.max_length,
                speculation_length=max(arguments.speculation_length),
                **format,
                **options,
            )
            engine.warm_up()
            return engine

        self.plain = build(None, speculation="off")
        self.chain = build(head, speculation="chain")
        self.trees = {size: build(head, speculation="tree", tree_size=size) for size in arguments.tree}
        self.automatic = build(head, speculation="auto", tree_size=max([*arguments.tree, 1]))

    def variants(self, arguments: Namespace) -> list[Variant]:
        engines = [("plain", self.plain, None)]
        engines += [(f"chain {k}", self.chain, k) for k in arguments.speculation_length]
        engines += [(f"tree {size}", engine, None) for size, engine in self.trees.items()]
        engines += [("automatic", self.automatic, None)]
        settings = [
            (batch, temperature, rule)
            for batch in arguments.batch
            for temperature in arguments.temperature
            for rule in (arguments.rule if temperature else [None])
        ]
        return [
            Variant(
                Key(*setting, name, self.weights),
                self._decoding(engine, Speculation(num_tokens=k, rule=setting[2]), setting[1]),
            )
            for setting in settings
            for name, engine, k in engines
        ]

    def reading(self) -> Variant:
        """Return the reading of prompts, up to their first token."""
        params = SamplingParams(max_new_tokens=1, ignore_eos=True)

        def run(prompts: list[list[int]]) -> Timing:
            began = time.perf_counter()
            self.plain.generate(prompts, params)
            return Timing(sum(map(len, prompts)), time.perf_counter() - began)

        return Variant(Key(1, 0.0, None, "plain", self.weights), run)

    def _decoding(self, engine: Engine, speculation: Speculation, temperature: float) -> Callable[..., Timing]:
        params = SamplingParams(
            max_new_tokens=self.new_tokens, temperature=temperature, seed=self.seed, ignore_eos=True
        )

        def run(prompts: list[list[int]]) -> Timing:
            before = engine.stats()["seconds"]
            answers = engine.generate(prompts, params, speculation)
            parts = {name: total - before[name] for name, total in engine.stats()["seconds"].items()}
            stats = [answer.stats for answer in answers]
            return Timing(
                sum(one.emitted for one in stats),
                # rows of a batch are decoded together, and so each has seen the same seconds
                max(one.decode_seconds for one in stats),
                tuple(tuple(answer.token_ids) for answer in answers),
                sum(one.verifications for one in stats),
                sum(one.emitted for one in stats),
                tuple(parts.items()),
            )

        return run


def baselines(arguments: Namespace, dtype: torch.dtype, threads: int) -> list[Variant]:
    """Return transformers in the engine's dtype, and on a CPU in float32 too: some have nothing faster."""
    chosen = [name for name in arguments.baseline if name != "none"]
    kinds = [dtype] if torch.cuda.is_available() else [dtype, torch.float32]
    found = []
    for kind in dict.fromkeys(kinds) if chosen else []:
        target = load_target(arguments.target, kind, adapter=arguments.target_adapter)
        for batch in arguments.batch:
            for name in chosen:
                if batch > 1 and name == "prompt lookup":
                    continue

                def run(
                    prompts: list[list[int]], target: Target = target, options: dict[str, Any] = BASELINES[name]
                ) -> Timing:
                    return generate(target, prompts, arguments.baseline_tokens, options, threads)

                label = f"transformers {str(kind).removeprefix('torch.')}, {name}"
                found.append(Variant(Key(batch, 0.0, None, label), run))
    return found


@torch.inference_mode()
def generate(
    target: Target, prompts: list[list[int]], new_tokens: int, options: dict[str, Any], threads: int
) -> Timing:
    """Run transformers' greedy generate over left-padded prompts, EOS ignored; timed from when the prompts are read."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=target.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=target.device)
    began: list[float] = []

    def clock(input_ids: Tensor, scores: Tensor) -> Tensor:
        """Change nothing: a logits processor is first called when the prompt has been read."""
        if not began:
            wait_for(scores.device)
            began.append(time.perf_counter())
        return scores

    try:
        output = target.model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=0,
            logits_processor=[clock],
            **options,
        )
    finally:
        torch.set_num_threads(before)
    seconds = time.perf_counter() - began[0]
    outputs = tuple(tuple(row[width:].tolist()) for row in output)
    return Timing(sum(len(row) - 1 for row in outputs), seconds, outputs)


def external(target: Target, arguments: Namespace) -> list[Variant]:
    """Return the server of --server: the time of first tokens, requested alone, is subtracted."""
    url, new_tokens = arguments.server_url, arguments.max_new_tokens

    def run(prompts: list[list[int]]) -> Timing:
        texts = [target.tokenizer.decode(prompt) for prompt in prompts]

        def timed(count: int) -> tuple[int, float]:
            began = time.perf_counter()
            with ThreadPoolExecutor(len(texts)) as pool:
                tokens = sum(pool.map(lambda text: complete(url, text, count), texts))
            return tokens, time.perf_counter() - began

        first, prefill = timed(1)
        tokens, whole = timed(new_tokens)
        return Timing(tokens - first, max(whole - prefill, 1e-9))

    return [Variant(Key(batch, 0.0, None, "external server"), run) for batch in arguments.batch]


def complete(url: str, text: str, new_tokens: int) -> int:
    """Return the number of tokens of a greedy completion by a server with OpenAI's API."""
    with httpx.Client(base_url=url, timeout=600, trust_env=False) as client:
        model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        body = {"model": model, "prompt": text, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        return int(client.post("/v1/completions", json=body).raise_for_status().json()["usage"]["completion_tokens"])


# ---- lookup beside the head ----


def compare_lookup(
    console: Console,
    target: Target,
    head: DraftHead,
    chosen: shared.PromptSet,
    arguments: Namespace,
    command: Sequence[str],
) -> int:
    """Time plain decoding, the head alone and lookup beside it, in turns on each prompt. Answers end by themselves."""
    options: dict[str, Any] = dict(mode=arguments.mode, threads=arguments.threads, max_batch=1)
    engines = {
        "plain": Engine(target, speculation="off", **options),
        "head alone": Engine(target, head, lookup=False, **options),
        "automatic": Engine(target, head, **options),
    }
    for engine in engines.values():
        engine.warm_up()
    prompts = chosen.prompts if arguments.workload == "copy" else chosen.prompts[: arguments.limit]
    seconds, same = time_in_turns(engines, target, prompts, arguments)
    results = {
        "benchmark": MODULE,
        **shared.provenance(MODULE, command, target),
        "heads": [shared.head_provenance(arguments.head, arguments.head)],
        "prompts": chosen.provenance(len(prompts)),
        "settings": vars(arguments),
        "seconds_per_token": seconds,
        "identical": same,
        "lookup": {category: lookup_gains(times) for category, times in seconds.items()},
        "controller": engines["automatic"].stats()["speculation"],
    }
    name, least = ("copying prompts", 1.2) if arguments.workload == "copy" else ("chat", 0.98)
    overall = results["lookup"]["all"]["over_head"]["median"]
    results["bars"] = [at_least(f"lookup beside the head / the head alone, {name}", overall, least)]
    table = shared.make_table("lookup beside the head", ("prompts", "over the head alone", "over plain"), ("prompts",))
    for category, gains in results["lookup"].items():
        shown = (f"{each['median']:.2f} [{each['least']:.2f}, {each['most']:.2f}]" for each in gains.values())
        table.add_row(category, *shown)
    console.print(table)
    console.print(f"answers identical to plain decoding: {same:.0%}")
    shared.show_bars(console, results["bars"])
    shared.finish(console, results, shared.output_folder(arguments.out) / "decode_speed", draw_lookup)
    return shared.exit_status(results, arguments.check)


def time_in_turns(
    engines: dict[str, Engine], target: Target, prompts: Sequence[shared.Prompt], arguments: Namespace
) -> tuple[dict[str, dict[str, list[float]]], float]:
    """Return seconds per token by category, engine and repeat, and the share of answers that are those of plain.

    All prompts of a category, and all prompts ("all"), count together in a repeat; repeat 0 warms up.
    """
    spent: dict[str, dict[str, list[float]]] = {}
    tokens: dict[str, list[int]] = {}
    same = answers = 0
    names = list(engines)
    for repeat in range(arguments.repeats + 1):
        for turn, prompt in enumerate(prompts):
            ids = shared.chat_ids(target, prompt.turns[0])
            params = SamplingParams(arguments.max_new_tokens, seed=arguments.seed)
            shift = (repeat + turn) % len(names)
            done = {name: engines[name].generate([ids], params)[0] for name in names[shift:] + names[:shift]}
            for category in ("all", prompt.category) if repeat else ():
                counts = tokens.setdefault(category, [0] * arguments.repeats)
                counts[repeat - 1] += len(done["plain"].token_ids) - 1
                for name in names:
                    times = spent.setdefault(category, {}).setdefault(name, [0.0] * arguments.repeats)
                    times[repeat - 1] += done[name].stats.decode_seconds
            others = [answer.token_ids for name, answer in done.items() if name != "plain"]
            same += sum(ids == done["plain"].token_ids for ids in others)
            answers += len(others)
    per_token = {
        category: {name: [s / n for s, n in zip(each, tokens[category], strict=True)] for name, each in times.items()}
        for category, times in spent.items()
    }
    return per_token, same / answers


def lookup_gains(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return the speed of automatic speculation over that of the head alone, and over plain decoding."""

    def over(name: str) -> dict[str, float]:
        return spread([slow / fast for slow, fast in zip(seconds[name], seconds["automatic"], strict=True)])

    return {"over_head": over("head alone"), "over_plain": over("plain")}


def draw_lookup(results: dict[str, Any], path: Path) -> None:
    """Draw bars of the speeds over plain decoding, a panel for each category."""
    figure, axes = shared.make_figure(len(results["seconds_per_token"]), "speed over plain decoding, greedy")
    for axis, (category, seconds) in zip(axes, results["seconds_per_token"].items(), strict=True):
        plain = statistics.median(seconds["plain"])
        axis.barh(list(seconds), [plain / statistics.median(times) for times in seconds.values()])
        axis.set_title(category)
    shared.save_figure(figure, path)


# ---- one step, part by part, and the least that it can cost ----


def step_costs(plain: Engine, drafting: Engine) -> dict[str, Any]:
    """Return seconds of passes of the target over 1, 2, ... tokens, of a draft step and of a re-read, with logits.

    Medians over rounds in which every pass runs once, so that a slow moment of the machine affects all alike.
    """
    runs: dict[Any, Callable[[], object]] = {width: _target_pass(plain.models.runner, width) for width in WIDTHS}
    proposer = drafting.models.proposer
    if isinstance(proposer, HeadProposer):
        state = proposer.join()
        for name, length, read in (("one", 1, 0), ("long", LONG_CHAIN, 0), ("read", 1, 2)):
            runs[name] = _chain(proposer, state, length, read)
    timings: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(1 + STEP_ROUNDS):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            wait_for(plain.target.device)
            timings[name].append(time.perf_counter() - began)
    seconds = {name: statistics.median(times[1:]) for name, times in timings.items()}
    costs: dict[str, Any] = {"target": {width: seconds[width] for width in WIDTHS}}
    if isinstance(proposer, HeadProposer):  # what a longer chain, and two tokens to read, take in addition
        proposer.leave(state)
        costs["draft"] = (seconds["long"] - seconds["one"]) / (LONG_CHAIN - 1)
        costs["re-read"] = seconds["read"] - costs["draft"]
    return costs


def _target_pass(runner: TargetRunner, width: int) -> Callable[[], object]:
    @torch.inference_mode()
    def run() -> object:
        slot = runner.cache.acquire()
        runner.cache.lengths[slot] = PAST
        hidden, _ = runner.forward(RaggedBatch.of([Segment(slot, PAST, PAST, [1] * width)], runner.target.device))
        choices = greedy_choices(runner.logits(hidden), runner.compiled)
        runner.cache.release(slot)
        return choices

    return run


def _chain(proposer: HeadProposer, state: HeadState, length: int, read: int) -> Callable[[], object]:
    """Return a greedy chain after `read` tokens that the target has just accepted."""
    runner = proposer.runner
    features = len(proposer.layers) * runner.head.config.hidden_size
    auxiliary = torch.zeros(PAST, features, dtype=runner.dtype, device=runner.embedding.weight.device)

    @torch.inference_mode()
    def run() -> object:
        proposer.observe(state, [1] * read, auxiliary[:read])
        chain = proposer.propose([Job(state, length, 0, rule)])
        runner.cache.lengths[state.slot] = PAST
        return chain

    rule = make_rule("shared-noise", SamplingParams(), 0, runner.chains is not None)
    proposer.observe(state, [1] * PAST, auxiliary)
    run()
    return run


def read_bandwidth(threads: int, device: torch.device) -> float:
    """Return bytes per second at which these threads read memory: the best of some sums over 1 GiB."""
    before = torch.get_num_threads()
    data = torch.ones(2**28, dtype=torch.float32, device=device)
    torch.set_num_threads(threads)
    try:
        timings = []
        for _ in range(5):
            began = time.perf_counter()
            data.sum().item()
            timings.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    return data.nbytes / min(timings)


def weight_bytes(engine: Engine) -> int:
    """Return the bytes of the target's weights that a plain step reads, each counted once.

    Counted are all parameters and buffers of the decoder and of the LM head, with these rules:
      - an LM head that is tied to the embedding once;
      - an embedding that is not the LM head not at all: a step reads one row of it.
    """
    target = engine.models.runner.target
    read: dict[int, Tensor] = {}
    for module in (*target.decoder.modules(), *target.lm_head.modules()):
        if module is target.embedding:
            continue
        tensors = dict([*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)])
        read |= {tensor.data_ptr(): tensor for tensor in tensors.values()}
    return sum(tensor.nbytes for tensor in read.values())


def floor(size: int, bandwidth: float) -> dict[str, float]:
    """Return the least that a plain step can take: its weights are read once."""
    return {"weight_bytes": size, "read_bytes_per_second": bandwidth, "seconds": size / bandwidth}


# ---- beside another process, and after a start ----


def busy_share(run: Callable[[], Timing], repeats: int) -> float:
    """Return tokens per second beside a busy process / alone; the best of some runs each, alternating."""
    alone, beside = [], []
    for _ in range(repeats):
        alone.append(run().rate)
        process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            time.sleep(0.5)
            beside.append(run().rate)
        finally:
            process.kill()
            process.wait()
    return max(beside) / max(alone)


def second_start(options: list[str], new_tokens: int = 96) -> dict[str, float]:
    """Return seconds from the command of a server's second start to its first answer at 80 % of full speed."""
    for _ in range(2):
        began = time.monotonic()
        with draft_serve(options) as server:
            ready = time.monotonic() - began
            rates = []
            for _ in range(4):
                sent = time.monotonic()
                complete(server.url, "Tell me a story about a lighthouse.", new_tokens)
                rates.append((new_tokens / (time.monotonic() - sent), time.monotonic() - began))
    full = max(rate for rate, _ in rates)
    return {"ready": ready, "start": next(ended for rate, ended in rates if rate >= 0.8 * full)}


# ---- figures ----


def summarise(samples: Samples) -> list[dict[str, Any]]:
    """Return a row for each variant: rates, ratios to plain decoding of the same batch and temperature, counts."""
    rows = []
    order = {(key.name, key.weights): place for place, key in enumerate(samples)}
    by_setting = sorted(samples.items(), key=lambda item: (item[0][:2], item[0].rule or "", order[item[0][3:]]))
    for key, timings in by_setting:
        plain = samples.get(key._replace(name="plain"), [])
        plain = plain or samples.get(Key(key.batch, 0.0, None, "plain", key.weights), [])
        ratios = [one.rate / other.rate for one, other in zip(timings, plain, strict=False)]
        last = timings[-1]
        outputs = list(zip(last.outputs, plain[-1].outputs, strict=False)) if plain else []
        steps = sum(timing.verifications for timing in timings)
        rows.append(
            {
                **key._asdict(),
                "repeats": len(timings),
                "tokens_per_second": spread([timing.rate for timing in timings]),
                "over_plain": spread(ratios) if ratios else None,
                "acceptance_length": last.emitted / last.verifications if last.verifications else None,
                "milliseconds_per_verification": {
                    name: 1e3 * sum(dict(timing.parts)[name] for timing in timings) / steps * key.batch
                    for name, _ in last.parts
                }
                if steps
                else None,
                # of answers of the same length; transformers' are shorter
                "identical": sum(a == b[: len(a)] for a, b in outputs) / len(outputs) if outputs else None,
            }
        )
    return rows


def find(
    results: dict[str, Any], name: str, batch: int = 1, temperature: float = 0.0, weights: str | None = None
) -> dict[str, Any] | None:
    """Return the row of a variant, of its first rule where there are several."""
    wanted = {"name": name, "batch": batch, "temperature": temperature, "weights": weights}
    return next((row for row in results["rates"] if wanted.items() <= row.items()), None)


def own(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of engines with the target's weights as they are."""
    return [row for row in results["rates"] if row["weights"] is None]


def predict(results: dict[str, Any]) -> dict[str, Any] | None:
    """Return τ / (verify + K draft + re-read) by the measured step costs, of the best greedy chain at batch 1."""
    steps = results["steps"]
    if "draft" not in steps:
        return None
    widths = {int(width): seconds for width, seconds in steps["target"].items()}
    best: dict[str, Any] = {"name": "plain", "tokens_per_second": 1 / widths[1], "over_plain": 1.0}
    for row in own(results):
        kind, _, length = row["name"].partition(" ")
        if kind != "chain" or row["batch"] != 1 or row["temperature"] != 0 or not row["acceptance_length"]:
            continue
        k = int(length)
        seconds = float(np.interp(k + 1, list(widths), list(widths.values()))) + k * steps["draft"] + steps["re-read"]
        rate = row["acceptance_length"] / seconds
        if rate > best["tokens_per_second"]:
            best = {"name": row["name"], "tokens_per_second": rate, "over_plain": rate * widths[1]}
    return best


def judge(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each bar with the figure of this run; met is None where the run did not measure it."""
    steps = {int(width): seconds for width, seconds in results["steps"]["target"].items()}
    plain, automatic = find(results, "plain"), find(results, "automatic")
    generate = find(results, f"transformers {results['settings']['dtype']}, dynamic cache")
    bars = [
        at_most("plain step / reading its weights", steps[1] / results["floor"]["seconds"], 1.6),
        at_least("plain / transformers generate", _ratio(plain, generate), 2.5),
        at_most("verifying 8 tokens / plain step", steps[8] / steps[1], 1.25),
        at_most("verifying 16 tokens / plain step", steps[16] / steps[1], 1.7),
    ]
    if "draft" in results["steps"]:
        bars.append(at_most("draft step / plain step", results["steps"]["draft"] / steps[1], 0.06))
    chains = [row for row in own(results) if row["name"].startswith("chain") and row["batch"] == 1]
    tau = max((row["acceptance_length"] or 1.0 for row in chains if row["temperature"] == 0), default=1.0)
    owed = 1.6 if tau >= GOOD_HEAD else 1.1 if tau >= 1.9 else 1.0
    best = results["predicted"]
    if automatic and best:
        reached = automatic["tokens_per_second"]["median"] / best["tokens_per_second"]
        bars.append(at_least("automatic / what the costs predict", reached, 0.9))
        bars.append(at_least("automatic / plain, batch 1", automatic["over_plain"]["median"], owed))
        if tau >= GOOD_HEAD:
            bars.append(at_least("automatic / transformers generate", _ratio(automatic, generate), 4.0))
    for row in results["rates"]:
        if row["name"] != "automatic" or (row["batch"], row["temperature"], row["weights"]) == (1, 0, None):
            continue
        name = f"automatic / plain, batch {row['batch']}, temperature {row['temperature']:g}"
        name += "".join(f", {row[part]}" for part in ("rule", "weights") if row[part])
        good = (row["batch"], row["temperature"]) == (1, 1) and tau >= GOOD_HEAD
        bars.append(at_least(name, row["over_plain"]["median"], 1.25 if good else 0.98))
    bars.append(at_least("plain, batch 8 / batch 1", _ratio(find(results, "plain", batch=8), plain), 4.0))
    surroundings = results.get("surroundings") or {}
    bars.append(at_least("plain beside a busy process / alone", surroundings.get("busy_share"), 1 / 3))
    bars.append(at_most("seconds from the second start to 80 % of full speed", surroundings.get("start"), 20))
    bars.append(at_least("plain, int8 / plain", _ratio(find(results, "plain", weights="int8"), plain), 1.7))
    return bars + llama_cpp.judge(results["llama_cpp"])


def _ratio(row: dict[str, Any] | None, other: dict[str, Any] | None) -> float | None:
    if row is None or other is None:
        return None
    return row["tokens_per_second"]["median"] / other["tokens_per_second"]["median"]


# ---- table and picture ----


def show(console: Console, results: dict[str, Any]) -> None:
    steps, least = results["steps"], results["floor"]
    widths = {int(width): seconds for width, seconds in steps["target"].items()}
    console.print(_table(results))
    console.print(
        f"floor of a plain step: {least['weight_bytes'] / 1e6:.0f} MB at "
        f"{least['read_bytes_per_second'] / 1e9:.1f} GB/s = {1e3 * least['seconds']:.1f} ms; measured "
        f"{1e3 * widths[1]:.1f} ms, {widths[1] / least['seconds']:.2f} times that"
    )
    passes = ", ".join(f"{width}: {1e3 * s:.1f} ms ({s / widths[1]:.2f})" for width, s in widths.items())
    console.print(f"a pass over so many tokens (times a plain step): {passes}")
    if "draft" in steps:
        console.print(
            f"a draft step {1e3 * steps['draft']:.2f} ms ({steps['draft'] / widths[1]:.1%} of a plain step), "
            f"a re-read {1e3 * steps['re-read']:.2f} ms"
        )
    if results["predicted"]:
        best = results["predicted"]
        console.print(
            f"best by these costs: {best['name']}, {best['tokens_per_second']:.1f} tokens/s, "
            f"{best['over_plain']:.2f} times plain"
        )
    if results["llama_cpp"]:
        llama_cpp.show(console, results["llama_cpp"])
    shared.show_bars(console, results["bars"])


def _table(results: dict[str, Any]) -> Table:
    headings = ("batch", "T", "variant", "tokens/s", "spread", "of plain", "tau", "ms a verification", "identical")
    title = f"decode speed, {results['settings']['dtype']}, {results['threads']} threads"
    table = shared.make_table(title, headings, ("variant", "ms a verification"))
    for row in results["rates"]:
        rate, ratio, parts = row["tokens_per_second"], row["over_plain"], row["milliseconds_per_verification"]
        table.add_row(
            str(row["batch"]),
            f"{row['temperature']:g}",
            row["name"] + "".join(f", {row[part]}" for part in ("weights", "rule") if row[part]),
            f"{rate['median']:.1f}",
            f"{rate['least']:.1f}-{rate['most']:.1f}",
            f"{ratio['median']:.2f} [{ratio['least']:.2f}, {ratio['most']:.2f}]" if ratio else "-",
            f"{row['acceptance_length']:.2f}" if row["acceptance_length"] else "-",
            ", ".join(f"{name} {value:.1f}" for name, value in parts.items()) if parts else "-",
            f"{row['identical']:.0%}" if row["identical"] is not None else "-",
        )
    return table


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw bars of tokens per second, a panel for each batch size; greedy only."""
    sizes = sorted({row["batch"] for row in results["rates"]})
    figure, axes = shared.make_figure(len(sizes), "decode speed, greedy, tokens per second")
    for axis, size in zip(axes, sizes, strict=True):
        rows = [row for row in results["rates"] if row["batch"] == size and row["temperature"] == 0]
        medians = [row["tokens_per_second"]["median"] for row in rows]
        errors = [
            [m - row["tokens_per_second"]["least"] for m, row in zip(medians, rows, strict=True)],
            [row["tokens_per_second"]["most"] - m for m, row in zip(medians, rows, strict=True)],
        ]
        names = [row["name"] + (f", {row['weights']}" if row["weights"] else "") for row in rows]
        axis.barh(names, medians, xerr=errors)
        axis.invert_yaxis()
        axis.set_title(f"batch {size}")
    shared.save_figure(figure, path)


main = partial(shared.run_program, parse, benchmark)

if __name__ == "__main__":
    sys.exit(main())
