"""Loss masks, the text between turns, batches and the reduced vocabulary."""

import random

import pytest
import torch
from conftest import TEMPLATE, make_tiny_target

from draft.data.dataset import Row, coverage, draft_vocabulary
from draft.data.examples import batches, encode_kept, first_prompt, next_prompt
from draft.errors import UserError
from draft.target import Target

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Zwölf?"},
    {"role": "assistant", "content": "12, ja."},
    {"role": "user", "content": "Und dann?"},
    {"role": "assistant", "content": "13."},
]
GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def spoken(target: Target, ids: list[int], mask: list[bool]) -> str:
    assert len(ids) == len(mask)
    return target.tokenizer.decode([token for token, wanted in zip(ids, mask, strict=True) if wanted])


def row(ids: list[int], mask: list[bool] | None = None, id: str = "x") -> Row:
    return Row(id, ids, mask or [True] * len(ids), 0, 0.0, 1.0, "test")


@pytest.mark.parametrize("template", [TEMPLATE, GENERATION])
def test_the_mask_is_what_the_assistant_says(template):
    target = make_tiny_target()
    target.tokenizer.chat_template = template
    ((ids, mask),) = encode_kept(target, CONVERSATION)
    assert spoken(target, ids, mask) == "12, ja.<|im_end|>13.<|im_end|>"
    assert target.tokenizer.decode(ids) == target.render_chat(CONVERSATION, add_generation_prompt=False)
    assert first_prompt(target, CONVERSATION) == ids[: mask.index(True)]


def test_a_generation_template_decides_itself():
    target = make_tiny_target()
    target.tokenizer.chat_template = GENERATION.replace(
        "{{ m['content'] }}<|im_end|>{% endgeneration %}", "{{ m['content'] }}{% endgeneration %}<|im_end|>"
    )
    assert spoken(target, *encode_kept(target, CONVERSATION)[0]) == "12, ja.13."


def test_a_template_that_rewrites_earlier_turns_is_refused():
    target = make_tiny_target()
    target.tokenizer.chat_template = TEMPLATE + "{{ '?' if add_generation_prompt }}"
    with pytest.raises(UserError, match="does not render an answer after the prompt"):
        encode_kept(target, CONVERSATION)
    target.tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    with pytest.raises(UserError, match=r"refuses the turns system, user.*no system turn"):
        encode_kept(target, CONVERSATION)


def test_the_next_prompt_keeps_the_tokens_and_adds_the_turn(tiny_target):
    asked = [message for message in CONVERSATION if message["role"] != "assistant"]
    start = first_prompt(tiny_target, asked)
    answer = [1, 200, 7]  # token ids that no tokenizer would give
    expected = "\n<|im_start|>user\nUnd dann?<|im_end|>\n<|im_start|>assistant\n"
    ids = next_prompt(tiny_target, [*start, *answer, 2], asked, 1)
    assert ids[: len(start) + 4] == [*start, *answer, 2]
    assert tiny_target.tokenizer.decode(ids[len(start) + 4 :]) == expected
    cut = next_prompt(tiny_target, [*start, *answer], asked, 1)  # the template ends the turn that the target did not
    assert tiny_target.tokenizer.decode(cut[len(start) + 3 :]) == "<|im_end|>" + expected


def test_batches_hold_every_row_once_within_the_budget():
    pick = random.Random(0)
    rows = [row([3] * pick.randrange(1, 200)) for _ in range(300)] + [row([3] * 2000)]
    made = batches(rows, 1000, seed=1, epoch=0)
    assert sorted(index for batch in made for index in batch) == list(range(301))
    sizes = [len(batch) * max(len(rows[index].ids) for index in batch) for batch in made]
    assert [300] in made and sorted(sizes)[-2] <= 1000
    assert sum(len(r.ids) for r in rows) / sum(sizes) > 0.9  # little padding
    assert batches(rows, 1000, seed=1, epoch=0) == made
    assert batches(rows, 1000, seed=1, epoch=1) != made != batches(rows, 1000, seed=2, epoch=0)


def test_the_vocabulary_holds_the_tokens_trained_on_most():
    rows = [row([9, 9, 9, 9, 5, 5, 7, 4, 3], [False] * 4 + [True] * 5)]
    assert draft_vocabulary(rows, 3, 12, always=[11]).tolist() == [3, 5, 11]  # ties go to the lower id
    assert draft_vocabulary(rows, 7, 12, always=[11]).tolist() == [0, 1, 3, 4, 5, 7, 11]  # filled from below
    kept = torch.tensor([7, 9, 10])  # before those that nobody needs, after those that are needed
    assert draft_vocabulary(rows, 7, 12, always=[11], kept=kept).tolist() == [3, 4, 5, 7, 9, 10, 11]
    assert draft_vocabulary(rows, 3, 12, always=[11], kept=kept).tolist() == [7, 9, 11]  # two fives are too few
    assert draft_vocabulary([*rows, row([5])], 3, 12, always=[11], kept=kept).tolist() == [5, 7, 11]
    vocabulary = draft_vocabulary(rows, 3, 12, always=[11])
    assert coverage(rows, vocabulary) == pytest.approx(3 / 5)  # 5, 5 and 3 of five
    assert coverage([], vocabulary) == 1.0
    with pytest.raises(UserError, match="13 tokens exceeds the target's 12"):
        draft_vocabulary(rows, 13, 12)
    with pytest.raises(UserError, match="1 tokens has no room for 2"):
        draft_vocabulary(rows, 1, 12, always=[1, 2])
