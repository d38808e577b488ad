"""Conversations as people have them: columns, thoughts, tools, templates that rewrite, and rows that are unclean."""

from __future__ import annotations

import json
import sys
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import TEMPLATE, make_tiny_target
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from draft.cli import main
from draft.data.dataset import open_dataset
from draft.data.examples import continuation, encode_kept, next_prompt, prompt_id, prompt_ids, up_to_answer
from draft.data.prepare import prepare
from draft.data.prompts import Prompt, kept_rows, load_prompts
from draft.data.records import BadRow
from draft.errors import UserError
from draft.target import Target, load_target, read_chat_template
from serving.cli import load_engine

ASSISTANT = "<|im_start|>assistant\n"
THINK = TEMPLATE.replace(
    "{{ m['content'] }}",
    "{% if m['reasoning_content'] %}<think>{{ m['reasoning_content'] }}</think>{% endif %}{{ m['content'] }}",
)
# the last answer has its thoughts, or an empty one; they are taken out of earlier answers
THOUGHT = "{% if loop.last %}<think>{{ m.reasoning_content or '' }}</think>{% endif %}"
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set c = m.content.split('</think>')[-1] %}" + THOUGHT + "{{ c }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENING = REWRITING.replace(THOUGHT, "").replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
MOVING = (
    "{% set s = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + (s + '\n\n' + m.content if s and loop.last else m.content) + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
)
WITH_CALLS = "{{ m['content'] }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}{% endfor %}"
TOOLS = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + TEMPLATE.replace(
    "{{ m['content'] }}", WITH_CALLS
)
DATED = "<|im_start|>system\n{{ strftime_now('%d %B %Y') }}<|im_end|>\n" + TEMPLATE
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}[A] {% generation %}{{ m['content'] }}\n"
    "{% endgeneration %}</s> {% else %}[U] {{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[A] {% endif %}"
)
CALL = [{"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


LOOP = [
    said("user", "1 + 1?"),
    said("assistant", None, tool_calls=CALL),
    said("tool", "2", tool_call_id="c"),
    said("assistant", "It is 2."),
]
HELLO = [said("user", "Hi"), said("assistant", "Hello."), said("user", "Bye"), said("assistant", "See you.")]


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def target() -> Target:
    return make_tiny_target()


def with_template(target: Target, template: Any) -> Target:
    target.tokenizer.chat_template = template
    return target


def rows_of(target: Target, path: Path, *rows: Any) -> list[tuple[str, list[str]]]:
    """The text before the first answer, and all answers, of each row that the file gives."""
    shown = []
    for prompt in load_prompts(write(path / "rows.jsonl", *rows), keep_responses=True):
        for row in kept_rows(target, prompt):
            shown.append((target.tokenizer.decode(row.ids[: row.prompt_length]), spoken(target, row.ids, row.mask)))
    return shown


def spoken(target: Target, ids: list[int], mask: list[bool]) -> list[str]:
    """The runs of tokens that are trained on."""
    runs: list[list[int]] = [[]]
    for token, wanted in zip(ids, mask, strict=True):
        if wanted:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [target.tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize(
    "row",
    [
        {"system": "Be terse.", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]},
        {"id": "x1", "system_prompt": "Be terse.", "question": "Hi", "response": "Yes"},
        {"instruction": "Hi", "input": "", "output": "Yes", "system": "Be terse.", "history": []},
        {
            "messages": [said("system", "Be terse."), said("user", "Hi"), said("assistant", "Yes")],
            "system": "Be terse.",
        },
        {"prompt": "Hi", "response": "Yes", "system_message": "Be terse.", "system": None, "tools": float("nan")},
        {"messages": [said("Developer", "Be terse."), said("user", "Hi"), said("assistant", "Yes")]},
        {"messages": [said("user", "Hi"), said("assistant", "Yes")], "system": [{"type": "text", "text": "Be terse."}]},
        {"prompt": [said("user", "Hi")], "output": "Yes", "system_prompt": "Be terse.", "reasoning": "off"},
    ],
    ids=["sharegpt", "openorca", "alpaca", "messages", "columns", "developer", "parts", "flag"],
)
def test_system_prompts_in_columns(tmp_path: Path, row: Any, caplog: Any) -> None:
    path = write(tmp_path / "rows.jsonl", row, row)
    asked = [said("system", "Be terse."), said("user", "Hi")]
    assert [prompt.messages for prompt in load_prompts(path)] == [asked] * 2
    kept = load_prompts(path, keep_responses=True)
    assert [prompt.messages for prompt in kept] == [[*asked, said("assistant", "Yes")]] * 2
    assert not caplog.records


@pytest.mark.parametrize("history", [[["Hi", "Hello."]], HELLO[:2], json.dumps([["Hi", "Hello."]])])
def test_histories(tmp_path: Path, history: Any) -> None:
    path = write(tmp_path / "rows.jsonl", {"instruction": "Bye", "output": "See you.", "history": history})
    assert load_prompts(path, keep_responses=True)[0].messages == HELLO
    assert load_prompts(path)[0].messages == [HELLO[0], HELLO[2]]


def test_columns_that_are_not_used_are_named_once(tmp_path: Path, caplog: Any) -> None:
    row = {
        "question": "Hi",
        "answer": "Yes",
        "context": "A text.",
        "persona": "",
        "source": "x",
        "query_id": "q",
        "n": 3,
    }
    load_prompts(write(tmp_path / "rows.jsonl", row, row, {**row, "chat_history": ["a"]}))
    assert [record.getMessage() for record in caplog.records] == [
        "rows.jsonl: not used, though it looks like a part of the conversations: chat_history, context"
    ]
    caplog.clear()
    row = {"messages": [{**HELLO[0], "images": ["x"]}, HELLO[1]], "chosen": "x"}
    load_prompts(write(tmp_path / "rows.jsonl", row), keep_responses=True)
    assert caplog.records[0].getMessage().endswith("conversations: chosen, images of a turn")


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_a_conversation_is_tokenised_in_one_piece(target: Target, scheme: str) -> None:
    pieces = ["<unk>", "<s>", "</s>", "[U]", "[A]", "▁hi", "▁yes", "hi", "yes", "▁", "\n", *"abcdehiy"]
    raw = Tokenizer(models.Unigram([(piece, -1.0) for piece in dict.fromkeys(pieces)], unk_id=0))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    raw.decoder = decoders.Metaspace(prepend_scheme=scheme)
    target.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", eos_token="</s>", additional_special_tokens=["[U]", "[A]"]
    )
    target.__dict__["eos_token_ids"] = frozenset([2])
    piece = raw.token_to_id
    target.tokenizer.chat_template = (
        "{% for m in messages %}{{ '[U]' if m.role == 'user' else '[A]' }}{{ m.content }}"
        "{{ '</s>' if m.role == 'assistant' }}{% endfor %}{% if add_generation_prompt %}[A]{% endif %}"
    )
    turns = [said("user", "hi"), said("assistant", "yes hi"), said("user", "abc"), said("assistant", "hi")]
    ((ids, mask),) = encode_kept(target, turns)
    whole = target.tokenizer("[U]hi[A]yes hi</s>[U]abc[A]hi</s>", add_special_tokens=False).input_ids
    assert ids == whole and spoken(target, ids, mask) == ["yes hi</s>", "hi</s>"]
    start = target.tokenizer("[U]hi[A]yes hi</s>", add_special_tokens=False).input_ids
    said_after = next_prompt(target, start, [turns[0], turns[2]], 1, ["yes hi"])
    assert said_after == target.tokenizer("[U]hi[A]yes hi</s>[U]abc[A]", add_special_tokens=False).input_ids
    # without a control token between, a mark would stand before what follows
    assert continuation(target, "hi", "yes") == [piece("yes")] != target.tokenizer("yes").input_ids


def test_thoughts_of_answers(target: Target, tmp_path: Path) -> None:
    turns = [HELLO[0], said("assistant", "Hello.", reasoning="A greeting.")]
    columns = {"prompt": "Hi", "response": "Hello.", "thinking": "A greeting."}
    with_template(target, THINK)
    for row in ({"messages": turns}, columns):
        assert rows_of(target, tmp_path, row)[0][1] == ["<think>A greeting.</think>Hello.<|im_end|>"]
    with_template(target, TEMPLATE)
    with pytest.raises(BadRow, match="leaves out the thoughts of an answer; give a template that renders it"):
        rows_of(target, tmp_path, {"messages": turns})


def test_tools_and_calls(target: Target, tmp_path: Path) -> None:
    """One row for each answer, after what a server would have rendered for it."""
    tools = [{"name": "add", "parameters": {}}]
    with_template(target, TOOLS)
    (first, call), (second, answer) = rows_of(target, tmp_path, {"messages": LOOP, "tools": json.dumps(tools)})
    assert first.startswith('<|im_start|>system\n[{"type": "function", "function": {"name": "add"')
    assert call == ['<call>{"name": "add", "arguments": {"a": 1}}<|im_end|>'] and answer == ["It is 2.<|im_end|>"]
    assert second == f"{first}{call[0]}\n<|im_start|>tool\n2<|im_end|>\n{ASSISTANT}"
    call_text = json.dumps({"name": "add", "arguments": {"a": 1}})
    sharegpt = [("human", "1 + 1?"), ("function_call", call_text), ("observation", "2"), ("gpt", "It is 2.")]
    turns = [{"from": role, "value": text} for role, text in sharegpt]
    assert rows_of(target, tmp_path, {"conversations": turns, "tools": tools}) == [(first, call), (second, answer)]
    with_template(target, TEMPLATE)
    with pytest.raises(BadRow, match="leaves out the call of an answer"):  # the text beside it has the name, too
        rows_of(target, tmp_path, {"messages": [LOOP[0], said("assistant", "I add.", tool_calls=CALL)]})


def test_an_answer_of_no_weight_is_not_trained_on(target: Target, tmp_path: Path) -> None:
    for weight in ("0", 0.0, False, 0):
        bad = {**HELLO[1], "weight": weight}
        rows = rows_of(target, tmp_path, {"messages": [HELLO[0], bad, *HELLO[2:]]})
        assert [answers for _, answers in rows] == [["See you.<|im_end|>"]] and "Hello." in rows[0][0]
    for weight in (0.5, "no", [0]):
        with pytest.raises(UserError, match="turn 2 has the weight .*, not 0 or 1; mend"):
            rows_of(target, tmp_path, {"messages": [HELLO[0], {**HELLO[1], "weight": weight}]})
    assert rows_of(target, tmp_path, {"messages": [HELLO[0], {**HELLO[1], "weight": 1}]})[0][1]
    with pytest.raises(UserError, match="no response to keep"):
        rows_of(target, tmp_path, {"messages": [HELLO[0], bad]})


@pytest.mark.parametrize("short", ["m['content'].split('</think>')[-1]", "m['content'][:9]"])
def test_a_template_that_leaves_out_a_part_of_an_answer(target: Target, tmp_path: Path, short: str) -> None:
    with_template(target, TEMPLATE.replace("m['content']", short))
    with pytest.raises(BadRow, match="leaves out a part of the answer '<think>Hm.</think>Hello.'"):
        rows_of(target, tmp_path, {"messages": [HELLO[0], said("assistant", "<think>Hm.</think>Hello.")]})


LISTS = TEMPLATE.replace("m['content']", "m['content'][0]['text']")  # of a model that also sees pictures


def test_a_template_that_reads_lists_of_parts_only(target: Target, tmp_path: Path) -> None:
    plain = rows_of(with_template(target, TEMPLATE), tmp_path, {"messages": HELLO})
    looped = "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}"
    for template in (LISTS, TEMPLATE.replace("{{ m['content'] }}", looped)):
        assert rows_of(with_template(target, template), tmp_path, {"messages": HELLO}) == plain


@pytest.mark.parametrize("keep", [False, True])
def test_a_template_that_leaves_out_what_users_say_is_refused(target: Target, tmp_path: Path, keep: bool) -> None:
    with_template(target, TEMPLATE.replace("m['content']", "m['text']"))
    path = write(tmp_path / "rows.jsonl", {"messages": HELLO})
    with pytest.raises(
        UserError, match="the chat template leaves out what a user says; give a Jinja template of chats"
    ):
        prepare(target, tmp_path / "data", prompts=[path], keep_responses=keep, progress=False)
    assert not (tmp_path / "data").exists()


def test_parts_of_prompts_that_the_template_leaves_out_are_told(target: Target, tmp_path: Path, caplog: Any) -> None:
    tools = [{"name": "add", "description": "Sums.", "input_schema": {"type": "object"}}]
    rows = [{"messages": [said("system", "S"), *HELLO], "tools": tools}, {"messages": HELLO}]
    for template, told in ((TOOLS, []), (TEMPLATE, ["tools and their calls"])):
        caplog.clear()
        with_template(target, template)
        path, out = write(tmp_path / "rows.jsonl", *rows), tmp_path / str(len(told))
        prepare(target, out, prompts=[path], keep_responses=True, progress=False)
        assert [text.partition(" leaves out ")[2].partition(";")[0] for text in caplog.messages] == told
    with_template(target, TEMPLATE.replace("in messages", "in messages if m.role != 'system'"))
    prepare(target, tmp_path / "system", prompts=[path], keep_responses=True, progress=False)
    assert "rows.jsonl, line 1: the target's chat template leaves out system prompts" in caplog.text


def test_tools_and_calls_of_other_apis(target: Target, tmp_path: Path) -> None:
    tools = [{"name": "add", "description": "Sums.", "input_schema": {"type": "object"}}]
    call = said("assistant", "", tool_calls=[{"name": "add", "input": {"a": 1}}])
    row = {"messages": [HELLO[0], call], "tools": tools}
    ((before, (answer,)),) = rows_of(with_template(target, TOOLS), tmp_path, row)
    assert '"description": "Sums.", "parameters": {"type": "object"}' in before
    assert answer == '<call>{"name": "add", "arguments": {"a": 1}}<|im_end|>'


def test_lists_of_texts_are_told_to_be_turns(tmp_path: Path, caplog: Any) -> None:
    path = write(tmp_path / "rows.jsonl", *[{"data": ["Hi", "Hello."], "turns": ["a", "b"]}] * 2)
    assert [len(prompt.messages) for prompt in load_prompts(path)] == [2, 2] and not caplog.messages
    assert [len(prompt.messages) for prompt in load_prompts(path, column="data")] == [2, 2]
    assert caplog.messages[:1] == ["column 'data' holds lists of texts: each text is taken for a user's turn"]


def test_what_the_target_answers(tmp_path: Path) -> None:
    """Every user, and the results of tools after the recorded call; other answers are not even read."""
    (prompt,) = load_prompts(write(tmp_path / "rows.jsonl", {"messages": [*LOOP, HELLO[2], said("assistant", None)]}))
    asked = [[m["role"] for m in up_to_answer(prompt.messages, turn, ["a", "b"])] for turn in range(3)]
    assert asked == [["user"], ["user", "assistant", "tool"], ["user", "assistant", "tool", "assistant", "user"]]
    assert prompt.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}


def test_templates_that_rewrite_earlier_answers(target: Target, tmp_path: Path) -> None:
    with_template(target, REWRITING)
    (first, one), (second, two) = rows_of(target, tmp_path, {"messages": HELLO})
    assert one == ["<think></think>Hello.<|im_end|>"] and two == ["<think></think>See you.<|im_end|>"]
    assert second == f"{first}Hello.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n{ASSISTANT}"
    rows = kept_rows(target, Prompt("x", messages=HELLO))
    assert len({row.id for row in rows}) == 1 and rows[0].prompt_length < rows[1].prompt_length
    asked = [HELLO[0], HELLO[2]]
    prompt = prompt_ids(target, asked)
    answer = target.tokenizer("<think>Hm.</think>Hello.").input_ids + [2]
    assert next_prompt(target, prompt + answer, asked, 1, ["<think>Hm.</think>Hello."]) is None
    assert target.tokenizer.decode(prompt_ids(target, asked, 1, ["<think>Hm.</think>Hello."])) == second
    plain = target.tokenizer("Hello.").input_ids + [2]
    assert target.tokenizer.decode(next_prompt(target, prompt + plain, asked, 1, ["Hello."])) == second


def test_a_template_whose_prompt_opens_the_thoughts(target: Target, tmp_path: Path) -> None:
    """The thoughts are trained on as the target writes them: after the tag, which the prompt has."""
    with_template(target, OPENING)
    for opened in ("<think>", ""):  # servers return the answer with it, or without
        turns = [{**turn, "content": f"{opened}Hm.</think>{turn['content']}"} for turn in HELLO if "a" in turn["role"]]
        (first, one), (second, two) = rows_of(target, tmp_path, {"messages": [HELLO[0], turns[0], HELLO[2], turns[1]]})
        assert first == f"<|im_start|>user\nHi<|im_end|>\n{ASSISTANT}<think>"
        assert one == ["Hm.</think>Hello.<|im_end|>"] and two == ["Hm.</think>See you.<|im_end|>"]
        assert second.endswith(f"{ASSISTANT}Hello.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n{ASSISTANT}<think>")
    for answer in (HELLO[1], said("assistant", "Hello.", reasoning_content="Hm.</think>")):
        with pytest.raises(BadRow, match=r"goes on with '<think>' where the conversation has 'Hello.*--chat-template"):
            rows_of(target, tmp_path, {"messages": [HELLO[0], answer]})


def test_a_template_that_moves_the_system_prompt_into_the_last_turn(target: Target, tmp_path: Path) -> None:
    """As Mistral's: where the answer is the last turn, there is no system prompt at all."""
    with_template(target, MOVING)
    turns = [said("system", "Be terse."), *HELLO]
    (first, one), (second, two) = rows_of(target, tmp_path, {"messages": turns})
    assert first == "[INST] Be terse.\n\nHi[/INST]" and one == [" Hello.<|im_end|>"]
    assert second == "[INST] Hi[/INST] Hello.<|im_end|>[INST] Be terse.\n\nBye[/INST]" and two == [
        " See you.<|im_end|>"
    ]
    for shown, place in ((first, 2), (second, 4)):
        assert shown == target.render_chat(turns[:place], add_generation_prompt=True)  # what a server reads
    assert rows_of(target, tmp_path, {"messages": HELLO})[0][1] == [*one, *two]  # without one: a single row
    with_template(target, MOVING.replace("m.content + '<|im_end|>'", "m.content[:3] + '<|im_end|>'"))
    with pytest.raises(BadRow, match="leaves out a part of the answer"):
        rows_of(target, tmp_path, {"messages": turns})
    behind = MOVING.replace("s + '\n\n' + m.content", "m.content + '\n\n' + s")
    with pytest.raises(BadRow, match="does not render an answer after the prompt"):
        rows_of(with_template(target, behind), tmp_path, {"messages": turns})


def test_a_template_that_writes_answers_as_json(target: Target, tmp_path: Path) -> None:
    with_template(target, TEMPLATE.replace("m['content']", "m['content'] | tojson"))
    answer = said("assistant", 'Say "hé".\nNow.')
    assert rows_of(target, tmp_path, {"messages": [HELLO[0], answer]})[0][1] == ['"Say \\"hé\\".\\nNow."<|im_end|>']


def test_masks_of_generation_blocks(target: Target) -> None:
    """A tokenizer drops the blanks at the end of a block: transformers' mask would go on to the end."""
    words = ["<unk>", "<s>", "</s>", "[U]", "[A]", "hi", "yes", "bye"]
    raw = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    target.tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="</s>")
    with_template(target, MARKED)
    turns = [said("user", "hi"), said("assistant", "yes hi"), said("user", "bye"), said("assistant", "bye")]
    ((ids, mask),) = encode_kept(target, turns)
    assert spoken(target, ids, mask) == ["yes hi", "bye"]
    with_template(
        target, MARKED.replace("[U] {{ m['content'] }} ", "[U] {% generation %}{{ m['content'] }}{% endgeneration %} ")
    )
    ((ids, mask),) = encode_kept(target, turns)
    assert spoken(target, ids, mask) == ["yes hi", "bye"]  # whatever is marked
    with_template(target, "{# {% generation %} #}" + TEMPLATE)
    with pytest.raises(BadRow, match="marks nothing of an answer with {% generation %}; give a template"):
        encode_kept(target, turns)


def test_several_named_templates(target: Target, tmp_path: Path) -> None:
    with_template(target, {"default": TEMPLATE, "tool_use": TOOLS})
    assert rows_of(target, tmp_path, {"messages": HELLO[:2]})[0][0].startswith("<|im_start|>user")
    with_tools = {"messages": HELLO[:2], "tools": [{"type": "function", "function": {"name": "add"}}]}
    assert rows_of(target, tmp_path, with_tools)[0][0].startswith("<|im_start|>system\n[")
    assert len(target.template_hash) == len(target.fingerprint) == 16
    with_template(target, {"rag": TEMPLATE, "tool_use": TOOLS})
    with pytest.raises(UserError, match=r"several chat templates \(rag, tool_use\) and none is called default"):
        rows_of(target, tmp_path, {"messages": HELLO[:2]})


def test_a_row_is_known_again_on_another_day(target: Target, tmp_path: Path) -> None:
    with_template(target, DATED)
    days = (datetime(2026, 11, 28), datetime(2026, 12, 1))
    texts, ids = [], []
    for target.rendering_time in days:
        (row,) = kept_rows(target, Prompt("x", messages=HELLO))
        texts.append(target.tokenizer.decode(row.ids))
        ids.append((row.id, prompt_id(target, [HELLO[0]])))
    assert "\n28 November 2026<" in texts[0] and "\n01 December 2026<" in texts[1] and len({*ids[0], *ids[1]}) == 1
    target.rendering_time = None
    path = write(tmp_path / "rows.jsonl", {"messages": HELLO})
    dataset = prepare(target, tmp_path / "data", prompts=[path], keep_responses=True, progress=False)
    (tmp_path / "data" / "manifest.json").unlink()
    plan = tmp_path / "data" / "plan.json"
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "rendering_time": "2025-01-02T03:04"}))
    dataset = prepare(target, tmp_path / "data", prompts=[path], keep_responses=True, progress=False)
    assert dataset is not None and dataset.manifest["rendering_time"] == "2025-01-02T03:04"
    row = (dataset.rows("train") + dataset.rows("held-out"))[0]
    assert "02 January 2025" in target.tokenizer.decode(row.ids) and row.id == ids[0][0]
    assert target.rendering_time is None


def test_a_token_that_the_target_has_not(target: Target, tmp_path: Path) -> None:
    target.tokenizer.add_tokens(["<image>"])
    rows = [{"prompt": text, "response": "Yes"} for text in ("one", "two <image>", "three")]
    path = write(tmp_path / "rows.jsonl", *rows)
    for keep in (True, False):
        with pytest.raises(
            UserError, match=r"rows.jsonl, line 2: token 259 \(<image>\) is beyond .* vocabulary of 259"
        ):
            prepare(target, tmp_path / "data", prompts=[path], keep_responses=keep, progress=False)
    dataset = prepare(target, tmp_path / "data", prompts=[path], keep_responses=True, progress=False, skip_invalid=True)
    assert dataset is not None and dataset.manifest["skipped"] == {"a token beyond the target's vocabulary": 1}


def test_plain_text_is_what_a_server_reads(target: Target, tmp_path: Path) -> None:
    raw = target.tokenizer.backend_tokenizer
    raw.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    target.tokenizer.bos_token = "<|endoftext|>"
    read = target.tokenizer("A story.").input_ids
    for text in ("A story.", "<|endoftext|>A story."):
        (row,) = kept_rows(target, Prompt("x", text=text))
        assert row.ids == read and row.mask == [False] + [True] * 8
    rendered = target.render_chat(HELLO, add_generation_prompt=False)
    (row,) = kept_rows(target, Prompt("x", text=rendered))
    assert spoken(target, row.ids, row.mask) == ["Hello.<|im_end|>", "See you.<|im_end|>"]


UNCLEAN = {
    "not JSON": '{"conversations": [',
    "no turns": {"conversations": []},
    "the first turn is the assistant's": {"conversations": [said("assistant", "a"), *HELLO]},
    "two user turns in a row": {"conversations": [HELLO[0], *HELLO]},
    "an unknown role": {"conversations": [HELLO[0], said("bing", "a")]},
    "a turn with parts that are not text": {
        "conversations": [HELLO[0], said("assistant", [{"type": "thinking", "text": "Hm."}, {"text": "Hi"}])]
    },
    "an empty answer": {"conversations": [HELLO[0], said("assistant", None)]},
    "an empty turn": {"conversations": [said("user", " "), HELLO[1]]},
    "a turn that is no object": {"conversations": [HELLO[0], 7]},
    "no text": {"conversations": [HELLO[0], said("assistant", 7)]},
    "a row without columns": [HELLO],
    "a call without a name": {"conversations": [HELLO[0], said("assistant", "", tool_calls=[{"id": "x"}])]},
    "a history that cannot be read": {"conversations": HELLO, "history": ["a"]},
    "tools that are no list": {"conversations": HELLO, "tools": 7},
}


@pytest.mark.parametrize("reason", UNCLEAN)
def test_an_unclean_row_is_named_or_left_out(tmp_path: Path, reason: str) -> None:
    good = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}
    path = write(tmp_path / "rows.jsonl", good, UNCLEAN[reason], good)
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: .*; .* --skip-invalid\.$"):
        load_prompts(path, keep_responses=True)
    skipped: Counter[str] = Counter()
    assert len(load_prompts(path, keep_responses=True, skipped=skipped)) == 2 and skipped == {reason: 1}


def test_a_file_of_one_conversation_says_that_nothing_is_held_out(target: Target, tmp_path: Path, caplog: Any) -> None:
    rows = ({"messages": [HELLO[0], said("assistant", f"Hi {n}.")]} for n in range(4))
    settings = {"keep_responses": True, "held_out_share": 0.5, "progress": False}
    prepare(target, tmp_path / "data", prompts=[write(tmp_path / "rows.jsonl", *rows)], **settings)
    assert "nothing is held out: all rows begin with the same turn" in caplog.text


def test_rows_left_out_are_counted(target: Target, tmp_path: Path, caplog: Any) -> None:
    path = write(tmp_path / "rows.jsonl", *({"messages": [said("user", f"Hi {n}"), HELLO[1]]} for n in range(4)))
    with Path(path).open("ab") as file:
        file.write(b'{"messages": "\xe9"}\n{"mess\n{"mess\n')
    dataset = prepare(target, tmp_path / "data", prompts=[path], keep_responses=True, progress=False, skip_invalid=True)
    assert dataset is not None and dataset.manifest["skipped"] == {"not JSON": 2, "not UTF-8 text": 1}
    assert dataset.manifest["counts"]["skipped_rows"] == 3
    assert "rows left out: 3 (not JSON: 2, not UTF-8 text: 1)" in caplog.text
    bad = write(tmp_path / "bad.jsonl", "{", "[")
    with pytest.raises(UserError, match=r"no row of .*bad.jsonl can be used \(not JSON: 2\)"):
        prepare(target, tmp_path / "none", prompts=[bad], keep_responses=True, progress=False, skip_invalid=True)
    thoughts = write(tmp_path / "t.jsonl", {"messages": [HELLO[0], said("assistant", "Hi.", thinking="Hm.")]})
    with pytest.raises(UserError, match=r"left \(.*the thoughts left out by the chat template: 1.*\); give other"):
        prepare(target, tmp_path / "none", prompts=[thoughts], keep_responses=True, progress=False, skip_invalid=True)


def test_a_template_from_a_file(target: Target, tmp_path: Path) -> None:
    path, before = tmp_path / "chat.jinja", target.fingerprint
    path.write_text(THINK)
    target.use_chat_template(read_chat_template(path))
    turns = [HELLO[0], said("assistant", "Hello.", reasoning_content="Hm.")]
    assert rows_of(target, tmp_path, {"messages": turns})[0][1] == ["<think>Hm.</think>Hello.<|im_end|>"]
    assert target.fingerprint == before != target.template_hash  # the target is the same
    for text, what in {
        "{% if %}": "is no Jinja template",
        "hello": "leaves out what a user says",
        "{{ raise_exception('no') }}": r"refuses a user's turn \(no\)",
    }.items():
        with pytest.raises(UserError, match=what):
            target.use_chat_template(text)
    path.write_bytes(b"\xff")
    for file, what in (
        (path, "is not UTF-8 text"),
        (tmp_path, "cannot be read"),
        (tmp_path / "none", "cannot be read"),
    ):
        with pytest.raises(UserError, match=f"--chat-template .* {what}.*; give a file"):
            read_chat_template(file)


def test_a_template_on_the_command_lines(
    folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, caplog: Any
) -> None:
    """Both programs take the same file; a data set of it fits the target."""
    path = tmp_path / "chat.jinja"
    path.write_text(THINK)
    turns = [HELLO[0], said("assistant", "Hello.", reasoning_content="Hm.")]
    file = write(tmp_path / "rows.jsonl", {"messages": turns}, "{", {"messages": HELLO})

    def run(*words: Any) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["draft-train", "prepare", "--target", str(folder), *map(str, words)])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0), capsys.readouterr().err
        return 0, capsys.readouterr().err

    common = ("--prompts", file, "--keep-responses", "--out", tmp_path / "data")
    status, shown = run(*common, "--chat-template", tmp_path / "none.jinja")
    assert status == 2 and shown.startswith("draft-train: --chat-template") and shown.count("\n") == 1
    assert run(*common, "--chat-template", path, "--skip-invalid")[0] == 0
    dataset = open_dataset(tmp_path / "data")
    dataset.check_target(load_target(str(folder), "float32"))
    rows = dataset.rows("train") + dataset.rows("held-out")
    assert len(rows) == 2 and dataset.manifest["skipped"] == {"not JSON": 1}
    options = {"warm_up": False, "threads": None, "mode": "eager", "speculation": "off", "max_batch": 1}
    engine = load_engine(str(folder), None, "float32", chat_template=path, **options)
    assert "<think>Hm.</think>" in engine.target.render_chat(turns, add_generation_prompt=True)
    assert "chat template" not in caplog.text
    path.write_text("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + DATED)
    load_engine(str(folder), None, "float32", chat_template=path, **options)
    assert "the target's chat template refuses system prompts (no system)" in caplog.messages
    path.write_text("{{ messages[-1].content }}")
    load_engine(str(folder), None, "float32", chat_template=path, **options)
    assert [text for text in caplog.messages if "leaves out" in text] == [
        f"the target's chat template leaves out {part}" for part in ("system prompts", "earlier answers")
    ]
    with pytest.raises(UserError, match="--chat-template .* cannot be read"):
        load_engine("not loaded", None, "float32", chat_template=tmp_path / "none.jinja", **options)


def test_a_configuration_of_a_hub_data_set(tmp_path: Path, monkeypatch: Any) -> None:
    """A folder here has the layout of one of the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "some"
    folder.mkdir()
    for name in ("fr", "de"):
        write(folder / f"{name}.jsonl", {"prompt": f"in {name}"})
    configs = "".join(f"- config_name: {n}\n  data_files: [{{split: test, path: {n}.jsonl}}]\n" for n in ("fr", "de"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert load_prompts("some:de:test")[0].messages == [said("user", "in de")]
    for source, said_ in {"some:": r"\['fr', 'de'\]", "some:it:test": "'fr', 'de'", "some:fr:train": "'test'"}.items():
        with pytest.raises(UserError, match=f"{said_}.*choose a configuration and a split as owner/name:config:split"):
            load_prompts(source)
