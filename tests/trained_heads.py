"""Text that a tiny target writes, and heads that are trained on some for a moment: often right and often wrong."""

from typing import Any

import torch
from torch import Tensor

from draft.data.dataset import Row
from draft.heads.unroll import shift_left
from draft.target import Target


def make_row(
    prompt: list[int], response: list[int], temperature: float = 0.0, top_p: float = 1.0, id: str = "row"
) -> Row:
    mask = [False] * len(prompt) + [True] * len(response)
    return Row(id, [*prompt, *response], mask, len(prompt), temperature, top_p, "test")


def responses_of(
    target: Target, prompts: list[list[int]], max_new_tokens: int, temperature: float = 0.0
) -> list[list[int]]:
    """The target's answers by transformers, each with the EOS that ends it."""
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    options = sampling if temperature else {"do_sample": False}
    torch.manual_seed(0)
    responses = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        written = target.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens,
            eos_token_id=sorted(target.eos_token_ids), pad_token_id=2, **options,
        )  # fmt: skip
        responses.append(written[0, len(prompt) :].tolist())
    return responses


def train_briefly(head: Any, target: Target, ids: Tensor, *, draft_steps: int, rate: float, steps: int) -> Any:
    """The head after some steps on the texts `ids` [rows, tokens], in place."""
    with torch.no_grad():
        output = target.forward(ids, layers=head.auxiliary_layers(target))
        embeds, teacher = target.embedding(ids), target.logits(output.last_hidden, head.vocabulary).softmax(-1)
    optimiser = torch.optim.AdamW(head.train().parameters(), lr=rate)
    for _ in range(steps):
        loss = torch.zeros((), dtype=torch.float64)
        for step, hidden in enumerate(head.unroll(embeds, output.auxiliary, draft_steps)):
            loss = loss - (shift_left(teacher, 1 + step) * head.logits(hidden, step).log_softmax(-1)).sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return head.eval()
