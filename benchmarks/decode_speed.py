"""Decoding speed: our engine with and without speculation, against transformers, and against what a step must cost.

Decoding only: the clock starts when the prompts have been read. All variants run in one process, in an order that
rotates from repeat to repeat; figures are medians over repeats, ratios are taken within a repeat. EOS is ignored, so
that every answer has the same length.
"""

from __future__ import annotations

import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from benchmarks import llama_cpp, shared
from benchmarks.baselines import BASELINES, baselines, external
from benchmarks.decode_figures import draw, judge, predict, show, summarise
from benchmarks.lookup_speed import COPYING, compare_lookup
from benchmarks.step_costs import floor, read_bandwidth, step_costs, weight_bytes
from benchmarks.surroundings import busy_share, second_start
from benchmarks.timing import Key, Timing, Variant, batches, measure
from draft.heads import DraftHead
from draft.target import Target, load_target
from serving.engine import Engine, SamplingParams, Speculation
from serving.engine.setup import MODES, WEIGHTS
from serving.engine.verification import RULES

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
# options that --workload does not look at
NOT_OF_WORKLOADS = (
    "batch", "speculation_length", "tree", "temperature", "rule", "baseline", "baseline_tokens", "vs", "llama_cpp",
    "server", "server_url", "weights",
)  # fmt: skip
LIMIT = 5  # prompts

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
    parser.add("--limit", whole, metavar="N", help=f"prompts, or --batch if more (default: {LIMIT})")
    parser.add("--max-new-tokens", shared.whole(2), default=128, metavar="N")
    parser.add("--baseline-tokens", shared.whole(2), default=32, metavar="N", help="of transformers' answers")
    parser.add("--seed", shared.whole(0), default=0, metavar="N")
    parser.add_dtype("bfloat16")
    parser.add("--mode", choices=MODES, default="auto")
    parser.add("--threads", whole, metavar="N", help="CPU threads (default: all of this process's)")
    parser.add_output(MODULE)
    parsed = parser.parse_args(arguments)
    if parsed.workload:
        ignored = [name for name in NOT_OF_WORKLOADS if getattr(parsed, name) != parser.get_default(name)]
        ignored += ["limit"] if parsed.workload == "copy" and parsed.limit is not None else []
        if ignored:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in ignored)
            parser.error(f"--workload {parsed.workload} takes no {names}: it would have no effect; leave it out")
    if parsed.limit is None and parsed.workload != "copy":  # which takes all of its prompts
        parsed.limit = LIMIT
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
    about = {
        "benchmark": MODULE,
        **shared.provenance(MODULE, command, target),
        "heads": [shared.head_provenance(arguments.head, arguments.head)],
    }
    if arguments.workload:
        return compare_lookup(console, target, head, chosen, arguments, about)
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
        **about,
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


main = partial(shared.run_program, parse, benchmark)

if __name__ == "__main__":
    sys.exit(main())
