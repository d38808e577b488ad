"""Damaged data files: one sentence, or the right rows; never another exception, never other rows."""

from __future__ import annotations

import copy
import csv
import gzip
import io
import json
import math
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_tiny_target
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from draft.data.dataset import open_dataset
from draft.data.prepare import prepare
from draft.data.prompts import kept_rows, load_prompts
from draft.errors import UserError
from draft.target import Target

# only what nobody but the user says has a q in it
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
LOOP: list[dict[str, Any]] = [
    {"role": "assistant", "content": "", "reasoning_content": "t", "tool_calls": [CALL]},
    {"role": "tool", "content": "q"},
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.reasoning_content or '' }}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def asked(n: int, role: str, content: str, names: tuple[str, str]) -> list[dict[str, str]]:
    return [{role: names[0], content: f"qué {n}"}, {role: names[1], content: f"a{n}"}]


def files() -> list[list[dict[str, Any]]]:
    """Valid files of several layouts, three rows each."""
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    sharegpt = [asked(n, "from", "value", ("human", "gpt")) for n in range(3)]
    chats = [asked(n, "role", "content", ("user", "assistant")) for n in range(3)]
    alpaca = {"input": "q", "history": [["q", "r"]], "system": "q"}
    return [
        [{"system": "q", "conversations": turns} for turns in sharegpt],
        [{"instruction": f"q{n}", "output": f"o{n}", **alpaca} for n in range(3)],
        [{"tools": tools, "messages": [user, *LOOP, answer]} for user, answer in chats],
        [{"prompt_ids": [Q, Q], "response_ids": [7 + n, 2], "temperature": 0.0} for n in range(3)],
        [{"text": f"Line {n}."} for n in range(3)],
    ]


Q = make_tiny_target().tokenizer("q").input_ids[0]
ROWS = files()
VALUES = [
    None, "", " ", "x", "\ud800", 0, -1, 10**400, 1e308, math.nan, math.inf, True, [], {}, [None], [[]], {"a": None},
    ["x"], "[]", "{", "[" * 2000, "\x00", "null", [{"role": "user"}], {"role": "user", "content": "x"},
]  # fmt: skip


@pytest.fixture(scope="module")
def target() -> Target:
    made = make_tiny_target()
    made.chat_template = TEMPLATE
    return made


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values inside of a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, each in inside for found in [(*path, key), *places(each, (*path, key))]]


@st.composite
def mutated(draw: Any) -> tuple[list[Any], list[Any]]:
    """Rows, and the same with one value dropped, replaced, repeated, nested or renamed."""
    rows = draw(st.sampled_from(ROWS))
    changed: list[Any] = copy.deepcopy(rows)
    path = draw(st.sampled_from(places(changed)))
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    kind = draw(st.sampled_from(["drop", "replace", "repeat", "nest", "rename"]))
    old = holder[path[-1]]
    if kind == "drop":
        del holder[path[-1]]
    elif kind == "replace":
        holder[path[-1]] = draw(st.sampled_from(VALUES))
    elif kind == "repeat" and isinstance(holder, list):
        holder.insert(path[-1], copy.deepcopy(old))
    elif kind == "rename" and isinstance(holder, dict):
        holder[f"{path[-1]}_"] = holder.pop(path[-1])
    else:
        holder[path[-1]] = [old]
    return rows, changed


def ascii_only(value: Any) -> bool:
    """True where half a character is in a value, which UTF-8 cannot hold."""
    return "\\ud800" in json.dumps(value)


def written(rows: list[Any], kind: str) -> bytes:
    """The rows as a file of a kind; lists and objects are JSON text in CSV."""
    if kind == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=ascii_only(row)) + "\n" for row in rows).encode()
    if kind == "json":
        return json.dumps(rows, ensure_ascii=ascii_only(rows)).encode()
    names = list(dict.fromkeys(name for row in rows for name in row))
    if kind == "parquet":
        file = io.BytesIO()
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), file)
        return file.getvalue()
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    cells = [
        {n: v if isinstance(v, str) else json.dumps(v, ensure_ascii=ascii_only(v)) for n, v in row.items()}
        for row in rows
    ]
    writer.writerows(cells)
    return text.getvalue().encode()


def read(target: Target, name: str, content: bytes, **options: Any) -> list[tuple[list[int], list[bool]]]:
    """The rows of a file, kept and checked as `prepare` does it; the prompts in it are read as well."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        with suppress(UserError):
            load_prompts(str(path))
        rows = [
            row
            for prompt in load_prompts(str(path), keep_responses=True, **options)
            for row in kept_rows(target, prompt)
        ]
        return [(row.ids, row.mask) for row in rows]


def attempt(target: Target, name: str, content: bytes, **options: Any) -> list[Any] | None:
    """The rows, or None after one sentence; any other exception is raised."""
    try:
        return read(target, name, content, **options)
    except UserError as error:
        sentence = str(error)
        assert sentence.endswith(".") and "; " in sentence and "\n" not in sentence and "Traceback" not in sentence
        return None


BOUNDED = settings(
    max_examples=80, derandomize=True, deadline=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
KINDS = st.sampled_from(["jsonl", "json", "csv", "parquet"])


@BOUNDED
@given(mutated(), KINDS)
def test_a_changed_value(target: Target, case: tuple[list[Any], list[Any]], kind: str) -> None:
    """The other rows come out as they were, and nothing is trained on that the user says."""
    rows, changed = case
    try:
        content = written(changed, kind)
    except (pa.ArrowException, TypeError, AttributeError, ValueError, OverflowError):
        assume(False)  # no file of that kind holds it
    got = attempt(target, f"rows.{kind}", content)
    if got is None:
        skipped: Counter[str] = Counter()
        got = attempt(target, f"rows.{kind}", content, skipped=skipped)
        assert got is None or skipped
    for ids, mask in got or []:
        assert len(ids) == len(mask)
        assert Q not in [token for token, wanted in zip(ids, mask, strict=True) if wanted]
    if got and len(rows) == len(changed):
        others = [old for old, new in zip(rows, changed, strict=True) if old == new]
        expected = [row for old in others for row in read(target, "rows.jsonl", written([old], "jsonl"))]
        remaining = iter(got)
        assert all(row in remaining for row in expected)


@BOUNDED
@given(st.sampled_from(ROWS), KINDS, st.sampled_from(["", ".gz"]), st.data())
def test_a_file_that_is_cut_off(target: Target, rows: list[Any], kind: str, packed: str, data: Any) -> None:
    """Whole rows before the cut, or one sentence."""
    content = written(rows, kind)
    name = f"rows.{kind}{packed}"
    if packed:
        content = gzip.compress(content, mtime=0)
    whole = attempt(target, name, content)
    cut = data.draw(st.integers(0, len(content) - 1))
    got = attempt(target, name, content[:cut])
    if got is not None:
        assert whole is not None and not packed
        last = len(got) - 1 if kind == "csv" else len(got)  # the last cell of a CSV file may end anywhere
        assert got[:last] == whole[:last]


@BOUNDED
@given(st.sampled_from(ROWS), KINDS, st.data())
def test_a_file_with_another_byte(target: Target, rows: list[Any], kind: str, data: Any) -> None:
    content = bytearray(written(rows, kind))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    for ids, mask in attempt(target, f"rows.{kind}", bytes(content)) or []:
        assert len(ids) == len(mask) and max(ids) < target.vocab_size


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-le", "latin-1", "cp037"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_another_encoding(target: Target, encoding: str, kind: str) -> None:
    content = written(ROWS[0], kind)
    expected = attempt(target, f"rows.{kind}", content) if encoding == "utf-8-sig" else None
    assert attempt(target, f"rows.{kind}", content.decode().encode(encoding)) == expected


@pytest.fixture(scope="module")
def folder(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set."""
    root = tmp_path_factory.mktemp("prepared")
    (root / "rows.jsonl").write_bytes(written(ROWS[0], "jsonl"))
    options: Any = {"keep_responses": True, "progress": False, "held_out_share": 0.0}
    prepare(target, root / "data", prompts=[root / "rows.jsonl"], **options)
    return root / "data"


@BOUNDED
@given(st.data())
def test_a_changed_data_set(target: Target, folder: Path, data: Any) -> None:
    """One value of a prepared row: the rows have whole tokens and masks, or there is one sentence."""
    path = folder / "train.parquet"
    before = path.read_bytes()
    table = pq.read_table(path)
    rows = table.to_pylist()
    index, name, *inside = data.draw(st.sampled_from([place for place in places(rows) if len(place) > 1]))
    holder = rows[index] if not inside else rows[index][name]
    key = inside[0] if inside else name
    holder[key] = data.draw(st.sampled_from([None, -1, 259, 2**31 - 1, 0, True, "", "x", [], [None], math.nan, 0.5]))
    try:
        changed = pa.Table.from_pylist(rows, schema=table.schema)
    except (pa.ArrowException, TypeError, ValueError):
        assume(False)
    pq.write_table(changed, path)
    try:
        got = open_dataset(folder).rows("train")
    except UserError as error:
        assert str(error).endswith("; prepare the data again.")
    else:
        for row in got:
            assert row.id is not None and 0 < len(row.ids) == len(row.mask) >= row.prompt_length >= 0
            assert 0 <= min(row.ids) <= max(row.ids) < target.vocab_size and None not in row.mask
            assert row.temperature is None or row.temperature >= 0
    finally:
        path.write_bytes(before)
