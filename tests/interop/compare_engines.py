"""The acceptance length that vLLM or llama.cpp reaches with our exported head, beside our replay's on the same texts.

    python -m interop.compare_engines prepare FOLDER [--limit N]
    (run_vllm.py FOLDER and serve_vllm.py FOLDER in vLLM's environment, or run_llama_cpp.py FOLDER in llama.cpp's)
    python -m interop.compare_engines judge FOLDER

Both count alike. With vLLM a text's last verification counts all that it accepted, though fewer tokens were wanted;
llama.cpp drafts no more than are wanted, and nothing for a last token alone.
Exit status 1: they differ by more than 3 %, or more than 5 % of the texts aren't the target's own greedy ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import compress
from pathlib import Path

import torch

from benchmarks.shared import load_prompts
from draft.evaluation.replay import drafted_states
from draft.evaluation.tau import acceptance_length
from draft.heads import DraftHead
from draft.heads.checkpoint import attach_head, load_head
from draft.heads.unroll import shift_left
from draft.interop.exporting import export_head
from draft.interop.formats import target_shape
from draft.target import Target, load_target

TARGET, HEAD, LENGTH, TOKENS, MAX_LENGTH = "smollm2", "smollm2-eagle3", 3, 128, 512
TOLERANCE = 0.03


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("prepare", "judge"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, default=96, help="prompts, spread over the categories")
    options = parser.parse_args()
    target = load_target(TARGET, torch.float32, "cpu")
    if options.step == "prepare":
        prepare(options.folder, target, options.limit)
        return 0
    return judge(options.folder, target)


def prepare(folder: Path, target: Target, limit: int) -> None:
    """Export the head, and write the prompts' token ids and the printed commands."""
    formats = {"plain": folder / "head", "speculators": folder / "head-speculators"}
    exports = {format: export_head(HEAD, format, out, speculation_length=LENGTH) for format, out in formats.items()}
    questions = [prompt.turns[0] for prompt in load_prompts(None).prompts]
    prompts = [
        target.encode_chat([{"role": "user", "content": text}], add_generation_prompt=True) for text in questions
    ]
    fits = [len(ids) + TOKENS + 2 * LENGTH < MAX_LENGTH for ids in prompts]
    prompts, questions = list(compress(prompts, fits)), list(compress(questions, fits))
    job = {
        "target": target_shape(target.name).path,
        "head": str(exports["plain"].folder.resolve()),
        "commands": {format: exported.commands["vLLM"] for format, exported in exports.items()},
        "question": questions[0],  # in words, the first prompt
        "speculation_length": LENGTH,
        "tokens": TOKENS,
        "max_length": MAX_LENGTH,
        "prompts": prompts[:limit],
    }
    (folder / "prompts.json").write_text(json.dumps(job) + "\n")


def judge(folder: Path, target: Target) -> int:
    """Walk an engine's texts as it did, with our head; print both acceptance lengths."""
    job, theirs = (json.loads((folder / name).read_text()) for name in ("prompts.json", "result.json"))
    head, about = load_head(HEAD, dtype=torch.float32)
    attach_head(head, about, target)
    emitted = verifications = same = 0
    for prompt, text, beyond in zip(job["prompts"], theirs["texts"], theirs["beyond"], strict=True):
        choice, leading = walk(target, head, prompt, text + beyond, job["speculation_length"], theirs["forbidden"])
        ours = count(leading[: len(text) - 1], trimmed=theirs["trimmed"])
        emitted, verifications = emitted + ours[0], verifications + ours[1]
        same += choice[: len(text)] == text
    counts, engine = theirs["counts"], theirs["engine"]
    replayed = acceptance_length(emitted, verifications)
    served = acceptance_length(counts["num_drafts"] + counts["num_accepted_tokens"], counts["num_drafts"])
    difference = abs(served / replayed - 1)
    texts = len(job["prompts"])
    print(f"{engine} {theirs['version']}, {texts} prompts of {job['tokens']} tokens, K = {job['speculation_length']}")
    print(f"  acceptance length: {engine} {served:.4f}, replay {replayed:.4f}: {difference:.2%} apart")
    print(f"  verifications: {engine} {counts['num_drafts']}, replay {verifications}")
    print(f"  texts that are the target's own greedy ones: {same} of {texts}")
    return int(difference > TOLERANCE or same < 0.95 * texts)


@torch.no_grad()
def walk(
    target: Target, head: DraftHead, prompt: list[int], text: list[int], length: int, forbidden: list[int]
) -> tuple[list[int], list[int]]:
    """(The target's choice at each entry of the text, forbidden ones aside; drafts accepted after each entry)."""
    ids = torch.tensor([prompt + text])
    output = target.forward(ids, layers=head.auxiliary_layers(target))
    right = torch.ones(ids.shape, dtype=torch.bool)  # so far, of the drafts after each entry
    leading = torch.zeros_like(ids)
    for step, hidden in enumerate(drafted_states(target, head, ids, output, length)):
        right &= head.vocabulary[head.logits(hidden).argmax(-1)] == shift_left(ids, step + 2)
        leading += right
    start = len(prompt) - 1
    logits = target.logits(output.last_hidden[0, start:-1])  # [text, V]
    logits[:, forbidden] = -torch.inf
    return logits.argmax(-1).tolist(), leading[0, start:].tolist()  # a draft reads the token after its entry too


def count(leading: list[int], *, trimmed: bool) -> tuple[int, int]:
    """(emitted, verifications) that give one token for each entry, of which the first verification starts at the first.

    trimmed: no more is drafted than is wanted, and a last token alone comes without a verification.
    """
    emitted = verifications = last = 0
    while (wanted := len(leading) - last) > trimmed:
        gain = leading[last] + 1
        gain = min(gain, wanted) if trimmed else gain
        emitted, verifications, last = emitted + gain, verifications + 1, last + gain
    return emitted, verifications


if __name__ == "__main__":
    sys.exit(main())
