"""Import: heads of other trainers, brought to our one folder format, or refused with the reason.

A format is an entry of SOURCES: how to recognise it, and how to bring its config.json and tensor names to those of
the plain EAGLE-3 format. What comes after is common: filling in what is missing, and fitting the head to its target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draft.checkpoint import check_fits, fill, save_head
from draft.errors import UserError
from draft.heads import Eagle3Config, Eagle3Head
from draft.heads.eagle3_config import LAYER_IDS, check_layers, read_layer_ids
from draft.interop.foreign import Checkpoint, read_checkpoint
from draft.interop.token_map import complete_token_map
from draft.target import Target

_PLAIN = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")
# (part of a foreign name, ours), in this order
_RENAMES = (
    ("layers.0.", "midlayer."),
    ("aux_norm_low.", "fc_norm.0."),
    ("aux_norm_mid.", "fc_norm.1."),
    ("aux_norm_high.", "fc_norm.2."),
)
# tensors that hold nothing of the head: copies of the target's, and tables that are computed
_LEFT_OUT = ("verifier_lm_head.weight", "verifier_norm.weight", "midlayer.self_attn.rotary_emb.inv_freq")


@dataclass(frozen=True)
class Imported:
    """What an import did."""

    head: Path
    kind: str
    notes: list[str]  # sentences: what was filled in, left out or assumed


@dataclass(frozen=True)
class Source:
    """A format: `recognise` a checkpoint, and `translate` its config to the plain format's keys (names, values)."""

    name: str
    recognise: Callable[[Checkpoint], bool]
    translate: Callable[[Checkpoint], dict[str, Any]]
    copies_lm_head: bool = False  # having no word for an LM head that is the target's, it holds a copy


def import_head(
    source: str | Path, target: Target, out: str | Path, *, auxiliary_layers: list[int] | None = None
) -> Imported:
    """Write the head in the folder `source` as a head for `target`, bit for bit in its own dtype.

    auxiliary_layers: the target's layers that the head was trained on, counted as layers that have run; for heads
    whose config.json leaves that open, or is wrong.

    Raises:
        UserError: for an unknown format, or a head that doesn't fit the target, naming both values.
    """
    found = read_checkpoint(source)
    kind = next((kind for kind in SOURCES if kind.recognise(found)), None)
    if kind is None:
        names = (found.config.get("architectures") or ["none"])[0]
        raise UserError(
            f"{str(source)!r} (architecture {names}, tensors {', '.join(sorted(found.tensors)[:3])}, ...) is in none "
            f"of the formats {'; '.join(kind.name for kind in SOURCES)}."
        )
    values = kind.translate(found)
    found.tensors = _renamed(found)
    values = _with_layers(values, auxiliary_layers, target, found.notes)
    _drop_embedding(found, target)
    if kind.copies_lm_head:
        _drop_copied_lm_head(found, target)
    _complete(values, found, target)
    complete_token_map(found, values)
    head = Eagle3Head(Eagle3Config.from_dict(values))
    dtype = _one_dtype(found)
    head.to(dtype)
    fill(head, found.tensors, str(source))
    check_fits(head, {}, target)
    about = {**found.about, "target": target.name, "target_fingerprint": target.fingerprint, "imported_as": kind.name}
    save_head(head, out, dtype=dtype, about=about)
    return Imported(Path(out), kind.name, found.notes)


def _is_speculators(found: Checkpoint) -> bool:
    return "speculators_model_type" in found.config or "speculators_config" in found.config


def _from_speculators(found: Checkpoint) -> dict[str, Any]:
    """The decoder layer's configuration with the head's own keys over it."""
    config = found.config
    kind, inner = config.get("speculators_model_type"), config.get("transformer_layer_config") or {}
    if kind != "eagle3" or inner.get("model_type", "llama") != "llama":
        raise UserError(
            f"{str(found.folder)!r}: speculators_model_type = {kind!r} over a layer of {inner.get('model_type')!r}; "
            "only 'eagle3' over 'llama' is supported."
        )
    if "norm_before_residual" not in config:
        raise UserError(
            f"{str(found.folder)!r}: config.json has no norm_before_residual, which vLLM then takes for true and "
            "speculators for false; add the value that the head was trained with."
        )
    own = ("draft_vocab_size", "target_hidden_size", "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    kept = {key: config[key] for key in own if config.get(key) is not None}
    layers = {LAYER_IDS: config[LAYER_IDS]} if config.get(LAYER_IDS) else {}
    return {**inner, **kept, **layers}


def _is_plain(found: Checkpoint) -> bool:
    return (found.config.get("architectures") or [""])[0] in _PLAIN


def _is_original(found: Checkpoint) -> bool:
    return any("midlayer." in name for name in found.tensors)


def _from_plain(found: Checkpoint) -> dict[str, Any]:
    values = dict(found.config)
    nested = values.get("eagle_config") or {}
    if "norm_before_fc" in nested:  # which engines read first
        values["norm_before_fc"] = nested["norm_before_fc"]
    if values.get("use_aux_norm"):  # SGLang's older name
        values["fc_norm"] = True
    return values


# the first that recognises a checkpoint reads it
SOURCES = (
    Source("speculators eagle3", _is_speculators, _from_speculators, copies_lm_head=True),
    Source("plain EAGLE-3 of SGLang and vLLM", _is_plain, _from_plain),
    Source("SafeAILab EAGLE-3", _is_original, _from_plain),
)


def _renamed(found: Checkpoint) -> dict[str, Tensor]:
    tensors = {}
    for name, value in found.tensors.items():
        name = name.removeprefix("model.")
        for theirs, ours in _RENAMES:
            name = name.replace(theirs, ours, 1)
        if name in _LEFT_OUT:
            found.notes.append(f"left out {name}: it is not the head's.")
        else:
            tensors[name] = value
    return tensors


def _with_layers(values: dict[str, Any], chosen: list[int] | None, target: Target, notes: list[str]) -> dict[str, Any]:
    """Settle the auxiliary layers: the user's word, or the one reading that gives the target's default layers."""
    values = dict(values)
    default = list(target.default_auxiliary_layers)
    nested = dict(values.get("eagle_config") or {})
    leaving = [layer - 1 for layer in default]
    if chosen is not None:
        check_layers(chosen, target.num_layers)
        values[LAYER_IDS] = chosen
        nested.pop(LAYER_IDS, None)
    elif not values.get(LAYER_IDS) and nested.get(LAYER_IDS) in (default, leaving):
        way = "entering" if nested[LAYER_IDS] == default else "leaving"
        notes.append(
            f"took the layers {nested[LAYER_IDS]} of eagle_config for the default ones, as the states {way} them."
        )
        values[LAYER_IDS] = default
        nested.pop(LAYER_IDS)
    elif values.get(LAYER_IDS) == leaving:
        notes.append(
            f"{LAYER_IDS} = {leaving} is what vLLM would read, and also how other trainers write the default layers "
            f"{default}; if the head drafts badly, import it with --auxiliary-layers {','.join(map(str, default))}."
        )
    values["eagle_config"] = nested
    if values.get(LAYER_IDS) and read_layer_ids(values) == default:
        values[LAYER_IDS] = None
        nested.pop(LAYER_IDS, None)
    return values


def _complete(values: dict[str, Any], found: Checkpoint, target: Target) -> None:
    """Fill in what may be missing, and refuse sizes that aren't the target's; all in place."""
    width = values.get("target_hidden_size") or values.get("hidden_size")
    for what, ours, theirs in (
        ("hidden size", values.get("hidden_size"), target.hidden_size),
        ("target_hidden_size", width, target.hidden_size),
        ("vocabulary", values.get("vocab_size"), target.vocab_size),
    ):
        if ours != theirs:
            raise UserError(
                f"{str(found.folder)!r}: the head's {what} is {ours} and the target's is {theirs}; use the target "
                "that it was made for."
            )
    # what engines assume too where a LlamaConfig says nothing
    defaults: dict[str, Any] = {"rms_norm_eps": 1e-6, "hidden_act": "silu"}
    if not values.get("rope_parameters") and not values.get("rope_theta"):
        defaults["rope_theta"] = 10000.0
    for key, value in defaults.items():
        if values.get(key) is None:
            values[key] = value
            found.notes.append(f"filled in {key} = {value}, which engines assume.")
    _complete_lm_head(values, found, target)
    _complete_rope(values, found, target)


def _complete_rope(values: dict[str, Any], found: Checkpoint, target: Target) -> None:
    """The head's context is its target's; scaled RoPE remembers the length that it was made for."""
    theirs = values.get("max_position_embeddings")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    scaled = rope.get("rope_type", rope.get("type", "default"))
    if scaled != "default":
        rope = {**rope, "rope_type": scaled}
        if theirs and scaled in ("yarn", "longrope"):
            rope.setdefault("original_max_position_embeddings", theirs)
        rope.setdefault("rope_theta", values.get("rope_theta") or 10000.0)
        values["rope_parameters"] = rope
    if theirs != target.stated_length:
        values["max_position_embeddings"] = target.stated_length
        found.notes.append(f"set max_position_embeddings from {theirs} to the target's {target.stated_length}.")


def _complete_lm_head(values: dict[str, Any], found: Checkpoint, target: Target) -> None:
    """Whose LM head it is: its own where the file has one, else the target's, if over its whole vocabulary."""
    own, size = found.tensors.get("lm_head.weight"), values.get("draft_vocab_size")
    tied = bool(target.config.tie_word_embeddings)
    if values.get("tie_word_embeddings") and (own is not None or not tied):
        raise UserError(
            f"{str(found.folder)!r}: tie_word_embeddings = true means the embedding for SGLang and the file's or the "
            "target's LM head for vLLM; set it to false beside an LM head of the head's own."
        )
    if own is not None:
        if size is None:
            values["draft_vocab_size"] = len(own)
            found.notes.append(f"filled in draft_vocab_size = {len(own)}, the rows of lm_head.weight.")
        return
    if size not in (None, target.vocab_size):
        raise UserError(
            f"{str(found.folder)!r}: lm_head.weight is missing, and draft_vocab_size is {size} where the target's LM "
            f"head has {target.vocab_size} rows; a reduced vocabulary needs an LM head of its own."
        )
    values["draft_vocab_size"] = None
    found.notes.append("the file has no LM head: the target's is used.")


def _drop_embedding(found: Checkpoint, target: Target) -> None:
    """Leave out a copy of the target's embedding; refuse another one, which vLLM would use and SGLang would not."""
    theirs = found.tensors.pop("embed_tokens.weight", None)
    if theirs is None:
        return
    ours = target.embedding.weight.detach().cpu()
    if theirs.shape != ours.shape:
        raise UserError(
            f"{str(found.folder)!r}: embed_tokens.weight is {list(theirs.shape)} and the target's {list(ours.shape)}; "
            "use the target that the head was made for."
        )
    # both may have been rounded, to different half precisions
    if not torch.allclose(theirs.float(), ours.float(), rtol=2**-8, atol=2**-24):
        worst = float((theirs.float() - ours.float()).abs().max())
        raise UserError(
            f"{str(found.folder)!r}: embed_tokens.weight differs from the target's by up to {worst:.2g}: vLLM would "
            "use it and SGLang would not; use the target that the head was made for, or a head without one."
        )
    found.notes.append("left out embed_tokens.weight: it is the target's.")


def _drop_copied_lm_head(found: Checkpoint, target: Target) -> None:
    own = found.tensors.get("lm_head.weight")
    if own is not None and torch.equal(own, target.lm_head.weight.detach().to("cpu", own.dtype)):
        del found.tensors["lm_head.weight"]
        found.notes.append("left out lm_head.weight: it is the target's.")


def _one_dtype(found: Checkpoint) -> torch.dtype:
    """The dtype of the file; where there are several, the one that holds them all."""
    dtypes = sorted({value.dtype for value in found.tensors.values() if value.is_floating_point()}, key=str)
    if not dtypes:
        raise UserError(f"{str(found.folder)!r} has no floating-point tensors; give the folder of a whole head.")
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    if len(dtypes) > 1:
        found.notes.append(f"brought tensors of {', '.join(map(str, dtypes))} to {widest}.")
    return widest
