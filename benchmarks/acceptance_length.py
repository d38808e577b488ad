"""Acceptance length and decoding speed of draft heads, by decoding for real through the engine.

Every prompt is decoded once without speculation, and once for each head, rule and speculation length, in the same
run and in an order that rotates from prompt to prompt. A second turn follows the target's plain answer to
the first, so that every variant sees the same context.

  τ           tokens emitted / verifications, bonus token included; the token that the prefill gives is not counted
  α           tokens accepted / drafted, also by position
  [low, high] 95 % bootstrap interval, resampling prompts
  speed-up    tokens/s while decoding (without prefill), over the same prompts decoded plainly
  identical   share of answers whose tokens equal the plain ones; under shared noise that is the promise at every
              temperature (float32 and bfloat16 may differ at near ties), under rejection only the distribution is equal

At temperature 0 the rules coincide, and one decoding, called greedy, stands for both. Above 0 a prompt's seed is the
first 63 bits of sha256("SEED:ID:TURN"), SEED being --seed: the same for every variant, and in any selection of prompts.
"""

from __future__ import annotations

import hashlib
import math
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import shared
from benchmarks.shared import Prompt, interval_text
from draft.errors import UserError
from draft.evaluation.tau import bootstrap_gain, bootstrap_ratio
from draft.heads import DraftHead
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
DECIDING_LENGTH = 5  # the speculation length of the table by category, where it was measured

# ---- the program ----


def parse(arguments: Sequence[str]) -> Namespace:
    parser = shared.Parser(MODULE, __doc__, EXAMPLES)
    several: dict[str, Any] = {"nargs": "+"}
    parser.add_models(heads=True)
    parser.add("--target-adapter", metavar="DIR", help="PEFT LoRA adapter of the target, merged in memory")
    parser.add_prompts()
    parser.add("--temperature", shared.real(0, 100), default=[0.0, 1.0], metavar="T", **several)
    parser.add("--speculation-length", shared.whole(1), default=[1, 2, 3, 4, 5, 6, 8], metavar="K", **several)
    parser.add("--rule", choices=RULES, default=list(RULES), help="for temperatures above 0", **several)
    parser.add("--max-new-tokens", shared.whole(2), default=128, metavar="N")
    parser.add("--limit", shared.whole(1), metavar="N", help="only N prompts, the categories taking turns")
    parser.add("--seed", shared.whole(0), default=0, metavar="N")
    parser.add_dtype()
    parser.add("--mode", choices=MODES, default="auto", help="compiled kernels (CPU), or eager")
    parser.add("--threads", shared.whole(1), metavar="N", help="CPU threads (default: all of this process's)")
    parser.add_output(MODULE, check=False)
    parsed = parser.parse_args(arguments)
    for name in ("temperature", "speculation_length", "rule"):  # a value given twice is measured once
        setattr(parsed, name, list(dict.fromkeys(getattr(parsed, name))))
    return parsed


def benchmark(arguments: Namespace, command: Sequence[str]) -> int:
    console = shared.make_console()
    chosen = shared.load_prompts(arguments.prompts, arguments.limit)
    out = shared.output_folder(arguments.out)
    target = load_target(arguments.target, arguments.dtype, adapter=arguments.target_adapter)
    names = head_names(arguments.head)
    heads = {name: shared.load_fitting_head(head, target) for name, head in zip(names, arguments.head, strict=True)}
    measurement = Measurement(target, heads, arguments)
    answers = sum(map(measurement.decodes, chosen.prompts))
    console.print(f"{len(chosen.prompts)} prompts, {answers} answers of at most {arguments.max_new_tokens} tokens")
    measured = measure_all(measurement, chosen.prompts)
    if measured.skipped:
        console.print(f"{len(measured.skipped)} prompts left out: longer than the target's {target.max_length} tokens")
    if measured.interrupted:
        console.print("interrupted: what follows covers the prompts that were complete")
    if not measured.records:
        raise UserError("no prompt was decoded to the end, so there is nothing to report; take fewer or shorter ones.")
    groups = group(measured.records)
    results = {
        "benchmark": MODULE,
        **shared.provenance(MODULE, command, target),
        "heads": [shared.head_provenance(*pair) for pair in zip(names, arguments.head, strict=True)],
        "prompts": chosen.provenance(),
        "settings": vars(arguments),
        "summary": summarise(groups),
        "comparisons": compare(groups, names),
        **vars(measured),
    }
    show(console, results)
    shared.finish(console, results, out / "acceptance_length", draw)
    return 130 if measured.interrupted else 0


def head_names(heads: Sequence[str]) -> list[str]:
    """Return a short name for each head: its folder's, or its path when two folders have the same."""
    names = [Path(head).name for head in heads]
    names = [name if names.count(name) == 1 else head for name, head in zip(names, heads, strict=True)]
    return [name if names.count(name) == 1 else f"{name} ({at})" for at, name in enumerate(names, start=1)]


# ---- decoding ----


@dataclass(frozen=True)
class Variant:
    """One way to decode a prompt; without a head it is plain decoding."""

    temperature: float
    head: str | None = None
    rule: str | None = None
    speculation_length: int = 0

    @property
    def plain(self) -> Variant:
        return Variant(self.temperature)


@dataclass
class Measured:
    """Records of all prompts."""

    records: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # ids of prompts that don't fit the target's context
    interrupted: bool = False  # then the records are of the prompts that were complete


class Measurement:
    """The engines of one run, and the decoding of each prompt by all variants."""

    def __init__(self, target: Target, heads: dict[str, DraftHead], arguments: Namespace) -> None:
        self.target = target
        self.max_new_tokens = arguments.max_new_tokens
        self.seed = arguments.seed
        self.engines = {
            # chains of a fixed length: what is measured is the head, not the planner
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
        self.variants: list[list[Variant]] = []  # by temperature, each beginning with plain decoding
        for temperature in arguments.temperature:
            rules = arguments.rule if temperature > 0 else ("greedy",)
            lengths = arguments.speculation_length
            speculative = [Variant(temperature, head, rule, k) for head in heads for rule in rules for k in lengths]
            self.variants.append([Variant(temperature), *speculative])

    def decodes(self, prompt: Prompt) -> int:
        return len(prompt.turns) * sum(map(len, self.variants))

    def decode(self, variant: Variant, prompt_ids: list[int], seed: int, max_new_tokens: int) -> Completion:
        # plain decoding goes through the first head's engine: the same code and models, speculation off
        engine = self.engines[variant.head] if variant.head else next(iter(self.engines.values()))
        speculation = Speculation(
            enabled=variant.head is not None,
            num_tokens=variant.speculation_length or None,
            rule=variant.rule if variant.rule in RULES else None,
        )
        params = SamplingParams(max_new_tokens=max_new_tokens, temperature=variant.temperature, seed=seed)
        return engine.generate([prompt_ids], params, speculation)[0]

    def warm_up(self) -> None:
        """Decode briefly and untimed by each variant, since the first decoding of its kind pays for set-up."""
        for variants in self.variants:
            for variant in variants:
                self.decode(variant, shared.chat_ids(self.target, "Hi"), seed=0, max_new_tokens=8)

    def run(self, index: int, prompt: Prompt, done: Callable[[], object]) -> list[dict[str, Any]] | None:
        """Return the records of all variants and turns of one prompt; None when it exceeds the target's context."""
        records = []
        for variants in self.variants:
            history: list[dict[str, str]] = []
            shift = index % len(variants)
            for turn, text in enumerate(prompt.turns):
                history.append({"role": "user", "content": text})
                ids = self.target.encode_chat(history, add_generation_prompt=True)
                if len(ids) + self.max_new_tokens > self.target.max_length:
                    return None
                # the seed depends on the prompt alone, whatever else is in the run
                digest = hashlib.sha256(f"{self.seed}:{prompt.id}:{turn}".encode()).digest()
                seed = int.from_bytes(digest[:8], "big") >> 1
                completions = {}
                for variant in variants[shift:] + variants[:shift]:
                    completions[variant] = self.decode(variant, ids, seed, self.max_new_tokens)
                    done()
                plain = completions[variants[0]]
                records += [record(prompt, turn, variant, completions[variant], plain) for variant in variants]
                history.append({"role": "assistant", "content": plain.text})
        return records


def measure_all(measurement: Measurement, prompts: list[Prompt]) -> Measured:
    measured = Measured()
    with shared.progress_bar() as progress:
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


def record(prompt: Prompt, turn: int, variant: Variant, completion: Completion, plain: Completion) -> dict[str, Any]:
    """Return one decoding as the JSON holds it."""
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


# ---- figures ----


class Totals:
    """Records of one variant and category, added up by prompt: the unit that the bootstrap resamples."""

    def __init__(self, records: Iterable[dict[str, Any]]) -> None:
        self.records = list(records)
        self.emitted: Counter[str] = Counter()
        self.verifications: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        for row in self.records:
            self.emitted[row["prompt"]] += row["emitted"]
            self.verifications[row["prompt"]] += row["verifications"]
            self.seconds[row["prompt"]] += row["decode_seconds"]

    def per_position(self, key: str) -> list[int]:
        return [sum(column) for column in zip_longest(*(row[key] for row in self.records), fillvalue=0)]

    def tokens_per_second(self) -> float | None:
        seconds = sum(self.seconds.values())
        return sum(self.emitted.values()) / seconds if seconds else None


def paired(baseline: Totals, candidate: Totals, denominator: str) -> dict[str, Any]:
    """Return the relative gain of candidate over baseline in emitted tokens / `denominator`, with its interval.

    Prompts whose answer ended with the prefill's token hold nothing to compare and are left out.
    """
    below, above = getattr(baseline, denominator), getattr(candidate, denominator)
    prompts = [prompt for prompt in baseline.emitted if below[prompt] and above[prompt]]
    if not prompts:
        return {"value": None, "low": None, "high": None, "prompts": 0}
    gain = bootstrap_gain(
        [(baseline.emitted[prompt], below[prompt]) for prompt in prompts],
        [(candidate.emitted[prompt], above[prompt]) for prompt in prompts],
    )
    return {**shared.interval_values(gain, len(prompts)), "prompts": len(prompts)}


def group(records: list[dict[str, Any]]) -> dict[tuple[Variant, str], Totals]:
    """Return totals by variant and category, `overall` among them."""
    rows: dict[tuple[Variant, str], list[dict[str, Any]]] = {}
    for row in records:
        variant = Variant(row["temperature"], row["head"], row["rule"], row["speculation_length"])
        for category in ("overall", row["category"]):
            rows.setdefault((variant, category), []).append(row)
    return {key: Totals(members) for key, members in rows.items()}


def summarise(groups: dict[tuple[Variant, str], Totals]) -> list[dict[str, Any]]:
    """Return a row for each speculative variant and category."""
    rows = []
    for (variant, category), totals in groups.items():
        if variant.head is None:
            continue
        plain = groups[variant.plain, category]
        drafted = totals.per_position("drafted_per_position")
        accepted = totals.per_position("accepted_per_position")
        counted = [prompt for prompt, steps in totals.verifications.items() if steps]  # as in `paired`
        tau = bootstrap_ratio([totals.emitted[p] for p in counted], [totals.verifications[p] for p in counted])
        speed = paired(plain, totals, "seconds")
        same = [row["first_difference"] is None for row in totals.records]
        rows.append(
            {
                **vars(variant),
                "category": category,
                "prompts": len(totals.emitted),
                "answers": len(totals.records),
                "emitted": sum(totals.emitted.values()),
                "verifications": sum(totals.verifications.values()),
                "acceptance_length": shared.interval_values(tau, len(counted)),
                "acceptance_rate": sum(accepted) / sum(drafted) if sum(drafted) else None,
                "acceptance_per_position": [a / d if d else None for a, d in zip(accepted, drafted, strict=True)],
                "tokens_per_second": totals.tokens_per_second(),
                "plain_tokens_per_second": plain.tokens_per_second(),
                "speed_up": {key: None if speed[key] is None else speed[key] + 1 for key in ("value", "low", "high")},
                "identical_share": None if variant.rule == "rejection" else sum(same) / len(same),
            }
        )
    return rows


def compare(groups: dict[tuple[Variant, str], Totals], heads: list[str]) -> list[dict[str, Any]]:
    """Compare every later head with the first: relative gain in τ, paired by prompt."""
    rows = []
    for (variant, category), totals in groups.items():
        if variant.head in heads[1:]:
            first = Variant(variant.temperature, heads[0], variant.rule, variant.speculation_length)
            gain = paired(groups[first, category], totals, "verifications")
            row = {"baseline": heads[0], "candidate": variant.head, **vars(variant), "category": category, **gain}
            del row["head"]
            rows.append(row)
    return rows


# ---- tables and picture ----


def show(console: Console, results: dict[str, Any]) -> None:
    """Print the tables, and the machine that their times are of."""
    overall = [row for row in results["summary"] if row["category"] == "overall"]
    lengths = {row["speculation_length"] for row in overall}
    deciding = DECIDING_LENGTH if DECIDING_LENGTH in lengths else max(lengths)
    by_category = [
        row for row in results["summary"] if row["category"] != "overall" and row["speculation_length"] == deciding
    ]
    by_category.sort(key=lambda row: (row["temperature"], row["rule"], row["category"]))
    console.print(summary_table("All categories", overall))
    console.print(summary_table(f"By category at K = {deciding} (the JSON has every K)", by_category))
    if results["comparisons"]:
        console.print(comparison_table([row for row in results["comparisons"] if row["category"] == "overall"]))
    machine = results["machine"]
    console.print(f"{machine['cpu']}, {machine['threads']} threads, {machine['device']}, {machine['dtype']}")


def summary_table(title: str, rows: list[dict[str, Any]]) -> Table:
    left = ("category", "head", "T", "rule")
    right = ("K", "τ", "α", "α by position", "tok/s", "plain", "speed-up", "identical")
    table = shared.make_table(title, (*left, *right), left)
    for row in rows:
        speeds = (row["tokens_per_second"], row["plain_tokens_per_second"])
        table.add_row(
            row["category"],
            row["head"],
            f"{row['temperature']:g}",
            row["rule"],
            str(row["speculation_length"]),
            interval_text(row["acceptance_length"]),
            percent(row["acceptance_rate"]),
            " ".join(percent(value).rstrip("%") for value in row["acceptance_per_position"]),
            *("–" if speed is None else f"{speed:.1f}" for speed in speeds),
            interval_text(row["speed_up"]),
            percent(row["identical_share"]),
        )
    return table


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}%"


def comparison_table(rows: list[dict[str, Any]]) -> Table:
    headings = ("candidate", "baseline", "T", "rule", "K", "prompts", "gain", "")
    table = shared.make_table("Gain in τ, paired by prompt, all categories", headings, headings)
    for row in rows:
        low, high = row["low"], row["high"]
        verdict = "no difference shown" if low is None or low <= 0 <= high else "better" if low > 0 else "worse"
        gain = {key: row[key] if row[key] is None else 100 * row[key] for key in ("value", "low", "high")}
        where = (f"{row['temperature']:g}", row["rule"], str(row["speculation_length"]), str(row["prompts"]))
        table.add_row(row["candidate"], row["baseline"], *where, interval_text(gain, "+.1f") + " %", verdict)
    return table


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw τ against K with intervals, and acceptance by position at the largest K."""
    figure, (left, right) = shared.make_figure(2, f"Acceptance length, target {Path(results['target']['name']).name}")
    overall = [row for row in results["summary"] if row["category"] == "overall"]
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in overall:
        lines.setdefault(f"T = {row['temperature']:g}, {row['rule']}, {row['head']}", []).append(row)
    for at, (label, rows) in enumerate(lines.items()):
        rows = sorted((row for row in rows if row["acceptance_length"]["value"]), key=lambda r: r["speculation_length"])
        if not rows:
            continue
        taus = [row["acceptance_length"] for row in rows]
        spread = [[abs((t[end] or t["value"]) - t["value"]) for t in taus] for end in ("low", "high")]
        shift = 0.06 * (at - (len(lines) - 1) / 2)  # beside each other, so that the intervals can be told apart
        places = [row["speculation_length"] + shift for row in rows]
        left.errorbar(places, [t["value"] for t in taus], yerr=spread, marker="o", capsize=3, label=label)
        rates = [math.nan if value is None else value for value in rows[-1]["acceptance_per_position"]]
        label += f", K = {rows[-1]['speculation_length']}"
        right.plot(range(1, len(rates) + 1), rates, marker="o", label=label)
    left.set(xlabel="speculation length K", ylabel="acceptance length τ, 95 % interval over prompts")
    left.set_xticks(sorted({row["speculation_length"] for row in overall}))
    right.set(xlabel="drafted position", ylabel="accepted / drafted", ylim=(0, 1))
    right.xaxis.get_major_locator().set_params(integer=True)
    for axis in (left, right):
        axis.legend(fontsize=8)
    shared.save_figure(figure, path)


main = partial(shared.run_program, parse, benchmark)

if __name__ == "__main__":
    sys.exit(main())
