"""`draft-train inspect`: the statistics and the text of a prepared data set."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import AutoTokenizer

from draft.data.dataset import SPLITS, Row, open_dataset
from draft.errors import plain_console
from draft.target import load_target

_TRAINED = "bold green"


def inspect(folder: str | Path, *, examples: int = 3, console: Console | None = None) -> None:
    """Print statistics of both splits and the first `examples` rows, with the trained-on tokens coloured.

    Raises:
        UserError: where there is no finished data set.
    """
    console = console or plain_console()
    dataset = open_dataset(folder)
    manifest = dataset.manifest
    counts = ", ".join(f"{name} {count}" for name, count in manifest["counts"].items() if isinstance(count, int))
    console.print(
        f"{dataset.folder}: target {manifest['target']} ({manifest['target_fingerprint']}), template "
        f"{manifest['template_hash']}, seed {manifest['seed']}, from {', '.join(manifest['sources'])}\n{counts}"
    )
    rows = {split: dataset.rows(split) for split in SPLITS}
    columns = [_figures(split, set(manifest["eos_token_ids"])) for split in rows.values()]
    table = Table("", *rows)
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    console.print(table)
    shown = [row for split in SPLITS for row in rows[split]][:examples]
    if (dataset.folder / "tokenizer").is_dir():
        tokenizer = AutoTokenizer.from_pretrained(dataset.folder / "tokenizer", trust_remote_code=False)
    else:  # a data set that ships without one
        tokenizer = load_target(manifest["target"]).tokenizer
    for row in shown:
        how = {None: "not written by the target", 0.0: "greedy"}.get(row.temperature, f"temperature {row.temperature}")
        title = f"{row.split} {row.id}, {len(row.ids)} tokens, {row.trained} trained on, {how}, from {row.source}"
        console.print(Panel(coloured(row, tokenizer), title=Text(title), title_align="left"))
    console.print(Text.assemble("The tokens in ", ("this colour", _TRAINED), " are trained on."))


def _figures(rows: list[Row], ends: set[int]) -> dict[str, str]:
    lengths = [len(row.ids) for row in rows] or [0]
    sources = Counter(row.source for row in rows)
    trained = [[token for token, wanted in zip(row.ids, row.mask, strict=True) if wanted] for row in rows]
    return {
        "conversations": f"{len(rows):,}",
        "tokens": f"{sum(lengths):,}",
        "trained-on tokens": f"{sum(row.trained for row in rows):,}",
        "length: mean, median, most": f"{sum(lengths) / len(lengths):.0f}, {median(lengths):.0f}, {max(lengths)}",
        "written greedily": f"{sum(row.temperature == 0 for row in rows):,}",
        "sampled": f"{sum(bool(row.temperature) for row in rows):,}",
        "not written by the target": f"{sum(row.temperature is None for row in rows):,}",
        "tokenised again": f"{sum(row.retokenised for row in rows):,}",
        # of the last response: templates may put more, such as a newline, after its end of turn
        "ended by the target": f"{sum(bool(tokens) and tokens[-1] in ends for tokens in trained):,}",
        "different trained-on tokens": f"{len({token for tokens in trained for token in tokens}):,}",
        "sources": "\n".join(f"{name}: {count:,}" for name, count in sources.most_common(8)),
    }


def coloured(row: Row, tokenizer: Any) -> Text:
    """The text of a row, special tokens included; what is trained on has a colour."""
    text = Text()
    for trained, run in groupby(zip(row.ids, row.mask, strict=True), key=lambda pair: pair[1]):
        text.append(tokenizer.decode([token for token, _ in run]), style=_TRAINED if trained else "dim")
    return text
