"""The material of made prompts: passages, sentences and functions that are drawn, tables and logs that are made up."""

from __future__ import annotations

import ast
import json
import random
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import accumulate

from draft.data.grammar import grammar
from draft.data.passages import COMMON, LANGUAGES, Piece

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"'(¿¡]?[A-ZÄÖÜÉÈÀÁÍÓÚ¿¡])")
_LONGEST_CODE = 3500  # characters of a piece of code that is shown as it is
_DRAWS = 30  # of pieces in which something fit for use is looked for


class _Pool:
    """Pieces, drawn so that a source counts less than in proportion: a large one leaves room for the others."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self.sources: dict[str, list[Piece]] = {}
        for piece in pieces:
            self.sources.setdefault(piece.source, []).append(piece)
        self.names = list(self.sources)
        self.weights = list(accumulate(len(each) ** 0.75 for each in self.sources.values()))

    def __len__(self) -> int:
        return len(self.names)

    def draw(self, chance: random.Random) -> Piece:
        source = chance.choices(self.names, cum_weights=self.weights)[0]
        return chance.choice(self.sources[source])


class Inputs:
    """Draws from passages by the name of a slot; what belongs together in one prompt is kept in `values`."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        prose = [piece for piece in pieces if piece.kind == "prose"]
        code = [piece for piece in pieces if piece.kind == "code"]
        self.english = _Pool(piece for piece in prose if piece.language == "en")
        self.foreign = {
            name: _Pool(piece for piece in prose if piece.language == language)
            for language, name in LANGUAGES.items()
            if language != "en" and any(piece.language == language for piece in prose)
        }
        self.python = _Pool(piece for piece in code if piece.language == "python" and "def " in piece.text)
        self.short_code = _Pool(piece for piece in code if len(piece.text) < _LONGEST_CODE)

    def has(self, name: str) -> bool:
        """True where there are passages for a slot, or it needs none."""
        needs = INPUTS[name][1]
        return not needs or bool(getattr(self, needs))

    def draw(self, name: str, chance: random.Random, values: dict[str, str]) -> str | None:
        """A value for the slot; None where none is found."""
        return INPUTS[name][0](self, chance, values)

    # English prose

    def passage(self, chance: random.Random, values: dict[str, str]) -> str:
        return self.english.draw(chance).text

    def short_passage(self, chance: random.Random, values: dict[str, str]) -> str | None:
        """Paragraphs of 50 to 220 words."""
        for _ in range(_DRAWS):
            paragraphs = self.english.draw(chance).text.split("\n\n")
            start = chance.randrange(len(paragraphs))
            text = ""
            while start < len(paragraphs) and len(text.split()) < 50:
                text = f"{text}\n\n{paragraphs[start]}".strip()
                start += 1
            if 50 <= len(text.split()) <= 220:
                return text
        return None

    def documents(self, chance: random.Random, values: dict[str, str]) -> str:
        texts = [self.english.draw(chance).text for _ in range(chance.randint(2, 4))]
        label = chance.choice(["Document {}:\n", "[{}] ", "## Text {}\n\n", "Source {}: "])
        return "\n\n".join(label.format(number) + text for number, text in enumerate(texts, 1))

    def term(self, chance: random.Random, values: dict[str, str]) -> str | None:
        """A word that the passage of this prompt has several times."""
        text = next((values[name] for name in ("passage", "short_passage", "documents") if name in values), None)
        if text is None:
            text = values["passage"] = self.passage(chance, values)
        taken = {values.get("term"), values.get("other_term")}
        words = Counter(re.findall(r"\b[A-Za-z][a-z]{3,}\b", text))
        fit = [word for word, _ in words.most_common(40) if word.lower() not in _usual() and word not in taken][:8]
        return chance.choice(fit) if fit else None

    def sentence_en(self, chance: random.Random, values: dict[str, str]) -> str | None:
        return self._sentences(chance, self.english, 1)

    def sentences_en(self, chance: random.Random, values: dict[str, str]) -> str | None:
        return self._sentences(chance, self.english, chance.randint(2, 5))

    def _sentences(self, chance: random.Random, pool: _Pool, number: int) -> str | None:
        """That many sentences in a row, of ordinary length and without symbols."""
        for _ in range(_DRAWS):
            paragraph = chance.choice(pool.draw(chance).text.split("\n\n")).removeprefix("- ")
            sentences = _SENTENCE_END.split(paragraph)
            start = chance.randrange(len(sentences))
            chosen = sentences[start : start + number]
            if len(chosen) == number and all(map(_ordinary, chosen)):
                return " ".join(chosen)
        return None

    def broken_sentences(self, chance: random.Random, values: dict[str, str]) -> str | None:
        """Sentences with mistakes of grammar and spelling."""
        text = self._sentences(chance, self.english, chance.randint(1, 3))
        if text is None:
            return None
        words = text.split()
        for place in range(len(words)):
            word = words[place]
            if chance.random() < 0.5 and word in _mistakes():
                words[place] = chance.choice(_mistakes()[word])
            elif chance.random() < 0.06 and len(word) > 4 and word.isalpha():
                cut = chance.randrange(1, len(word) - 2)
                words[place] = word[:cut] + word[cut + 1] + word[cut] + word[cut + 2 :]
        broken = " ".join(word for word in words if word)
        return broken if broken != text else broken.replace(",", "").lower()

    # other languages

    def foreign_name(self, chance: random.Random, values: dict[str, str]) -> str:
        """The language of this prompt's foreign sentences."""
        return chance.choice(list(self.foreign))

    def sentence_foreign(self, chance: random.Random, values: dict[str, str]) -> str | None:
        return self._foreign(chance, values, 1)

    def sentences_foreign(self, chance: random.Random, values: dict[str, str]) -> str | None:
        return self._foreign(chance, values, chance.randint(2, 4))

    def _foreign(self, chance: random.Random, values: dict[str, str], number: int) -> str | None:
        name = values.setdefault("foreign", self.foreign_name(chance, values))
        return self._sentences(chance, self.foreign[name], number)

    # code

    def function(self, chance: random.Random, values: dict[str, str]) -> str | None:
        found = self._function(chance)
        return found and f"```python\n{found}\n```"

    def function_head(self, chance: random.Random, values: dict[str, str]) -> str | None:
        found = self._function(chance)
        if found is None:
            return None
        lines = found.split("\n")
        return "```python\n" + "\n".join(lines[: max(2, len(lines) // chance.randint(2, 3))]) + "\n```"

    def broken_function(self, chance: random.Random, values: dict[str, str]) -> str | None:
        """A function with one operator, comparison or constant changed."""
        for _ in range(_DRAWS):
            found = self._function(chance)
            places = list(_OPERATORS.finditer(found)) if found else []
            if found and places:
                place = chance.choice(places)
                return f"```python\n{found[: place.start()]}{_SWAPPED[place[0]]}{found[place.end() :]}\n```"
        return None

    def _function(self, chance: random.Random) -> str | None:
        """A whole function of 5 to 45 lines."""
        for _ in range(_DRAWS):
            text = self.python.draw(chance).text
            starts = list(re.finditer(r"^([ ]*)(?:async )?def \w+", text, re.MULTILINE))
            if not starts:
                continue
            start = chance.choice(starts)
            rest = text[start.start() :].split("\n")
            indent = len(start[1])
            later = (place for place, line in enumerate(rest[1:], 1) if _ends(line, indent))
            end = next(later, len(rest))
            found = textwrap.dedent("\n".join(rest[:end])).strip()
            if 5 <= found.count("\n") + 1 <= 45 and _parses(found):
                return found
        return None

    def code_piece(self, chance: random.Random, values: dict[str, str]) -> str:
        piece = self.short_code.draw(chance)
        return f"```{piece.language}\n{piece.text}\n```"

    # made up

    def records(self, chance: random.Random) -> list[dict[str, str | int | float]]:
        """Rows of a small table."""
        columns = chance.sample(list(_FIELDS), chance.randint(2, 4))
        return [
            {
                "name": chance.choice(grammar().slots["person"]),
                **{column: _FIELDS[column](chance) for column in columns},
            }
            for _ in range(chance.randint(3, 9))
        ]

    def csv(self, chance: random.Random, values: dict[str, str]) -> str:
        rows = self.records(chance)
        return "\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)])

    def json(self, chance: random.Random, values: dict[str, str]) -> str:
        rows = self.records(chance)
        return json.dumps(rows if chance.random() < 0.6 else rows[0], indent=chance.choice([None, 2]))

    def log(self, chance: random.Random, values: dict[str, str]) -> str:
        seconds, date, lines = chance.randrange(80_000), _date(chance), []
        for _ in range(chance.randint(4, 14)):
            seconds += chance.randint(1, 300)
            time = f"{seconds // 3600 % 24:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
            message = chance.choice(grammar().lists["log"])
            name = chance.choice(grammar().slots["person"]).lower()
            lines.append(f"{date} {time} {message.format(number=chance.randint(2, 5000), name=name)}")
        return "\n".join(lines)


def _date(chance: random.Random) -> str:
    return f"{chance.randint(2023, 2026)}-{chance.randint(1, 12):02}-{chance.randint(1, 28):02}"


def _ends(line: str, indent: int) -> bool:
    """True for a line after a function that begins with this indentation: no line of its signature."""
    return bool(line.strip()) and len(line) - len(line.lstrip()) <= indent and line.lstrip()[0] not in ")]}"


def _parses(code: str) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):
            ast.parse(code)
    except (SyntaxError, ValueError):
        return False
    return True


def _ordinary(sentence: str) -> bool:
    words, symbols = sentence.split(), re.search(r"[\\{}<>|=_@#/*]|\(\d\)", sentence)
    return 5 <= len(words) <= 40 and sentence[-1] in ".!?" and sentence[0].isupper() and not symbols


@cache
def _usual() -> frozenset[str]:
    return COMMON["en"] | frozenset(grammar().lists["usual"][0].split())


@cache
def _mistakes() -> dict[str, list[str]]:
    """Words, and what is written wrongly for them."""
    pairs = (entry.split(" = ") for entry in grammar().lists["mistakes"])
    return {word: wrong.split("/") for word, wrong in pairs}


_SWAPPED = {
    " + ": " - ", " - ": " + ", " == ": " != ", " != ": " == ", " < ": " > ", " > ": " < ", " <= ": " < ",
    " >= ": " > ",
    " and ": " or ", " or ": " and ", " not ": " ", " True": " False", " False": " True", "[0]": "[1]", "[-1]": "[0]",
}  # fmt: skip
_OPERATORS = re.compile("|".join(map(re.escape, sorted(_SWAPPED, key=len, reverse=True))))
_FIELDS: dict[str, Callable[[random.Random], str | int | float]] = {
    "age": lambda chance: chance.randint(18, 80),
    "city": lambda chance: chance.choice(grammar().slots["city"]),
    "price": lambda chance: chance.randint(200, 20000) / 100,
    "quantity": lambda chance: chance.randint(1, 60),
    "score": lambda chance: chance.randint(40, 100),
    "salary": lambda chance: chance.randint(24, 120) * 1000,
    "date": lambda chance: _date(chance),
    "status": lambda chance: chance.choice(grammar().lists["status"]),
    "item": lambda chance: chance.choice(grammar().lists["item"]),
    "department": lambda chance: chance.choice(grammar().lists["department"]),
    "distance_km": lambda chance: chance.randint(10, 9000) / 10,
}

_Draw = Callable[[Inputs, random.Random, dict[str, str]], str | None]
# slot -> how it is drawn, and the passages that it needs
INPUTS: dict[str, tuple[_Draw, str]] = {
    "passage": (Inputs.passage, "english"),
    "short_passage": (Inputs.short_passage, "english"),
    "documents": (Inputs.documents, "english"),
    "term": (Inputs.term, "english"),
    "other_term": (Inputs.term, "english"),
    "sentence_en": (Inputs.sentence_en, "english"),
    "sentences_en": (Inputs.sentences_en, "english"),
    "broken_sentences": (Inputs.broken_sentences, "english"),
    "foreign": (Inputs.foreign_name, "foreign"),
    "sentence_foreign": (Inputs.sentence_foreign, "foreign"),
    "sentences_foreign": (Inputs.sentences_foreign, "foreign"),
    "function": (Inputs.function, "python"),
    "function_head": (Inputs.function_head, "python"),
    "broken_function": (Inputs.broken_function, "python"),
    "code": (Inputs.code_piece, "short_code"),
    "csv": (Inputs.csv, ""),
    "json": (Inputs.json, ""),
    "log": (Inputs.log, ""),
}
