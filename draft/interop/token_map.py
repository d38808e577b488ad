"""d2t and t2d, the two directions between a head's reduced vocabulary and its target's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from draft.errors import UserError
from draft.interop.foreign import Checkpoint


def complete_token_map(found: Checkpoint, values: dict[str, Any]) -> None:
    """Check the token map of a checkpoint against its config, and derive the missing half, in place.

    Raises:
        UserError: for a map that is missing, or that the target's vocabulary has no room for.
    """
    tensors, vocab = found.tensors, int(values["vocab_size"])
    size = int(values.get("draft_vocab_size") or vocab)
    if size == vocab:
        return  # `fill` takes trivial maps only
    d2t, t2d = tensors.get("d2t"), tensors.get("t2d")
    if d2t is None and t2d is None:
        raise UserError(
            f"{str(found.folder)!r}: draft_vocab_size is {size} of {vocab} tokens, and there is no d2t to say which; "
            "get the whole head."
        )
    if t2d is not None and t2d.shape != (vocab,):
        raise UserError(
            f"{str(found.folder)!r}: t2d has {len(t2d)} entries and the target's vocabulary {vocab} tokens."
        )
    if d2t is None:
        assert t2d is not None
        ids = t2d.bool().nonzero()[:, 0]
        tensors["d2t"] = ids - torch.arange(len(ids))
        found.notes.append("filled in d2t from t2d: draft ids in the order of their target ids.")
    else:
        tensors["d2t"] = d2t.to(torch.int64)
    problem = token_map_problem(tensors["d2t"], size, vocab)
    if problem:
        raise UserError(f"{str(found.folder)!r}: {problem}; use the target that the head was made for.")
    marks = torch.zeros(vocab, dtype=torch.bool)
    marks[tensors["d2t"] + torch.arange(size)] = True
    if t2d is None:
        found.notes.append("filled in t2d from d2t.")
    elif not torch.equal(t2d.bool(), marks):
        raise UserError(
            f"{str(found.folder)!r}: t2d marks {int(t2d.bool().sum())} target tokens and d2t gives {size}, others; "
            "the two belong to different heads."
        )
    tensors["t2d"] = marks


def token_map_problem(d2t: Tensor, size: int, vocab: int) -> str | None:
    """What is wrong with offsets d2t [draft_vocab] into a vocabulary, in words; None: nothing."""
    if d2t.shape != (size,):
        return f"d2t has {len(d2t)} entries and the draft vocabulary {size}"
    ids = d2t.to(torch.int64) + torch.arange(size)
    outside = ((ids < 0) | (ids >= vocab)).nonzero()
    if len(outside):
        place = int(outside[0])
        absolute = int(d2t.min()) >= 0 and int(d2t.max()) < vocab and len(d2t.unique()) == size
        hint = " (it seems to hold target ids where offsets are expected)" if absolute else ""
        return f"d2t maps draft id {place} to target id {int(ids[place])}, and the target's vocabulary is {vocab}{hint}"
    if len(ids.unique()) != size:
        return f"d2t maps {size} draft ids to only {len(ids.unique())} target ids"
    return None
