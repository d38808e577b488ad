"""Acceptance length and decoding speed of draft heads, by decoding for real through the engine.

Every prompt is decoded once without speculation, and once for each head, rule and speculation length, in the same
run and in an order that rotates from prompt to prompt. A second turn is asked after the target's own plain answer
to the first, so that every variant sees the same context.

  τ           tokens emitted / verifications, bonus token included; the token that the prefill gives is not counted
  α           tokens accepted / drafted, also by position
  [low, high] 95 % bootstrap interval, resampling prompts
  speed-up    tokens/s while decoding (without prefill), over the same prompts decoded plainly
  identical   share of answers whose tokens equal the plain ones; under shared noise that is the promise at every
              temperature (float32 and bfloat16 may differ at near ties), under rejection only the distribution is equal

At temperature 0 the rules coincide: it is decoded once and called greedy. Above 0 a prompt's seed is the first 63
bits of sha256("SEED:ID:TURN"), SEED being --seed: the same for every variant, and in any selection of prompts.
"""

from __future__ import annotations

import hashlib
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from benchmarks import acceptance_report as report
from benchmarks import cli, output, prompt_sets, provenance
from benchmarks.acceptance_report import Variant
from benchmarks.prompt_sets import Prompt
from draft.errors import UserError
from draft.heads.checkpoint import attach_head, load_head
from draft.target import Target, load_target
from serving.engine import Completion, Engine, SamplingParams, Speculation
from serving.engine.setup import MODES
from serving.engine.verification import RULES

MODULE = "benchmarks.acceptance_length"
EXAMPLES = f"""
examples:
  a first look in a few minutes, one prompt a category:
    python -m {MODULE} --target smollm2 --head smollm2-eagle3 --temperature 0 --limit 8 --out runs/tau
  two heads, paired by prompt, on your own questions:
    python -m {MODULE} --target smollm2 --head smollm2-eagle3 --head runs/adapted \\
        --prompts questions.jsonl --speculation-length 5 --out runs/tau
"""


# ---- decoding ----


class Measurement:
    """The engines of one run, and how each prompt goes through them."""

    def __init__(self, target: Target, heads: dict[str, Any], arguments: Namespace) -> None:
        self.target = target
        self.max_new_tokens = arguments.max_new_tokens
        self.seed = arguments.seed
        self.engines = {
            # chains of a fixed length: what is measured is the head, not the controller
            name: Engine(
                target,
                head,
                speculation="chain",
                speculation_length=max(arguments.speculation_length),
                mode=arguments.mode,
                max_batch=1,
                threads=arguments.threads,
            )
            for name, head in heads.items()
        }
        self.variants = {
            temperature: plan(temperature, list(heads), arguments.rule, arguments.speculation_length)
            for temperature in arguments.temperature
        }

    def decodes(self, prompt: Prompt) -> int:
        return len(prompt.turns) * sum(map(len, self.variants.values()))

    def decode(self, variant: Variant, prompt_ids: list[int], seed: int, max_new_tokens: int) -> Completion:
        # plain decoding goes through the first head's engine: the same code and models, speculation off
        engine = self.engines[variant.head] if variant.head else next(iter(self.engines.values()))
        wishes = Speculation(
            enabled=variant.head is not None,
            num_tokens=variant.speculation_length or None,
            rule=variant.rule if variant.rule in RULES else None,
        )
        params = SamplingParams(max_new_tokens=max_new_tokens, temperature=variant.temperature, seed=seed)
        return engine.generate([prompt_ids], params, wishes)[0]

    def warm_up(self) -> None:
        """One short untimed decode of each variant, since the first of its kind pays for what it sets up."""
        ids = self.target.encode_chat([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
        for variants in self.variants.values():
            for variant in variants:
                self.decode(variant, ids, seed=0, max_new_tokens=8)

    def run(self, index: int, prompt: Prompt, done: Callable[[], object]) -> list[dict[str, Any]] | None:
        """The records of all variants and turns of one prompt; None when it doesn't fit the target's context."""
        records = []
        for variants in self.variants.values():
            history: list[dict[str, str]] = []
            shift = index % len(variants)
            for turn, text in enumerate(prompt.turns):
                history.append({"role": "user", "content": text})
                ids = self.target.encode_chat(history, add_generation_prompt=True)
                if len(ids) + self.max_new_tokens > self.target.max_length:
                    return None
                seed = seed_of(self.seed, prompt.id, turn)
                completions = {}
                for variant in variants[shift:] + variants[:shift]:
                    completions[variant] = self.decode(variant, ids, seed, self.max_new_tokens)
                    done()
                plain = completions[variants[0].plain]
                records += [record(prompt, turn, variant, completions[variant], plain) for variant in variants]
                history.append({"role": "assistant", "content": plain.text})
        return records


def plan(temperature: float, heads: list[str], rules: Sequence[str], lengths: Sequence[int]) -> list[Variant]:
    """Plain decoding and every variant at one temperature."""
    chosen = rules if temperature > 0 else ("greedy",)
    variants = [Variant(temperature, head, rule, k) for head in heads for rule in chosen for k in lengths]
    return [Variant(temperature), *variants]


def seed_of(seed: int, prompt_id: str, turn: int) -> int:
    """The prompt's own seed, whatever else is in the run."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{prompt_id}:{turn}".encode()).digest()[:8], "big") >> 1


def record(prompt: Prompt, turn: int, variant: Variant, completion: Completion, plain: Completion) -> dict[str, Any]:
    """One decode as the JSON holds it."""
    stats = completion.stats
    pairs = enumerate(zip_longest(completion.token_ids, plain.token_ids))
    return {
        "prompt": prompt.id,
        "category": prompt.category,
        "turn": turn,
        **vars(variant),
        "seed": completion.seed,
        "prompt_tokens": len(completion.prompt_ids),
        "tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "emitted": stats.emitted,
        "verifications": stats.verifications,
        "drafted_per_position": list(stats.drafted_per_position),
        "accepted_per_position": list(stats.accepted_per_position),
        "prefill_seconds": stats.prefill_seconds,
        "decode_seconds": stats.decode_seconds,
        # index of the first token that differs from the plain answer's, null when none does
        "first_difference": next((at for at, (ours, theirs) in pairs if ours != theirs), None),
    }


# ---- the program ----


def parse(arguments: Sequence[str]) -> Namespace:
    parser = cli.Parser(prog=f"python -m {MODULE}", description=__doc__, epilog=EXAMPLES)
    options: dict[str, dict[str, Any]] = {
        "--target": {"required": True, "help": "hub id, folder, .gguf file, or smollm2"},
        "--target-adapter": {"metavar": "DIR", "help": "PEFT LoRA adapter of the target, merged in memory"},
        "--head": {
            "required": True,
            "action": "append",
            "help": "a head's folder, or smollm2-eagle3; repeatable",
        },
        "--prompts": {"metavar": "FILE", "help": "JSONL with turns, prompt or question (default: benchmarks/prompts/)"},
        "--temperature": {"type": cli.real(0, 100), "default": [0.0, 1.0], "metavar": "T"},
        "--speculation-length": {"type": cli.whole(1), "default": [1, 2, 3, 4, 5, 6, 8], "metavar": "K"},
        "--rule": {"choices": RULES, "default": list(RULES)},
        "--max-new-tokens": {"type": cli.whole(2), "default": 128, "metavar": "N", "help": "default: %(default)s"},
        "--limit": {"type": cli.whole(1), "metavar": "N", "help": "only N prompts, the categories taking turns"},
        "--seed": {"type": cli.whole(0), "default": 0, "metavar": "N", "help": "default: %(default)s"},
        "--dtype": {"default": "auto", "help": "auto (default), bfloat16, float16, float32 or float64"},
        "--mode": {
            "choices": MODES,
            "default": "auto",
            "help": "compiled kernels (CPU), or eager; default: %(default)s",
        },
        "--threads": {"type": cli.whole(1), "metavar": "N", "help": "CPU threads (default: all of this process's)"},
        "--out": {"required": True, "metavar": "DIR", "help": "folder for acceptance_length.json and .png"},
    }
    for name, note in (("--temperature", ""), ("--speculation-length", ""), ("--rule", "; for temperatures above 0")):
        defaults = " ".join(str(value).removesuffix(".0") for value in options[name]["default"])
        options[name] |= {"nargs": "+", "help": f"one or more (default: {defaults}){note}"}
    for name, settings in options.items():
        parser.add_argument(name, **settings)
    parsed = parser.parse_args(arguments)
    for name in ("temperature", "speculation_length", "rule"):  # asked for twice is measured once
        setattr(parsed, name, list(dict.fromkeys(getattr(parsed, name))))
    return parsed


def head_names(heads: Sequence[str]) -> list[str]:
    """A short name for each head: its folder's, or what was typed when two folders have the same."""
    names = [Path(head).name for head in heads]
    names = [name if names.count(name) == 1 else head for name, head in zip(names, heads, strict=True)]
    return [name if names.count(name) == 1 else f"{name} ({at})" for at, name in enumerate(names, start=1)]


def load_heads(heads: Sequence[str], target: Target) -> dict[str, Any]:
    loaded = {}
    for name, folder in zip(head_names(heads), heads, strict=True):
        head, about = load_head(folder, dtype=target.dtype, device=target.device)
        attach_head(head, about, target)
        loaded[name] = head
    return loaded


@dataclass
class Measured:
    """What came of all prompts."""

    records: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # ids of prompts that don't fit the target's context
    interrupted: bool = False  # then the records are of the prompts that were complete


def measure_all(measurement: Measurement, prompts: list[Prompt]) -> Measured:
    measured = Measured()
    with cli.progress_bar() as progress:
        bar = progress.add_task("decoding", total=sum(map(measurement.decodes, prompts)))
        try:
            measurement.warm_up()
            for index, prompt in enumerate(prompts):
                found = measurement.run(index, prompt, lambda: progress.advance(bar))
                if found is None:
                    measured.skipped.append(prompt.id)
                measured.records += found or []
                progress.update(bar, completed=sum(map(measurement.decodes, prompts[: index + 1])))
        except KeyboardInterrupt:
            measured.interrupted = True
    return measured


def benchmark(arguments: Namespace, command: Sequence[str]) -> int:
    console = cli.make_console()
    chosen = prompt_sets.load_prompts(arguments.prompts, arguments.limit)
    out = cli.output_folder(arguments.out)
    target = load_target(arguments.target, arguments.dtype, adapter=arguments.target_adapter)
    measurement = Measurement(target, load_heads(arguments.head, target), arguments)
    answers = sum(map(measurement.decodes, chosen.prompts))
    console.print(f"{len(chosen.prompts)} prompts, {answers} answers of at most {arguments.max_new_tokens} tokens")
    measured = measure_all(measurement, chosen.prompts)
    if measured.skipped:
        console.print(f"{len(measured.skipped)} prompts left out: longer than the target's {target.max_length} tokens")
    if measured.interrupted:
        console.print("interrupted: what follows covers the prompts that were complete")
    if not measured.records:
        raise UserError("no prompt was decoded to the end, so there is nothing to report; take fewer or shorter ones.")
    groups = report.group(measured.records)
    names = list(measurement.engines)
    results = {
        "benchmark": MODULE,
        **provenance.provenance(MODULE, command, target),
        "heads": [provenance.head_provenance(*pair) for pair in zip(names, arguments.head, strict=True)],
        "prompts": {"files": chosen.files, "sha256": chosen.sha256, "count": len(chosen.prompts)},
        "settings": vars(arguments),
        "summary": report.summarise(groups),
        "comparisons": report.compare(groups, names),
        **vars(measured),
    }
    report.show(console, results)
    output.write_results(out / "acceptance_length.json", results)
    report.draw(results, out / "acceptance_length.png")
    console.print(f"wrote {out / 'acceptance_length.json'} and {out / 'acceptance_length.png'}", soft_wrap=True)
    return 130 if measured.interrupted else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark with command-line arguments; gives the exit status."""
    command = list(sys.argv[1:] if arguments is None else arguments)
    parsed = parse(command)
    return cli.run_program(lambda: benchmark(parsed, command))


if __name__ == "__main__":
    sys.exit(main())
