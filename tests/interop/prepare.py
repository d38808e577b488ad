"""Write what the other engines are to load, and what we make of the same input.

    python -m interop.prepare FOLDER speculators|vllm

FOLDER/target is a tiny target; FOLDER/FORMAT/CASE an export. FOLDER/CASE.safetensors has, for speculators, inputs and
our logits; for vLLM, a prompt, the target's greedy text and our drafts, and FOLDER/commands.json the printed commands.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from draft.evaluation.replay import drafted_states
from draft.heads import DraftHead
from draft.heads.checkpoint import attach_head, load_head, save_head
from draft.interop.exporting import export_head
from draft.target import Target, load_target
from interop.cases import CASES, OTHERS, VLLM_HEAD_DIM, random_head, tiny_target

STEPS, TOKENS = 3, 24


def for_speculators(folder: Path) -> None:
    """Every option of an EAGLE-3 head; the bundled head on the bundled target too, as the case `bundled`."""
    target = tiny_target(folder / "target")
    for case, options in CASES.items():
        head = folder / "heads" / case
        save_head(random_head(target, **options), head, dtype=torch.float32, about={"target": target.name})
        write_logits(folder, case, head, target)
    write_logits(folder, "bundled", "smollm2-eagle3", load_target("smollm2", torch.float32, "cpu"))


def write_logits(folder: Path, case: str, head: str | Path, target: Target) -> None:
    """Export a head, and unroll it over random tokens."""
    export_head(head, "speculators", folder / "speculators" / case)
    loaded, about = load_head(head, dtype=torch.float32)
    attach_head(loaded, about, target)
    generator = torch.Generator().manual_seed(len(case))
    ids = torch.randint(3, target.vocab_size, (1, TOKENS), generator=generator)
    with torch.no_grad():
        auxiliary = target.forward(ids, layers=loaded.auxiliary_layers(target)).auxiliary
        assert auxiliary is not None
        steps = loaded.unroll(target.embedding(ids), auxiliary, STEPS)
        logits = {f"logits.{step}": loaded.logits(hidden) for step, hidden in enumerate(steps)}
    tensors = {"ids": ids, "auxiliary": auxiliary, **logits}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / f"{case}.safetensors")


def for_vllm(folder: Path) -> None:
    """Exports, the commands that they printed, and what we draft."""
    target, heads, commands = export_for_vllm(folder)
    (folder / "commands.json").write_text(json.dumps(commands, indent=1) + "\n")
    prompt = torch.randint(3, target.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0))
    text = greedy_text(target, prompt, TOKENS + max(map(steps_of, heads.values())))
    for case, head in heads.items():
        tensors = {"prompt": prompt, "text": text, "drafts": drafts(target, head, prompt, text)}
        save_file(tensors, folder / f"{case}.safetensors")


def export_for_vllm(folder: Path) -> tuple[Target, dict[str, DraftHead], dict[str, str]]:
    """The tiny target, heads by case, and printed commands by FORMAT/CASE.

    Every option of an EAGLE-3 head, in both formats that vLLM reads, and heads of the other architectures.
    """
    target, commands = tiny_target(folder / "target", VLLM_HEAD_DIM), {}
    heads = {case: random_head(target, **options) for case, options in (CASES | OTHERS).items()}
    for case, head in heads.items():
        save_head(head, folder / "heads" / case, dtype=torch.float32, about={"target": target.name})
        for format in ("vllm", "speculators") if case in CASES else ("vllm",):
            out = folder / format / case
            exported = export_head(folder / "heads" / case, format, out, speculation_length=steps_of(head))
            commands[f"{format}/{case}"] = exported.commands.get("vLLM", "")
    return target, heads, commands


def steps_of(head: DraftHead) -> int:
    """As many as a Medusa head has blocks: vLLM loads no more than it drafts."""
    return STEPS if head.longest is None else head.longest


@torch.no_grad()
def greedy_text(target: Target, prompt: Tensor, tokens: int) -> Tensor:
    """[tokens] after a prompt [tokens before], whatever ends a turn."""
    ids = prompt
    for _ in range(tokens):
        logits = target.logits(target.forward(ids[None]).last_hidden[0, -1])
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)])
    return ids[len(prompt) :]


@torch.no_grad()
def drafts(target: Target, head: DraftHead, prompt: Tensor, text: Tensor) -> Tensor:
    """[TOKENS, steps]: what the head drafts after each of the text's first tokens, reading its own drafts."""
    ids = torch.cat([prompt, text])
    output = target.forward(ids.expand(TOKENS, -1), layers=head.auxiliary_layers(target))
    rows, row = ids.repeat(TOKENS, 1), torch.arange(TOKENS)  # row i: drafts in the place of what follows text[i]
    after = len(prompt) + row  # the position of text[i], beside which the head reads the state before
    steps = range(steps_of(head))
    for step in steps:
        *_, hidden = drafted_states(target, head, rows, output, step + 1)
        rows[row, after + 1 + step] = head.vocabulary[head.logits(hidden[row, after - 1], step).argmax(-1)]
    return torch.stack([rows[row, after + 1 + step] for step in steps], dim=1)


ENGINES = {"speculators": for_speculators, "vllm": for_vllm}

if __name__ == "__main__":
    ENGINES[sys.argv[2]](Path(sys.argv[1]))
