"""Prompts and ordinary text that are made from forms and from files: the same each time, and fit for `prepare`."""

from __future__ import annotations

import gzip
import json
import random
import re
import struct
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from draft.cli import app
from draft.data.grammar import grammar
from draft.data.made_inputs import INPUTS
from draft.data.made_prompts import chosen_shares, key, keys_of, make_prompts
from draft.data.passages import Piece, group, language_of, read_passages, share_out
from draft.data.prompts import load_prompts
from draft.errors import UserError

ENGLISH = """The mill stands where the river leaves the hills. It was built of stone that the people of the valley had
carried down on their backs, and it is still in use. When the water is high, the wheel turns day and night.

In the summer the miller closes the gate and repairs what the winter has broken. He knows each beam by its sound, and he
says that a mill which is not heard is not alive. Visitors are welcome, as long as they do not stand in the way.

The bread of the valley is dark and it keeps for a week. It is made from rye, and from a little wheat in good years. The
children take it to school with honey, and the old people eat it with salt."""
GERMAN = """Die Mühle steht dort, wo der Fluss die Berge verlässt. Sie ist aus Steinen gebaut, die man auf dem Rücken in
das Tal getragen hat, und sie wird noch immer genutzt. Bei hohem Wasser dreht sich das Rad den ganzen Tag.

Das Brot aus dem Tal ist dunkel und hält sich eine Woche. Es wird aus Roggen gebacken und in guten Jahren auch mit etwas
Weizen. Die Kinder nehmen es mit Honig in die Schule, und die alten Leute essen es mit Salz."""
CODE = '''def total(prices, discount=0):
    """Return the sum of the prices without the discount."""
    result = 0
    for price in prices:
        if price < 0:
            raise ValueError(f"a price below zero: {price}")
        result = result + price
    return result - discount


def average(values):
    values = list(values)
    if not values:
        return None
    count = len(values)
    return sum(values) / count
'''
PIECES = [
    Piece(" ".join(ENGLISH.split()).replace(". In the", ".\n\nIn the"), "prose", "en", "mill"),
    Piece(" ".join(GERMAN.split()), "prose", "de", "mill"),
    Piece(CODE, "code", "python", "shop"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of files as packages bring them."""
    root = tmp_path / "files"
    for name, content in {
        "doc/mill.txt": ENGLISH,
        "doc/muehle.html": "<html><nav>Home</nav>" + "".join(f"<p>{each}</p>" for each in GERMAN.split("\n\n")),
        "doc/changelog": ENGLISH.replace("mill", "program"),
        "doc/table.txt": "a | b | c\n" * 40,
        "man/man1/mill.1": ".TH MILL 1\n.SH NAME\nmill\n.SH DESCRIPTION\n" + ENGLISH.replace("The", "\\fBEach\\fR"),
        "lib/shop.py": CODE + CODE.replace("total", "amount").replace("average", "mean") * 3,
        "lib/picture.png": "\0\0",
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (root / "doc" / "copy.txt.gz").write_bytes(gzip.compress(ENGLISH.encode()))
    return root


def run(*arguments: object) -> None:
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output


def test_every_form_can_be_filled_in() -> None:
    """All slots exist, and all kinds, with all of their forms, give prompts without anything left to fill in."""
    slots = grammar().slots
    for kind in grammar().kinds.values():
        for form in kind.forms:
            for name in re.findall(r"\{(?:[Aa]n )?([A-Za-z_]+)[^}]*\}", form):
                base = name[0].lower() + name[1:]
                assert base in slots or base in INPUTS or re.search(rf"\{{{base}\d?:\d", form), form
    rows = make_prompts(1500, 0, PIECES, shares={kind: 1.0 for kind in grammar().kinds if kind not in ("translation",)})
    texts = [message["content"] for row in rows for message in row["messages"]]
    assert not [text for text in texts if re.search(r"\{\w+\d?\}|=>|\0|\\n|\ba an? |  [a-z]", text.split("```")[0])]


def test_same_seed_gives_same_prompts_in_the_shares() -> None:
    shares = chosen_shares((), ["chat=50"])
    rows = make_prompts(400, 3, PIECES, shares=shares)
    assert rows == make_prompts(400, 3, PIECES, shares=shares)
    assert rows != make_prompts(400, 4, PIECES, shares=shares)
    counts = Counter(row["kind"] for row in rows)
    assert set(counts) == set(grammar().kinds)
    for kind, share in shares.items():
        assert abs(counts[kind] - 400 * share / sum(shares.values())) < 1
    assert len({key(row["messages"]) for row in rows}) == 400


def test_prompts_are_read_by_prepare_and_excluded_ones_do_not_come_again(tmp_path: Path, folder: Path) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    run("prompts", "--out", first, "--count", 200, "--passages", folder)
    run("prompts", "--out", second, "--count", 200, "--passages", folder, "--exclude", first, "--kind", "roleplay")
    prompts = load_prompts(str(first))
    assert [prompt.messages for prompt in prompts] == [json.loads(line)["messages"] for line in first.open()]
    assert not set(keys_of(first)) & set(keys_of(second))
    turns = [sum(message["role"] == "user" for message in prompt.messages) for prompt in prompts]
    assert max(turns) > 1
    assert {json.loads(line)["kind"] for line in second.open()} == {"roleplay"}


def test_text_of_files_is_clean_and_told_apart(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "text.jsonl"
    run("text", folder, "--out", out)
    pieces = read_passages([out])
    assert sorted(pieces, key=str) == sorted(read_passages([folder]), key=str)
    languages = {(piece.language, piece.source) for piece in pieces}
    assert languages == {("en", "doc"), ("de", "doc"), ("en", "man"), ("python", "lib")}
    texts = "\n".join(piece.text for piece in pieces)
    assert texts.count("wheel turns day and night") == 1 + 1  # the copy is left out, the manual page is another text
    assert "Home" not in texts and "program" not in texts and "|" not in texts and "\\f" not in texts
    kept = load_prompts(str(out), keep_responses=True)
    assert [prompt.text for prompt in kept] == [piece.text for piece in pieces]
    again = tmp_path / "again.jsonl"
    run("text", folder, "--out", again)
    assert again.read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ({"en": 800, "de": 800, "python": 800}, {"english": 6000, "other": 2000, "code": 2000}),
        ({"en": 800, "de": 3, "python": 800}, {"english": 6000, "other": 150, "code": 2000}),
        ({"de": 800, "python": 800}, {"other": 5000, "code": 5000}),
        ({"en": 800, "de": 800}, {"english": 7500, "other": 2500}),
        ({"de": 800}, {"other": 10_000}),
        ({}, {}),
    ],
)
def test_the_share_of_a_group_that_is_not_there_goes_to_the_others(
    given: dict[str, int], sizes: dict[str, int]
) -> None:
    pieces = [
        Piece("x" * 50, "code" if language == "python" else "prose", language, f"package {number % 40}")
        for language, count in given.items()
        for number in range(count)
    ]
    taken = Counter[str]()
    for piece in share_out(pieces, 10_000):
        taken[group(piece)] += len(piece.text)
    assert taken == sizes


def test_one_source_gives_no_more_than_a_part_of_its_groups_share() -> None:
    pieces = [Piece("x" * 50, "prose", "de", "dictionary")] * 800 + [Piece("x", "code", "c", "program")]
    assert len(share_out(pieces, 10_000)) == 0.15 * 5000 // 50 + 1


def test_damaged_files_and_odd_names_are_no_hindrance(tmp_path: Path) -> None:
    root = tmp_path / "files"
    odd = root / "caf\udce9"  # é in latin-1
    odd.mkdir(parents=True)
    (odd / "mill.txt").write_text(ENGLISH)
    packed = gzip.compress(GERMAN.encode())
    (root / "broken.txt.gz").write_bytes(packed[:20] + b"\xff" * 9 + packed[29:])
    (root / "cut.txt.gz").write_bytes(packed[:40])
    (root / "broken.mo").write_bytes(b"\xde")
    halves = ENGLISH.replace("\n\n", "\\ud800\n\n").replace("mill", "shop")  # a literal of half a character
    (root / "halves.py").write_text(f'"""{halves}"""\n')
    run("text", root, "--out", tmp_path / "text.jsonl")
    pieces = read_passages([tmp_path / "text.jsonl"])
    assert [(piece.source, piece.kind) for piece in pieces] == [("caf?", "prose")]
    assert "wheel turns" in pieces[0].text and "shop" not in pieces[0].text


def test_messages_of_a_catalogue_come_without_their_context(tmp_path: Path) -> None:
    sentences = ENGLISH.replace("\n", " ").split(". ")
    texts = {"": "Content-Type: text/plain; charset=UTF-8\n"}
    texts |= {f"menu\x04{sentence}.": f"{sentence}!" for sentence in sentences}
    table, data = b"", b""
    entries = sorted((key.encode(), value.encode()) for key, value in texts.items())
    start = 28 + 16 * len(entries)
    for side in (0, 1):
        for entry in entries:
            table += struct.pack("<II", len(entry[side]), start + len(data))
            data += entry[side] + b"\0"
    header = struct.pack("<7I", 0x950412DE, 0, len(entries), 28, 28 + 8 * len(entries), 0, 0)
    (tmp_path / "mill.mo").write_bytes(header + table + data)
    text = "\n\n".join(piece.text for piece in read_passages([tmp_path]))
    assert "bread of the valley is dark" in text and "menu" not in text and "\x04" not in text


def test_languages_are_told_by_their_common_words() -> None:
    assert language_of(ENGLISH) == "en" and language_of(GERMAN) == "de"
    assert (
        language_of("Aquesta és la casa que hi ha al costat dels arbres amb els seus fruits i no és més gran") is None
    )
    letters = random.Random(0).choices("abcdefgh ", k=400)
    assert language_of("".join(letters)) is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--kind", "haiku"], "'haiku' is not a kind of prompt; choose from chat,"),
        (["--share", "chat=much"], "--share chat=much is no share"),
        (["--kind", "chat", "--share", "chat=0"], "all shares are 0"),
        (["--passages", "nowhere"], "'nowhere': no such file or folder"),
        (["--passages", "EMPTY"], "no passages found; give folders that hold documentation"),
        (["--exclude", "EMPTY/other.jsonl"], "other.jsonl, line 1: no row of messages"),
        (["--exclude", "EMPTY/odd.jsonl"], "odd.jsonl, line 1: no row of messages"),
        (
            ["--kind", "code-editing", "--passages", "EMPTY/text.jsonl"],
            "code-editing needs passages of a kind that is not there",
        ),
    ],
)
def test_mistakes_end_in_one_sentence(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "other.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "odd.jsonl").write_text('{"messages": [{"role": "user", "content": null}]}\n')
    (tmp_path / "text.jsonl").write_text(json.dumps(PIECES[1].__dict__) + "\n")
    given = [argument.replace("EMPTY", str(tmp_path)) for argument in arguments]
    if given[-1] == str(tmp_path):
        given[-1] = str(tmp_path / "none")
        (tmp_path / "none").mkdir()
    command = ["prompts", "--out", str(tmp_path / "out.jsonl"), "--count", "20", *given]
    with pytest.raises(UserError, match=re.escape(message)):
        CliRunner().invoke(app, command, catch_exceptions=False)
    assert not (tmp_path / "out.jsonl").exists()


def test_no_text_is_a_mistake(tmp_path: Path, folder: Path) -> None:
    command = ["text", str(folder / "man"), "--out", str(tmp_path / "out.jsonl"), "--languages", "de"]
    with pytest.raises(UserError, match="no text is left of the files"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    assert not (tmp_path / "out.jsonl").exists()
