"""`draft-train inspect` of captured traffic: how much there is, how it was sampled, and what each head was accepted."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime

import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from draft.data.capture import KINDS, Capture
from draft.errors import UserError, plain_console
from draft.evaluation.tau import acceptance_length

_FIGURES = ("drafted", "accepted", "emitted", "verifications")
_COLUMNS = ("time", "kind", "head", "head_fingerprint", *_FIGURES, "prompt_ids", "answer_ids")


def inspect_capture(capture: Capture, *, console: Console | None = None) -> None:
    """Print rows, tokens, time span and kinds of sampling, and the acceptance length of each head.

    Raises:
        UserError: where no shard can be read.
    """
    console = console or plain_console()
    kinds: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    heads: dict[tuple[str, str], Counter[str]] = {}
    times: list[float] = []
    for table in capture.tables(_COLUMNS):
        for name in ("prompt_ids", "answer_ids"):
            tokens[name] += len(pc.list_flatten(table[name]))
        columns = table.drop_columns(["prompt_ids", "answer_ids"]).to_pydict()
        times += columns["time"]
        kinds.update(columns["kind"])
        named = zip(columns["head"], columns["head_fingerprint"], *map(columns.get, _FIGURES), strict=True)
        for head, fingerprint, *figures in named:
            counts = heads.setdefault((head or "none", fingerprint or ""), Counter())
            counts.update(requests=1, **dict(zip(_FIGURES, figures, strict=True)))
    if not times:
        raise UserError(f"no shard in {str(capture.folder)!r} can be read; see the warnings above.")
    size = sum(shard.stat().st_size for shard in capture.shards if shard.is_file())
    target, weights = capture.target, capture.target.weights or "weights of an unknown format"
    name = f"{target.name} ({target.fingerprint})" if target.fingerprint else f"{target.name} of a server upstream"
    console.print(
        f"{capture.folder}: {len(times):,} requests in {len(capture.shards):,} shards of {size / 1e6:.1f} MB, answered "
        f"by target {name} in {weights}, from {_utc(min(times))} to {_utc(max(times))}\n"
        f"tokens: {tokens['prompt_ids']:,} of prompts, {tokens['answer_ids']:,} of answers\n"
        f"sampling: {', '.join(f'{kind} {kinds[kind]:,}' for kind in KINDS)}",
        soft_wrap=True,
    )
    shown = Table("head", "fingerprint", "requests", "verifications", "accepted", "of drafted", "τ")
    for (head, fingerprint), counts in heads.items():
        tau = acceptance_length(counts["emitted"], counts["verifications"])
        numbers = (f"{counts[name]:,}" for name in ("requests", "verifications", "accepted", "drafted"))
        shown.add_row(head, fingerprint[:8], *numbers, f"{tau:.3f}")
    console.print(shown)


def _utc(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
