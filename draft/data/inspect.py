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

from draft.data.dataset import SPLITS, Dataset, Row, open_dataset
from draft.errors import plain_console

_TRAINED = "bold green"


def inspect(folder: str | Path, *, examples: int = 3, console: Console | None = None) -> None:
    """Print statistics of both splits and the first `examples` rows, with the trained-on tokens coloured.

    Raises:
        UserError: where there is no finished data set.
    """
    console = console or plain_console()
    dataset = open_dataset(folder)
    rows = {split: dataset.rows(split) for split in SPLITS}
    console.print(_origin(dataset))
    console.print(_statistics(dataset, rows))
    shown = [row for split in SPLITS for row in rows[split]][:examples]
    tokenizer = _tokenizer(dataset) if shown else None
    for row in shown:
        console.print(Panel(coloured(row, tokenizer), title=Text(_title(row)), title_align="left"))
    console.print(Text.assemble("The tokens in ", ("this colour", _TRAINED), " are trained on."))


def _origin(dataset: Dataset) -> str:
    manifest = dataset.manifest
    counts = ", ".join(f"{name} {count}" for name, count in manifest["counts"].items() if isinstance(count, int))
    return (
        f"{dataset.folder}: target {manifest['target']} ({manifest['target_fingerprint']}), template "
        f"{manifest['template_hash']}, seed {manifest['seed']}, from {', '.join(manifest['sources'])}\n{counts}"
    )


def _statistics(dataset: Dataset, rows: dict[str, list[Row]]) -> Table:
    table = Table("", *rows)
    ends = set(dataset.manifest["eos_token_ids"])
    columns = [_figures(split, ends) for split in rows.values()]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    return table


def _figures(rows: list[Row], ends: set[int]) -> dict[str, str]:
    lengths = [len(row.ids) for row in rows] or [0]
    sources = Counter(row.source for row in rows)
    different = {token for row in rows for token, trained in zip(row.ids, row.mask, strict=True) if trained}
    return {
        "conversations": f"{len(rows):,}",
        "tokens": f"{sum(lengths):,}",
        "trained-on tokens": f"{sum(row.trained for row in rows):,}",
        "length: mean, median, most": f"{sum(lengths) / len(lengths):.0f}, {median(lengths):.0f}, {max(lengths)}",
        "written greedily": f"{sum(row.temperature == 0 for row in rows):,}",
        "sampled": f"{sum(bool(row.temperature) for row in rows):,}",
        "not written by the target": f"{sum(row.temperature is None for row in rows):,}",
        "tokenised again": f"{sum(row.retokenised for row in rows):,}",
        "ended by the target": f"{sum(_ended(row, ends) for row in rows):,}",
        "different trained-on tokens": f"{len(different):,}",
        "sources": "\n".join(f"{name}: {count:,}" for name, count in sources.most_common(8)),
    }


def _ended(row: Row, ends: set[int]) -> bool:
    """True where the last response has its end of turn: templates may put more, such as a newline, after that."""
    trained = [token for token, wanted in zip(row.ids, row.mask, strict=True) if wanted]
    return bool(trained) and trained[-1] in ends


def _title(row: Row) -> str:
    how = {None: "not written by the target", 0.0: "greedy"}.get(row.temperature, f"temperature {row.temperature}")
    return f"{row.split} {row.id}, {len(row.ids)} tokens, {row.trained} trained on, {how}, from {row.source}"


def coloured(row: Row, tokenizer: Any) -> Text:
    """The text of a row, special tokens included; what is trained on has a colour."""
    text = Text()
    for trained, run in groupby(zip(row.ids, row.mask, strict=True), key=lambda pair: pair[1]):
        text.append(tokenizer.decode([token for token, _ in run]), style=_TRAINED if trained else "dim")
    return text


def _tokenizer(dataset: Dataset) -> Any:
    folder = dataset.folder / "tokenizer"
    if folder.is_dir():
        return AutoTokenizer.from_pretrained(folder)
    from draft.target import load_target  # data sets that ship without a tokenizer

    return load_target(dataset.manifest["target"]).tokenizer
