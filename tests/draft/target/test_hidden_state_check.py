"""The check of captured hidden states: silent when they are right, one sentence when a layer is off by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, make_tiny_head, make_tiny_target
from families import FAMILIES, model_of
from torch import Tensor, nn

from draft.data.prepare import prepare
from draft.errors import UserError
from draft.heads.checkpoint import save_head
from draft.interop.importing import import_head
from draft.target import Target
from draft.target import target as targets
from draft.target.hidden_states import check_hidden_states

capture = targets.capture_hidden_states


@contextmanager
def one_layer_off(decoder: nn.Module, layers: Sequence[int], into: dict[int, Tensor]) -> Iterator[None]:
    """Capture what enters the layer before each, as one does who counts layers another way."""
    captured: dict[int, Tensor] = {}
    with capture(decoder, [layer - 1 for layer in layers], captured):
        yield
    into.update({layer: captured[layer - 1] for layer in layers})


@contextmanager
def changed_in_place(decoder: nn.Module, layers: Sequence[int], into: dict[int, Tensor]) -> Iterator[None]:
    """Capture states to which later layers add in place."""
    with capture(decoder, layers, into):
        yield
    for states in into.values():
        states += 0.1 * states.roll(1, dims=-1)


@contextmanager
def of_another_shape(decoder: nn.Module, layers: Sequence[int], into: dict[int, Tensor]) -> Iterator[None]:
    """Capture several streams, where an architecture has them."""
    with capture(decoder, layers, into):
        yield
    into.update({layer: torch.stack([states, states]) for layer, states in into.items()})


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_right_in_every_family_and_one_layer_off_is_noticed(
    family: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, own = FAMILIES[family]
    target = Target(family, model_of(kind, **own).to(getattr(torch, dtype)), byte_tokenizer())
    check_hidden_states(target)
    check_hidden_states(target, (target.num_layers,))
    monkeypatch.setattr(targets, "capture_hidden_states", one_layer_off)
    for layer, place in ((2, "entering layer 2"), (5, "entering layer 5"), (9, "after the final norm")):
        with pytest.raises(
            UserError, match=rf"captured {place}, are off by 0\.[1-9]|captured {place}, are off by [1-9]"
        ):
            check_hidden_states(target, (layer,))


@pytest.mark.parametrize("fault", [changed_in_place, of_another_shape], ids=lambda fault: fault.__name__)
def test_other_faults_are_noticed(fault: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    target = make_tiny_target()
    monkeypatch.setattr(targets, "capture_hidden_states", fault)
    with pytest.raises(UserError, match=r"captured entering layer 2, are off by"):
        check_hidden_states(target)


def test_logits_that_are_not_the_targets_own_are_noticed() -> None:
    target = make_tiny_target()
    target.logit_scale = 1.1
    with pytest.raises(UserError, match="off by"):
        check_hidden_states(target)


def test_a_tokenizer_that_knows_no_word_is_no_obstacle() -> None:
    target = make_tiny_target()
    target.tokenizer = lambda text, **_: type("Encoded", (), {"input_ids": [0] * 12})
    check_hidden_states(target)
    target.logit_scale = 1.1
    with pytest.raises(UserError, match="off by"):
        check_hidden_states(target)


def test_prepare_and_import_refuse_before_they_write(
    tiny_target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_head(make_tiny_head(tiny_target), tmp_path / "head", dtype=torch.float64, about={})
    prompts = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    prompts.write_text(json.dumps({"messages": messages}) + "\n")
    given: Any = {"prompts": [prompts], "keep_responses": True, "held_out_share": 0.0, "progress": False}
    monkeypatch.setattr(targets, "capture_hidden_states", one_layer_off)
    with pytest.raises(UserError, match="hidden states captured entering layer 2"):
        prepare(tiny_target, tmp_path / "data", **given)
    with pytest.raises(UserError, match="hidden states captured entering layer 2"):
        import_head(tmp_path / "head", tiny_target, tmp_path / "imported")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head", "prompts.jsonl"]
    monkeypatch.undo()
    prepare(tiny_target, tmp_path / "data", **given)
    import_head(tmp_path / "head", tiny_target, tmp_path / "imported")
