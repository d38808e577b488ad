"""From conversations to tensors: token ids, loss masks, and batches of rows of similar length."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from draft.data.dataset import Row, conversation_id, hashed
from draft.data.records import BadRow
from draft.errors import UserError
from draft.target import Target, TemplateRefusal

SENTINEL = "draftsmith-puts-text-here"  # rendered in the place of a text to find what surrounds it
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_BATCHES_SORTED_TOGETHER = 32  # rows are sorted by length within so many batches, so that epochs still differ

Message = dict[str, Any]  # role, content; of an answer also reasoning_content and tool_calls
Tools = Sequence[dict[str, Any]]
_ALWAYS = datetime(2024, 7, 26)  # the date in the identity of prompts whose template writes today's


def render(
    target: Target,
    messages: list[Message],
    *,
    add_generation_prompt: bool,
    tools: Tools = (),
    at: datetime | None = None,
) -> str:
    """Render under the chat template; BadRow for what it refuses.

    at: the time that the template reads, None for that of the target.
    """
    try:
        text = target.render_chat(messages, add_generation_prompt=add_generation_prompt, tools=list(tools), at=at)
    except TemplateRefusal as error:
        roles = ", ".join(message["role"] for message in messages)
        raise BadRow(
            "turns that the chat template refuses",
            f"the target's chat template refuses the turns {roles} ({error.reason})",
            "give another template with --chat-template, or remove that row",
        ) from error
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise BadRow("half a surrogate pair", "a call or a tool holds half a surrogate pair, which is no text")
    return text


def tokenise(target: Target, text: str) -> list[int]:
    return target.tokenizer(text, add_special_tokens=False).input_ids


def continuation(target: Target, before: str, text: str) -> list[int]:
    """Token ids of a text as they are after another, in one piece; by itself where a token would go across."""
    if getattr(target.tokenizer, "is_fast", False):
        ids, offsets = _with_offsets(target, before + text, add_special_tokens=False)
        behind = [place for place, (_, last) in enumerate(offsets) if last > len(before)]
        if not behind or offsets[behind[0]][0] >= len(before):
            return [ids[place] for place in behind]
    return tokenise(target, text)


def check_ids(target: Target, ids: Sequence[int], remedy: str = "remove that row") -> None:
    """Refuse token ids that the target has no embedding of: BadRow."""
    most, size = max(ids, default=0), min(target.vocab_size, target.embedding.weight.shape[0])
    if most >= size:
        token = target.tokenizer.convert_ids_to_tokens(most) if most < len(target.tokenizer) else None
        name = f"{most} ({token})" if token else f"{most}"
        what = f"token {name} is beyond the target's vocabulary of {size}"
        raise BadRow("a token beyond the target's vocabulary", what, remedy)


# Prompts: what the target reads before it answers.


def answer_places(messages: Sequence[Message]) -> list[int]:
    """The indices in `messages` before which the target answers: one for each user turn, and each result of tools.

    Answers among the messages stay where tools replied to them: what was called and returned is the target's context.
    """
    places: list[int] = []
    waiting = False
    for place, message in enumerate(messages):
        if waiting and message["role"] in ("user", "assistant"):
            places.append(place)
            waiting = False
        waiting = waiting or message["role"] in ("user", "tool")
    return [*places, len(messages)] if waiting else places


def up_to_answer(messages: Sequence[Message], turn: int, answers: Iterable[str] = ()) -> list[Message]:
    """The messages that the target reads before its answer `turn`, with its answers to those before."""
    chosen: list[Message] = []
    start, given = 0, iter(answers)
    for place in answer_places(messages)[: turn + 1]:
        if start:
            answer = next(given)
            if messages[start]["role"] != "assistant":
                chosen.append({"role": "assistant", "content": answer})
        chosen += messages[start:place]
        start = place
    return chosen


def prompt_ids(
    target: Target, messages: Sequence[Message], turn: int = 0, answers: Iterable[str] = (), tools: Tools = ()
) -> list[int]:
    """Token ids up to where the target gives its answer `turn`, rendered and tokenised as one text.

    Raises:
        BadRow: where the template refuses them, or a token is not the target's.
    """
    history = up_to_answer(messages, turn, answers)
    ids = tokenise(target, render(target, history, add_generation_prompt=True, tools=tools))
    check_ids(target, ids)
    return ids


def first_prompt(target: Target, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
    """Token ids up to where the target answers first."""
    return prompt_ids(target, messages, tools=tools)


def prompt_id(target: Target, messages: Sequence[Message], tools: Tools = ()) -> str:
    """The id of the conversations that begin so, whatever day the template writes into them."""
    start = next((place for place, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    history = up_to_answer(messages[:start], 0)
    at = _ALWAYS if target.reads_clock else None
    return conversation_id(tokenise(target, render(target, history, add_generation_prompt=True, tools=tools, at=at)))


def next_prompt(
    target: Target,
    ids: list[int],
    messages: Sequence[Message],
    turn: int,
    answers: Sequence[str] | None = None,
    tools: Tools = (),
) -> list[int] | None:
    """Token ids up to where the target gives its answer `turn`, given all that was said before as token ids.

    What the target wrote stays as it wrote it, token for token: only the text between its answer and the next one
    is rendered and tokenised.

    Returns:
        None where the template renders what was said differently once more follows, as it does to earlier thoughts:
        the target then reads the conversation rendered anew.
    """
    if messages[answer_places(messages)[turn - 1]]["role"] == "assistant":
        return None  # the conversation goes on from the file's answer
    if answers is not None:
        said = render(target, up_to_answer(messages, turn - 1, answers), add_generation_prompt=True, tools=tools)
        more = render(target, up_to_answer(messages, turn, answers), add_generation_prompt=True, tools=tools)
        if not (more.startswith(said) and more[len(said) :].lstrip().startswith(answers[turn - 1].strip())):
            return None
    history = up_to_answer(messages, turn, repeat(SENTINEL))
    before, found, between = render(target, history, add_generation_prompt=True, tools=tools).rpartition(SENTINEL)
    if not found:
        return None
    end = target.tokenizer.decode([ids[-1]]) if ids[-1] in target.eos_token_ids else ""
    if between.startswith(end):
        found, between = found + end, between.removeprefix(end)
    return ids + continuation(target, before + found, between)


def end_of_turn(target: Target) -> int:
    """The token with which the target ends a response: what the chat template puts after one, or the tokenizer's."""
    turns = [{"role": "user", "content": SENTINEL}, {"role": "assistant", "content": SENTINEL}]
    after = tokenise(target, render(target, turns, add_generation_prompt=False).rpartition(SENTINEL)[2])
    ends = [token for token in after if token in target.eos_token_ids]
    return ends[0] if ends else int(target.tokenizer.eos_token_id)


# Conversations that have their answers.


def encode_kept(target: Target, messages: list[Message], tools: Tools = ()) -> list[tuple[list[int], list[bool]]]:
    """Token ids and loss masks (answers only) of a conversation that has its answers, one or more rows.

    An answer is trained on as the target gives it: after the prompt that a server renders for it. A row holds several
    answers where the later ones leave the earlier as they were; with tools or thoughts, and where the template renders
    earlier turns differently, each answer has a row of its own. An answer is what the rendered conversation gains by
    it; within that, templates with `{% generation %}` say themselves what the target writes.

    Raises:
        BadRow: when the template refuses the conversation, or does not render an answer after its own prompt.
    """
    marked = bool(_GENERATION.search(target.template_for(list(tools))))
    apart = any(m["role"] == "tool" or m.get("tool_calls") or m.get("reasoning_content") for m in messages)
    rows: list[tuple[int, str, list[tuple[int, int]]]] = []  # number of messages, text, answers in it
    for place, message in enumerate(messages):
        if message["role"] != "assistant" or "weight" in message:  # of 0: the file says that it is not trained on
            continue
        before = render(target, messages[:place], add_generation_prompt=True, tools=tools)
        after = render(target, messages[: place + 1], add_generation_prompt=False, tools=tools)
        start = len(before)
        if after.startswith(before):
            _check_answer(target, messages[: place + 1], after, start, tools)
        elif marked:  # the marks are places in what the template renders
            start = _end_of_history(messages[:place], before, after)
            _check_answer(target, messages[: place + 1], after, start, tools)
        else:
            after = before + _written(target, messages[: place + 1], before, after, tools)
        answers = [(start, len(after))]
        if rows and not apart and before.startswith(rows[-1][1]):
            answers = rows.pop()[2] + answers
        rows.append((place + 1, after, answers))
    encoded = [
        _masked(target, text, answers, target.generation_spans(messages[:count], list(tools)) if marked else None)
        for count, text, answers in rows
    ]
    if not all(any(mask) for _, mask in encoded):
        raise BadRow(
            "an answer that the chat template marks nothing of",
            "the target's chat template marks nothing of an answer with {% generation %}",
            "give a template that marks answers, or has no marks, with --chat-template",
        )
    return encoded


def _masked(
    target: Target, text: str, answers: list[tuple[int, int]], marked: list[tuple[int, int]] | None
) -> tuple[list[int], list[bool]]:
    """The tokens of a text, and those that begin and end inside an answer (and begin inside what is marked)."""
    ids, offsets = _with_offsets(target, text, add_special_tokens=False)
    mask = [False] * len(ids)
    for start, end in answers:
        inside = [place for place, (first, last) in enumerate(offsets) if start <= first and start < last <= end]
        if marked is None:
            # up to the end of turn, which the target writes; the template adds the rest
            count = next((i for i, place in enumerate(inside) if ids[place] in target.eos_token_ids), len(inside))
            inside = inside[: count + 1]
        for place in inside:
            mask[place] = marked is None or any(first <= offsets[place][0] < last for first, last in marked)
    return ids, mask


def _with_offsets(target: Target, text: str, **options: bool) -> tuple[list[int], list[tuple[int, int]]]:
    if not getattr(target.tokenizer, "is_fast", False):
        raise UserError(
            "the target's tokenizer does not say which characters its tokens are of, so that answers in files cannot "
            "be told apart; save the target with a tokenizer.json."
        )
    encoded = target.tokenizer(text, return_offsets_mapping=True, **options)
    return list(encoded.input_ids), list(encoded.offset_mapping)


def _written(target: Target, messages: list[Message], before: str, after: str, tools: Tools) -> str:
    """The text that the target writes as an answer, the last message, where the template renders its prompt otherwise.

    Templates that move the system prompt into the last user's turn render what follows that turn alike. Templates that
    open the thoughts in the prompt, and take thoughts out of answers, leave those that begin with them as they are.

    before, after: the prompt and the whole conversation as the template renders them.

    Raises:
        BadRow: where the answer cannot be told.
    """
    *history, answer = messages
    asking = [*history[:-1], {**history[-1], "content": SENTINEL}]

    def after_question(*said: Message) -> str:
        """Render the conversation, and return what follows the last turn before the answer."""
        text = render(target, [*asking, *said], add_generation_prompt=not said, tools=tools)
        return text.split(SENTINEL, 1)[1] if SENTINEL in text else ""

    asked = after_question()
    follows = after_question(answer)
    if asked and follows.startswith(asked):
        written = follows.removeprefix(asked)
        _check_answer(target, messages, after, len(after) - len(written), tools)
        return written
    lead, found, end = after_question({"role": "assistant", "content": SENTINEL}).rpartition(SENTINEL)
    opening = asked.removeprefix(lead)
    tag, blanks = opening.strip(), opening[len(opening.rstrip()) :]
    written = answer["content"].removeprefix(tag).removeprefix(blanks)
    thought = re.fullmatch(r"<(\w+)>", tag) and tag.replace("<", "</") in written
    if not (found and thought) or answer.get("tool_calls") or answer.get("reasoning_content"):
        raise _other_prompt(before, after)
    return written + end


def _other_prompt(before: str, after: str) -> BadRow:
    common = len(os.path.commonprefix([before, after]))
    return BadRow(
        "an answer that the chat template renders after another prompt",
        "the target's chat template does not render an answer after the prompt that it is asked with, which goes on "
        f"with {before[common:][:40]!r} where the conversation has {after[common:][:40]!r}",
        "give a template that renders it there with --chat-template, or remove that row",
    )


def _end_of_history(history: list[Message], before: str, after: str) -> int:
    """The first character of `after` that can be of an answer: behind all turns of others."""
    end = 0
    for message in history:
        content = message["content"].strip()
        found = after.find(content, end) if message["role"] != "assistant" else -1
        end = found + len(content) if found >= 0 else end
    return max(end, len(os.path.commonprefix([before, after])))


def _check_answer(target: Target, messages: list[Message], rendered: str, start: int, tools: Tools) -> None:
    """Refuse a last message of which the template leaves something out.

    start: the first character in `rendered` that the prompt does not have; it may end with how the answer begins.
    """
    *history, answer = messages
    shown = "".join(rendered[max(0, start - len(answer["content"])) :].split())
    forms = (answer["content"], *(json.dumps(answer["content"], ensure_ascii=ascii)[1:-1] for ascii in (False, True)))
    if not any("".join(form.split()) in shown for form in forms):  # some templates write answers as JSON
        raise BadRow(
            "an answer with a part left out by the chat template",
            f"the target's chat template leaves out a part of the answer {answer['content'][:40]!r}",
            "give a template that renders it with --chat-template, or remove that row",
        )
    if not (answer.get("tool_calls") or answer.get("reasoning_content")):
        return
    for name, kind in (("tool_calls", "the call"), ("reasoning_content", "the thoughts"), ("content", "the text")):
        if not answer.get(name):
            continue
        without = [*history, {**{key: value for key, value in answer.items() if key != name}}]
        if name == "content":
            without[-1]["content"] = ""
        try:
            same = render(target, without, add_generation_prompt=False, tools=tools) == rendered
        except BadRow:  # at least the template sees the difference
            continue
        if same:
            raise BadRow(
                f"an answer with {kind} left out by the chat template",
                f"the target's chat template leaves out {kind} of an answer",
                "give a template that renders it with --chat-template, or remove that row",
            )


def encode_text(target: Target, text: str) -> tuple[list[int], list[bool]]:
    """Token ids and loss mask of a text without turns, as a server's `/v1/completions` reads it.

    All tokens are trained on but the first, on which the target's distribution has nothing to say. Where the text is
    a conversation that was rendered already, only its answers are.
    """
    ids, offsets = _with_offsets(target, text)
    bos = target.tokenizer.bos_token_id
    if ids[:2] == [bos, bos]:  # the text has its own
        ids, offsets = ids[1:], offsets[1:]
    opening = _generation_prompt(target)
    if not opening or opening not in text:
        return ids, [False] * min(1, len(ids)) + [True] * (len(ids) - 1)
    mask = [False] * len(ids)
    control = _control_tokens(target)
    for answer in re.finditer(re.escape(opening), text):
        inside = [place for place, (first, last) in enumerate(offsets) if answer.end() <= first and answer.end() < last]
        end = next((place for place in inside if ids[place] in control), len(ids))
        for place in inside:
            mask[place] |= place < end or (place == end and ids[end] in target.eos_token_ids)
    return ids, mask


def _generation_prompt(target: Target) -> str:
    """The text with which the template requests an answer, if a control token tells it from ordinary text."""
    turn = [{"role": "user", "content": SENTINEL}]
    try:
        without, asked = (render(target, turn, add_generation_prompt=wanted) for wanted in (False, True))
    except UserError:  # no template, or none for this: then no text was rendered by it
        return ""
    opening = asked[len(without) :] if asked.startswith(without) else ""
    return opening if {*tokenise(target, opening)} & _control_tokens(target) else ""


def _control_tokens(target: Target) -> set[int]:
    added = target.tokenizer.added_tokens_decoder
    return {*target.eos_token_ids, *target.tokenizer.all_special_ids, *(id for id in added if added[id].special)}


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right to one length; packed, each holds several conversations, one after the other."""

    input_ids: Tensor  # [batch, tokens] int64
    # [batch, tokens] int64: 0 on padding, 1 elsewhere; packed, the number of the conversation in its row, from 1
    attention_mask: Tensor
    loss_mask: Tensor  # [batch, tokens] bool, true where the token is to be trained on
    position_ids: Tensor | None = None  # packed only: [batch, tokens] int64, from 0 in each conversation
    # (row of the batch, first token, number of tokens) of each conversation, in the order they were given
    places: tuple[tuple[int, int, int], ...] = ()

    def to(self, device: torch.device | str) -> Batch:
        names = ("input_ids", "attention_mask", "loss_mask", "position_ids")
        tensors = {name: getattr(self, name) for name in names}
        return replace(self, **{name: value.to(device) for name, value in tensors.items() if value is not None})

    def trained_ahead(self, by: int) -> Tensor:
        """[batch, tokens] bool: entries i whose token i + by is trained on and of the same conversation."""
        ahead = torch.zeros_like(self.loss_mask)
        ahead[:, :-by] = self.loss_mask[:, by:]
        ahead[:, :-by] &= self.attention_mask[:, by:] == self.attention_mask[:, :-by]
        return ahead


def batches(rows: Sequence[Row], tokens_per_batch: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices of rows, each once, in batches of similar lengths whose padded size is at most `tokens_per_batch`.

    A row longer than that makes a batch of its own. The order depends on the seed and the epoch only.
    """
    pick = random.Random(hashed(seed, "batches", epoch))
    result: list[list[int]] = []
    for together in _sorted_together(rows, tokens_per_batch, pick):
        batch: list[int] = []
        for index in sorted(together, key=lambda index: len(rows[index].ids)):
            if batch and (len(batch) + 1) * len(rows[index].ids) > tokens_per_batch:
                result.append(batch)
                batch = []
            batch.append(index)
        result.append(batch)
    pick.shuffle(result)
    return result


def packed_batches(rows: Sequence[Row], tokens_per_batch: int, capacity: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices of rows, each once, in batches that `collate` packs into at most `tokens_per_batch // capacity` rows.

    First fit by falling length, among so many rows as `batches` sorts together. capacity: tokens of a packed row, at
    least the longest conversation's. The order depends on the seed and the epoch only.
    """
    pick = random.Random(hashed(seed, "packed", epoch))
    count = max(1, tokens_per_batch // capacity)
    result: list[list[int]] = []
    for together in _sorted_together(rows, tokens_per_batch, pick):
        bins: list[list[int]] = []
        room: list[int] = []
        for index in sorted(together, key=lambda index: -len(rows[index].ids)):
            length = len(rows[index].ids)
            place = next((place for place, left in enumerate(room) if left >= length), len(bins))
            if place == len(bins):
                bins.append([])
                room.append(capacity)
            bins[place].append(index)
            room[place] -= length
        # in the order in which they were opened: filling rows one after the other then gives the same bins again
        for first in range(0, len(bins), count):
            result.append([index for packed in bins[first : first + count] for index in packed])
    pick.shuffle(result)
    return result


def _sorted_together(rows: Sequence[Row], tokens_per_batch: int, pick: random.Random) -> Iterator[list[int]]:
    """Indices of rows in random order, in groups that make some batches each."""
    order = list(range(len(rows)))
    pick.shuffle(order)
    mean = max(1, sum(len(row.ids) for row in rows) // max(1, len(rows)))
    size = _BATCHES_SORTED_TOGETHER * max(1, tokens_per_batch // mean)
    return (order[start : start + size] for start in range(0, len(order), size))


def collate(rows: Sequence[Row], capacity: int | None = None) -> Batch:
    """Conversations padded with id 0 on the right: one a row, or packed into rows of at most `capacity` tokens."""
    places = _places([len(row.ids) for row in rows], capacity)
    shape = places[-1][0] + 1, max(start + length for _, start, length in places)
    input_ids = torch.zeros(shape, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    position_ids = torch.arange(shape[1]).repeat(shape[0], 1)
    for row, (line, start, length) in zip(rows, places, strict=True):
        end = start + length
        input_ids[line, start:end] = torch.tensor(row.ids)
        loss_mask[line, start:end] = torch.tensor(row.mask)
        attention_mask[line, start:end] = attention_mask[line].max() + 1
        position_ids[line, start:] = torch.arange(shape[1] - start)  # also of the padding, if nothing more follows
    return Batch(input_ids, attention_mask, loss_mask, None if capacity is None else position_ids, places)


def _places(lengths: Sequence[int], capacity: int | None) -> tuple[tuple[int, int, int], ...]:
    """The place of each conversation, see `Batch.places`; a row is filled until the next one has no room in it."""
    places: list[tuple[int, int, int]] = []
    line, start = 0, 0
    for length in lengths:
        if places and (capacity is None or start + length > capacity):
            line, start = line + 1, 0
        places.append((line, start, length))
        start += length
    return tuple(places)
