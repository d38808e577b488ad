"""Lookup beside the head against the head alone, on prompts whose answers copy them and on others.

`python -m benchmarks.decode_speed --workload copy` or `chat` runs it.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import shared
from benchmarks.shared import at_least, spread
from draft.heads import DraftHead
from draft.target import Target
from serving.engine import Engine, SamplingParams

# categories whose answers repeat much of their prompt, or of themselves: no part of the bar of --workload chat
COPYING_KINDS = ("code", "code editing", "extraction", "summarising", "translation")
OTHERS = "not copying"  # all prompts of other categories
COPYING = Path(__file__).parent / "copying.jsonl"  # prompts of --workload copy: answers that repeat much of them


def compare_lookup(
    console: Console,
    target: Target,
    head: DraftHead,
    chosen: shared.PromptSet,
    arguments: Namespace,
    about: dict[str, Any],
) -> int:
    """Time plain decoding, the head alone and lookup beside it, in turns on each prompt. Answers end by themselves.

    about: the provenance of the results. Returns the exit status.
    """
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
        **about,
        "prompts": chosen.provenance(len(prompts)),
        "settings": vars(arguments),
        "seconds_per_token": seconds,
        "identical": same,
        "lookup": {category: lookup_gains(times) for category, times in seconds.items()},
        "controller": engines["automatic"].stats()["speculation"],
    }
    results["bars"] = [judge(results["lookup"], arguments.workload)]
    table = shared.make_table("lookup beside the head", ("prompts", "over the head alone", "over plain"), ("prompts",))
    for category, gains in results["lookup"].items():
        shown = (f"{each['median']:.2f} [{each['least']:.2f}, {each['most']:.2f}]" for each in gains.values())
        table.add_row(category, *shown)
    console.print(table)
    console.print(f"answers identical to plain decoding: {same:.0%}")
    shared.show_bars(console, results["bars"])
    shared.finish(console, results, shared.output_folder(arguments.out) / "decode_speed", draw_lookup)
    return shared.exit_status(results, arguments.check)


def judge(lookup: dict[str, Any], workload: str) -> dict[str, Any]:
    """Return the bar: on copying prompts over all, on others over those that do not copy, where there are any."""
    name, group, least = (
        ("copying prompts", "all", 1.2) if workload == "copy" else ("prompts that do not copy", OTHERS, 0.98)
    )
    figure = lookup[group]["over_head"]["median"] if group in lookup else None
    return at_least(f"lookup beside the head / the head alone, {name}", figure, least)


def time_in_turns(
    engines: dict[str, Engine], target: Target, prompts: Sequence[shared.Prompt], arguments: Namespace
) -> tuple[dict[str, dict[str, list[float]]], float]:
    """Return seconds per token by category, engine and repeat, and the share of answers that are those of plain.

    All prompts of a category, all that do not copy (OTHERS), and all ("all") count together in a repeat; repeat 0 warms
    up.
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
            groups = ["all", prompt.category, *([] if prompt.category in COPYING_KINDS else [OTHERS])]
            for category in groups if repeat else ():
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
