"""Proof that a trained adapter is a matrix: outputs before and after merging."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from draft.afa import merge_adapter


def merged_differences(model: PeftModel, outputs: Callable[[Any], Tensor]) -> dict[str, float]:
    """Return the largest difference of outputs before and after merging, relative to the largest output, by dtype.

    model: is left as it is. outputs: calls the module that it is given in the dtype of its weights.

    Raises:
        UserError: while the adapter's β is above 0.
    """
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad():
            same = copy.deepcopy(model).to(dtype).eval()
            # a forward that a trainer has put on the instance (TRL's does) is bound to the model that was copied
            same.get_base_model().__dict__.pop("forward", None)
            before = outputs(same.get_base_model()).double()
            after = outputs(merge_adapter(same)).double()
        found[str(dtype).removeprefix("torch.")] = float((after - before).abs().max() / before.abs().max())
    return found
