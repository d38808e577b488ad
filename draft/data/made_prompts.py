"""Prompts of many kinds, made from the forms of prompt_grammar.yaml, random numbers and passages."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draft.data.grammar import Kind, grammar
from draft.data.made_inputs import INPUTS, Inputs
from draft.data.passages import Piece
from draft.data.records import records
from draft.errors import UserError

_CHOICE = re.compile(r"<([^<>]*)>")
_SLOT = re.compile(r"\{([Aa]n )?([A-Za-z_]+)(\d*)(?::(\d+)-(\d+)(?:/(\d+))?)?\}")
_AN = re.compile(r"(?!uni|use|eu|one\b|ukulele)[aeiou]|hour|honest|heir", re.IGNORECASE)
_TRIES = 40  # forms filled in for one prompt that was not made before

Messages = list[dict[str, str]]


def make_prompts(
    count: int, seed: int, pieces: Sequence[Piece], *, shares: Mapping[str, float], exclude: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """Make `count` different prompts: rows of `messages` and `kind`, shuffled.

    Args:
        shares: of the kinds, in any unit.
        exclude: keys of prompts that are not made again: see `key`.

    Raises:
        UserError: for a kind that has too few different prompts.
    """
    maker = _Maker(Inputs(pieces), set(exclude))
    rows = []
    for kind, wanted in _whole(count, shares).items():
        maker.random = random.Random(f"{seed} {kind}")
        for done in range(wanted):
            messages = maker.another(grammar().kinds[kind])
            if messages is None and not done:
                raise UserError(
                    f"{kind} needs passages of a kind that is not there (source code, or prose of a language); give "
                    f"more --passages, or leave it out with --share {kind}=0."
                )
            if messages is None:
                remedy = "ask for fewer, or give more --passages"
                raise UserError(f"{kind} has only {done} different prompts of {wanted} wanted; {remedy}.")
            rows.append({"messages": messages, "kind": kind})
    random.Random(f"{seed} order").shuffle(rows)
    return rows


def chosen_shares(kinds: Sequence[str], shares: Sequence[str]) -> dict[str, float]:
    """The shares of these kinds (none: of all), those given as KIND=NUMBER in the place of the defaults.

    Raises:
        UserError: for an unknown kind, or a share that is no finite number of at least 0.
    """
    known = grammar().kinds
    given = dict(each.partition("=")[::2] for each in shares)
    if wrong := [name for name in (*kinds, *given) if name not in known]:
        raise UserError(f"{wrong[0]!r} is not a kind of prompt; choose from {', '.join(known)}.")
    chosen = {name: known[name].share for name in known if not kinds or name in kinds or name in given}
    for name, number in given.items():
        try:
            chosen[name] = float(number)
        except ValueError:
            chosen[name] = -1
        if not 0 <= chosen[name] < float("inf"):
            raise UserError(f"--share {name}={number} is no share; give a number, such as {name}=10.")
    if not sum(chosen.values()):
        raise UserError("all shares are 0; give at least one kind a share above it.")
    return chosen


def key(messages: Messages) -> str:
    """The words of a prompt, by which near copies coincide."""
    return " ".join(re.findall(r"\w+", " ".join(message["content"] for message in messages).lower()))


def keys_of(file: str | Path) -> list[str]:
    """The keys of the prompts in a file that this wrote before."""
    keys = []
    for where, record in records(str(file)):
        messages = record.get("messages") if isinstance(record, dict) else None
        if not isinstance(messages, list) or not all(map(_is_text, messages)):
            raise UserError(f"{where}: no row of messages; give a file that draft-train prompts wrote.")
        keys.append(key(messages))
    return keys


def _is_text(message: object) -> bool:
    return isinstance(message, dict) and isinstance(message.get("content"), str)


def _whole(count: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers in the proportion of the shares, whose sum is `count`."""
    exact = {kind: count * share / sum(shares.values()) for kind, share in shares.items()}
    whole = {kind: int(number) for kind, number in exact.items()}
    for kind in sorted(exact, key=lambda kind: whole[kind] - exact[kind])[: count - sum(whole.values())]:
        whole[kind] += 1
    return whole


@dataclass
class _Maker:
    inputs: Inputs
    made: set[str]
    random: random.Random = field(default_factory=random.Random)

    def another(self, kind: Kind) -> Messages | None:
        """A prompt that was not made before; None when none is found in a number of tries."""
        forms = [form for form in kind.forms if self._possible(form)]
        for _ in range(_TRIES if forms else 0):
            messages = self._messages(self.random.choice(forms), kind.loose)
            words = messages and key(messages)
            if words and words not in self.made:
                self.made.add(words)
                return messages
        return None

    def _possible(self, form: str) -> bool:
        names = {name[0].lower() + name[1:] for _, name, *_ in _SLOT.findall(form)}
        return all(map(self.inputs.has, names & INPUTS.keys()))

    def _messages(self, form: str, loose: bool) -> Messages | None:
        """The form filled in: one message for each of its turns; None where the passages have nothing for it."""
        values: dict[str, str] = {}
        turns = [self._filled(turn, values) for turn in form.split(" => ")]
        if not all(turns):
            return None
        if loose and len(turns) == 1 and "\n" not in turns[0]:
            turns = [self._as_typed(turns[0])]
        messages = [{"role": "user", "content": turn} for turn in turns]
        if form.startswith("system: "):
            messages[0] = {"role": "system", "content": turns[0].removeprefix("system: ")}
        return messages

    def _filled(self, form: str, values: dict[str, str]) -> str:
        while choice := _CHOICE.search(form):
            form = form[: choice.start()] + self.random.choice(choice[1].split("|")) + form[choice.end() :]
        form = re.sub(r" +(?=[.?!,\n]|$)", "", re.sub(r" {2,}", " ", form)).strip()
        found = _SLOT.sub(lambda slot: self._value(slot, values), form)
        return "" if "\0" in found else found

    def _value(self, slot: re.Match[str], values: dict[str, str]) -> str:
        """The value of a slot: that which it has in this prompt already, or a random one."""
        article, name, digit, least, most, step = slot.groups()
        name, capital = name[0].lower() + name[1:], name[0].isupper()
        if name + digit not in values:
            if least:
                value = str(self.random.randrange(int(least), int(most) + 1, int(step or 1)))
            elif name in INPUTS:
                value = self.inputs.draw(name, self.random, values) or "\0"
            else:
                taken = {each for other, each in values.items() if other.rstrip("23456789") == name}
                value = self._filled(self.random.choice(grammar().slots[name]), values)
                for _ in range(8):
                    if value not in taken:
                        break
                    value = self._filled(self.random.choice(grammar().slots[name]), values)
            values[name + digit] = value
        value = values[name + digit]
        if article:
            value = article[0] + ("n " if _AN.match(value) else " ") + value
        return value[0].upper() + value[1:] if capital else value

    def _as_typed(self, text: str) -> str:
        """The request as somebody might type it: with a greeting or a wish, in lower case, with a slip."""
        draw = self.random.random
        if draw() < 0.12:
            text = f"{self._filled('{greeting}', {})} {text}"
        if draw() < 0.2 and text[-1] in ".?!":
            text = f"{text} {self._filled('{closing}', {})}"
        if draw() < 0.06:
            text = text.lower()
        if draw() < 0.06:
            text = text.rstrip(".?!")
        if draw() < 0.05:
            place = self.random.randrange(1, len(text) - 2)
            if text[place : place + 2].isalpha():
                text = text[:place] + text[place + 1] + text[place] + text[place + 2 :]
        return text


def counts(rows: list[dict[str, Any]]) -> dict[str, int]:
    """The number of rows of each kind."""
    return dict(Counter(row["kind"] for row in rows).most_common())
