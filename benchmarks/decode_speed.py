"""Decoding speed: our engine with and without speculation, against transformers, and against what a step must cost.

Decode only: the clock starts when the prompts have been read. All variants run in one process, in an order that
rotates from repeat to repeat; figures are medians over repeats, ratios are taken within a repeat. EOS is ignored, so
that every answer has the same length.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks import cli, decode_bars, output, prompt_sets, provenance
from benchmarks import decode_report as report
from benchmarks.decode_baselines import GENERATE, Timing, complete, generate, served
from benchmarks.decode_steps import read_bandwidth, step_costs, weight_bytes
from benchmarks.decode_surroundings import busy_share, second_start
from draft.errors import UserError
from draft.heads import DraftHead
from draft.heads.checkpoint import attach_head, load_head
from draft.target import Target, load_target
from serving.engine import Engine, SamplingParams, Speculation
from serving.engine.setup import MODES
from serving.engine.verification import RULES

MODULE = "benchmarks.decode_speed"
EXAMPLES = f"""
examples:
  batch 1, with what a user would run instead (some 15 minutes on two cores):
    python -m {MODULE} --target smollm2 --head smollm2-eagle3 --out runs/decode_speed
  how it scales, without the baselines:
    python -m {MODULE} --target smollm2 --head smollm2-eagle3 --batch 1 2 4 8 16 --baseline none --out runs/decode_speed
"""
BASELINES = ("none", *GENERATE)


@dataclass(frozen=True)
class Variant:
    """One way to decode a batch of prompts."""

    name: str
    batch: int
    run: Callable[[list[list[int]]], Timing]
    temperature: float = 0.0
    rule: str | None = None
    speculation_length: int = 0  # of chains


class Engines:
    """Our engines over one target; they share its weights."""

    def __init__(self, target: Target, head: DraftHead, arguments: Namespace) -> None:
        self.new_tokens, self.seed = arguments.max_new_tokens, arguments.seed
        self.target = target

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
                **options,
            )
            engine.warm_up()
            return engine

        self.plain = build(None, speculation="off")
        self.chain = build(head, speculation="chain")
        self.trees = {size: build(head, speculation="tree", tree_size=size) for size in arguments.tree}
        self.automatic = build(head, speculation="auto", tree_size=max([*arguments.tree, 1]))

    def variants(self, arguments: Namespace) -> list[Variant]:
        found = []
        for batch in arguments.batch:
            for temperature in arguments.temperature:
                for rule in arguments.rule if temperature else [None]:
                    found += self._variants(batch, temperature, rule, arguments)
        return found

    def _variants(self, batch: int, temperature: float, rule: str | None, arguments: Namespace) -> list[Variant]:
        def variant(name: str, engine: Engine, length: int = 0) -> Variant:
            wishes = Speculation(num_tokens=length or None, rule=rule)
            run = self._decode(engine, wishes, temperature)
            return Variant(name, batch, run, temperature, rule, length)

        chains = [variant(f"chain {k}", self.chain, k) for k in arguments.speculation_length]
        trees = [variant(f"tree {size}", engine) for size, engine in self.trees.items()]
        return [variant("plain", self.plain), *chains, *trees, variant("automatic", self.automatic)]

    def _decode(self, engine: Engine, wishes: Speculation, temperature: float) -> Callable[[list[list[int]]], Timing]:
        params = SamplingParams(
            max_new_tokens=self.new_tokens, temperature=temperature, seed=self.seed, ignore_eos=True
        )

        def run(prompts: list[list[int]]) -> Timing:
            before = engine.stats()["seconds"]
            answers = engine.generate(prompts, params, wishes)
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
    """transformers in the engine's dtype, and on a CPU in float32 where that is another: some know nothing faster."""
    chosen = [name for name in arguments.baseline if name != "none"]
    found = []
    kinds = [dtype] if torch.cuda.is_available() else [dtype, torch.float32]
    for kind in dict.fromkeys(kinds) if chosen else []:
        target = load_target(arguments.target, kind, adapter=arguments.target_adapter)
        for batch in arguments.batch:
            for name in chosen:
                if batch > 1 and name == "prompt lookup":
                    continue

                def run(
                    prompts: list[list[int]], target: Target = target, options: dict[str, Any] = GENERATE[name]
                ) -> Timing:
                    return generate(target, prompts, arguments.baseline_tokens, options, threads)

                label = str(kind).removeprefix("torch.")
                found.append(Variant(f"transformers {label}, {name}", batch, run))
    return found


def fitting(target: Target, prompts: Sequence[prompt_sets.Prompt], arguments: Namespace) -> list[list[int]]:
    """Token ids of the first prompts that fit the context with their answers, under the target's chat template."""
    wanted, found = max(arguments.limit, *arguments.batch), list[list[int]]()
    for prompt in prompts:
        ids = target.encode_chat([{"role": "user", "content": prompt.turns[0]}], add_generation_prompt=True)
        if len(ids) + arguments.max_new_tokens <= target.max_length and len(found) < wanted:
            found.append(ids)
    if not found:
        raise UserError(
            f"none of the prompts fits the target's {target.max_length} tokens with {arguments.max_new_tokens} new "
            "ones; take shorter ones."
        )
    return found


def batches(ids: list[list[int]], size: int) -> list[list[list[int]]]:
    """The prompts in groups of `size`; the last one is filled up from the beginning."""
    count = -(-len(ids) // size)
    return [[ids[(group * size + place) % len(ids)] for place in range(size)] for group in range(count)]


def measure(variants: list[Variant], groups: dict[int, list[list[list[int]]]], repeats: int) -> report.Samples:
    """Time every variant `repeats` times over its batches; repeat 0 warms up and is not kept."""
    samples: report.Samples = {report.Key.of(variant): [] for variant in variants}
    with cli.progress_bar() as progress:
        bar = progress.add_task("decoding", total=len(variants) * (repeats + 1))
        try:
            for repeat in range(repeats + 1):
                shift = repeat % len(variants)
                for variant in variants[shift:] + variants[:shift]:
                    wanted = groups[variant.batch] if repeat else groups[variant.batch][:1]
                    timings = [variant.run(prompts) for prompts in wanted]
                    if repeat:
                        samples[report.Key.of(variant)].append(report.pool(timings))
                    progress.advance(bar)
        except KeyboardInterrupt:
            if not any(samples.values()):
                raise
    return {key: timings for key, timings in samples.items() if timings}


def parse(arguments: Sequence[str]) -> Namespace:
    parser = cli.Parser(prog=f"python -m {MODULE}", description=__doc__, epilog=EXAMPLES)
    whole = cli.whole(1)
    options: dict[str, dict[str, Any]] = {
        "--target": {"required": True, "help": "hub id, folder, .gguf file, or smollm2"},
        "--target-adapter": {"metavar": "DIR", "help": "PEFT LoRA adapter of the target, merged in memory"},
        "--head": {"required": True, "help": "a head's folder, or smollm2-eagle3"},
        "--prompts": {"metavar": "FILE", "help": "JSONL with turns, prompt or question (default: benchmarks/prompts/)"},
        "--batch": {"type": whole, "nargs": "+", "default": [1], "metavar": "N", "help": "prompts at once; default: 1"},
        "--speculation-length": {"type": whole, "nargs": "+", "default": [1, 2, 3, 4, 5, 6, 7, 8], "metavar": "K"},
        "--tree": {"type": cli.whole(2), "nargs": "*", "default": [16], "metavar": "N", "help": "sizes of trees"},
        "--temperature": {"type": cli.real(0, 100), "nargs": "+", "default": [0.0], "metavar": "T"},
        "--rule": {"choices": RULES, "nargs": "+", "default": list(RULES), "help": "for temperatures above 0"},
        "--baseline": {"choices": BASELINES, "nargs": "+", "default": list(GENERATE), "help": "of transformers"},
        "--vs": {"metavar": "COMMAND", "help": "start this server and time it on the same prompts"},
        "--vs-url": {"metavar": "URL", "default": "http://127.0.0.1:8000", "help": "of its OpenAI API"},
        "--repeats": {"type": whole, "default": 5, "metavar": "N", "help": "default: %(default)s"},
        "--limit": {"type": whole, "default": 5, "metavar": "N", "help": "prompts, or --batch if more; default: 5"},
        "--max-new-tokens": {"type": cli.whole(2), "default": 128, "metavar": "N", "help": "default: %(default)s"},
        "--baseline-tokens": {"type": cli.whole(2), "default": 32, "metavar": "N", "help": "transformers' answers"},
        "--seed": {"type": cli.whole(0), "default": 0, "metavar": "N", "help": "default: %(default)s"},
        "--dtype": {"default": "bfloat16", "help": "auto, bfloat16 (default), float16, float32 or float64"},
        "--mode": {"choices": MODES, "default": "auto", "help": "default: %(default)s"},
        "--threads": {"type": whole, "metavar": "N", "help": "CPU threads (default: all of this process's)"},
        "--check": {"action": "store_true", "help": "print the bars, and exit 1 when one is missed"},
        "--out": {"required": True, "metavar": "DIR", "help": "folder for decode_speed.json and .png"},
    }
    for name, settings in options.items():
        parser.add_argument(name, **settings)
    parsed = parser.parse_args(arguments)
    if min(parsed.tree, default=max(parsed.speculation_length) + 1) <= max(parsed.speculation_length):
        parser.error("a --tree needs more nodes than the largest --speculation-length, which is its depth")
    return parsed


def benchmark(arguments: Namespace, command: Sequence[str]) -> int:
    console = cli.make_console()
    out = cli.output_folder(arguments.out)
    disable_progress_bar()
    chosen = prompt_sets.load_prompts(arguments.prompts)
    target = load_target(arguments.target, arguments.dtype, adapter=arguments.target_adapter)
    head, about = load_head(arguments.head, dtype=target.dtype, device=target.device)
    attach_head(head, about, target)
    threads = arguments.threads or provenance.cores()
    others = baselines(arguments, target.dtype, threads)
    engines = Engines(target, head, arguments)
    ids = fitting(target, chosen.prompts, arguments)
    groups = {size: batches(ids, size) for size in arguments.batch}
    bandwidth = read_bandwidth(threads, target.device)
    costs = step_costs(engines.plain, engines.chain, repeats=15)
    with ExitStack() as stack:
        variants = [*engines.variants(arguments), *others]
        if arguments.vs:
            stack.enter_context(served(arguments.vs, arguments.vs_url))
            variants += _external(target, arguments)
        samples = measure(variants, groups, arguments.repeats)
    results = {
        "benchmark": MODULE,
        **provenance.provenance(MODULE, command, target),
        "heads": [provenance.head_provenance(arguments.head, arguments.head)],
        "prompts": {"files": chosen.files, "sha256": chosen.sha256, "count": len(ids)},
        "settings": vars(arguments),
        "mode": engines.plain.mode,
        "threads": threads,
        "floor": report.floor(weight_bytes(engines.plain), bandwidth),
        "steps": costs,
        "rates": report.summarise(samples),
        "controller": engines.automatic.stats()["speculation"],
    }
    if arguments.check:
        results["surroundings"] = surroundings(engines, groups, arguments)
    results["predicted"] = report.predict(results)
    results["bars"] = decode_bars.judge(results)
    report.show(console, results)
    output.write_results(out / "decode_speed.json", results)
    report.draw(results, out / "decode_speed.png")
    console.print(f"wrote {out / 'decode_speed.json'} and {out / 'decode_speed.png'}", soft_wrap=True)
    missed = [bar for bar in results["bars"] if bar["met"] is False]
    return 1 if arguments.check and missed else 0


def surroundings(engines: Engines, groups: dict[int, list[list[list[int]]]], arguments: Namespace) -> dict[str, Any]:
    """What needs other processes."""
    variant = engines.variants(arguments)[0]
    prompts = groups[variant.batch][0]
    options = ["--target", arguments.target, "--head", arguments.head, "--dtype", arguments.dtype]
    return {
        "busy_share": busy_share(lambda: variant.run(prompts), arguments.repeats),
        **second_start([*options, "--mode", arguments.mode], "Tell me a story about a lighthouse."),
    }


def _external(target: Target, arguments: Namespace) -> list[Variant]:
    def run(prompts: list[list[int]]) -> Timing:
        texts = [target.tokenizer.decode(prompt) for prompt in prompts]
        return complete(arguments.vs_url, texts, arguments.max_new_tokens)

    return [Variant("external server", batch, run) for batch in arguments.batch]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark with command-line arguments; gives the exit status."""
    command = list(sys.argv[1:] if arguments is None else arguments)
    parsed = parse(command)
    return cli.run_program(lambda: benchmark(parsed, command))


if __name__ == "__main__":
    sys.exit(main())
