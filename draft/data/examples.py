"""From conversations to tensors: token ids, loss masks, and batches of rows of similar length."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import torch
from jinja2 import TemplateError
from torch import Tensor

from draft.data.dataset import Row, hashed
from draft.errors import UserError
from draft.target import Target

SENTINEL = "draftsmith-puts-text-here"  # rendered in the place of a text to find what surrounds it
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_BATCHES_SORTED_TOGETHER = 32  # rows are sorted by length within so many batches, so that epochs still differ

Message = dict[str, str]  # role, content


def render(target: Target, messages: list[Message], *, add_generation_prompt: bool) -> str:
    """Render under the chat template; what the template refuses is a UserError."""
    try:
        return target.render_chat(messages, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"the target's chat template refuses the turns {roles} ({error}); leave that row out."
        ) from error


def tokenise(target: Target, text: str) -> list[int]:
    return target.tokenizer(text, add_special_tokens=False).input_ids


def first_prompt(target: Target, messages: list[Message]) -> list[int]:
    """Token ids up to where the target answers the first user turn."""
    return tokenise(target, render(target, up_to_user_turn(messages, 0), add_generation_prompt=True))


def next_prompt(target: Target, ids: list[int], messages: list[Message], turn: int) -> list[int]:
    """Token ids up to where the target answers user turn `turn`, given all that was said before as token ids.

    What the target wrote stays as it wrote it, token for token: only the text between its answer and the next one
    is rendered and tokenised.
    """
    history = up_to_user_turn(messages, turn, repeat(SENTINEL))
    between = render(target, history, add_generation_prompt=True).rsplit(SENTINEL, 1)[1]
    if ids[-1] in target.eos_token_ids:
        between = between.removeprefix(target.tokenizer.decode([ids[-1]]))
    return ids + tokenise(target, between)


def end_of_turn(target: Target) -> int:
    """The token with which the target ends a response: what the chat template puts after one, or the tokenizer's."""
    turns = [{"role": "user", "content": SENTINEL}, {"role": "assistant", "content": SENTINEL}]
    after = tokenise(target, render(target, turns, add_generation_prompt=False).rsplit(SENTINEL, 1)[1])
    ends = [token for token in after if token in target.eos_token_ids]
    return ends[0] if ends else int(target.tokenizer.eos_token_id)


def up_to_user_turn(messages: list[Message], turn: int, answers: Iterable[str] = ()) -> list[Message]:
    """System messages and user turns 0..`turn`, with the answers to those before."""
    chosen: list[Message] = []
    users, given = 0, iter(answers)
    for message in messages:
        if message["role"] == "assistant":
            continue
        if message["role"] == "user":
            if users > turn:
                break
            if users:
                chosen.append({"role": "assistant", "content": next(given)})
            users += 1
        chosen.append(message)
    return chosen


def encode_kept(target: Target, messages: list[Message]) -> tuple[list[int], list[bool]]:
    """Token ids and loss mask (assistant tokens only) of a conversation that has its responses.

    Templates with `{% generation %}` say themselves what the assistant writes. For others each response is what the
    rendered conversation gains by it; it is tokenised on its own, since the target starts on a token of its own too.

    Raises:
        UserError: when the template refuses the conversation or renders earlier turns differently later on.
    """
    if _GENERATION.search(target.tokenizer.chat_template or ""):
        render(target, messages, add_generation_prompt=False)  # for its error
        encoded = target.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(encoded["input_ids"]), [bool(wanted) for wanted in encoded["assistant_masks"]]
    ids: list[int] = []
    mask: list[bool] = []
    done = ""
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(target, messages[:place], add_generation_prompt=True)
        after = render(target, messages[: place + 1], add_generation_prompt=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise UserError(
                "the target's chat template renders earlier turns differently once more follow, so that responses "
                "cannot be told apart; mark them in the template with {% generation %}."
            )
        context, response = tokenise(target, before[len(done) :]), tokenise(target, after[len(before) :])
        # up to the end of turn, which the target writes; the template adds the rest
        end = next((place for place, token in enumerate(response) if token in target.eos_token_ids), len(response))
        ids += context + response
        mask += [False] * len(context) + [place <= end for place in range(len(response))]
        done = after
    return ids, mask


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
