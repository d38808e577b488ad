"""The acceptance length that vLLM reaches with our exported head, beside our replay's on the same texts.

    python -m benchmarks.interop.compare_vllm prepare FOLDER [--limit N]
    (run_vllm.py FOLDER, then serve_vllm.py FOLDER, in vLLM's own environment)
    python -m benchmarks.interop.compare_vllm judge FOLDER

Both count before trimming: a text's last verification counts all that it accepted, though fewer tokens were wanted.
Exit status 1: they differ by more than 3 %, or more than 5 % of the texts aren't the target's own greedy ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import compress
from pathlib import Path

import torch

from benchmarks.common import load_prompts
from draft.acceptance import drafted_states
from draft.checkpoint import check_fits, load_head
from draft.heads import DraftHead
from draft.interop.exporting import export_head
from draft.interop.target_shape import target_shape
from draft.target import Target, load_target
from draft.tau import acceptance_length
from draft.training.step import shift_left

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
    """Walk vLLM's texts as vLLM did, with our head; print both acceptance lengths."""
    job, theirs = (json.loads((folder / name).read_text()) for name in ("prompts.json", "vllm.json"))
    head, about = load_head(HEAD, dtype=torch.float32)
    check_fits(head, about, target)
    emitted = verifications = same = 0
    for prompt, text, beyond in zip(job["prompts"], theirs["texts"], theirs["beyond"], strict=True):
        ours, greedy = walk(target, head, prompt, text + beyond, len(text), job["speculation_length"])
        emitted, verifications, same = emitted + ours[0], verifications + ours[1], same + greedy
    counts = theirs["counts"]
    replayed = acceptance_length(emitted, verifications)
    served = acceptance_length(counts["num_drafts"] + counts["num_accepted_tokens"], counts["num_drafts"])
    difference = abs(served / replayed - 1)
    count = len(job["prompts"])
    print(f"vLLM {theirs['version']}, {count} prompts of {job['tokens']} tokens, K = {job['speculation_length']}")
    print(f"  acceptance length: vLLM {served:.4f}, replay {replayed:.4f}: {difference:.2%} apart")
    print(f"  verifications: vLLM {counts['num_drafts']}, replay {verifications}")
    print(f"  texts that are the target's own greedy ones: {same} of {count}")
    return int(difference > TOLERANCE or same < 0.95 * count)


@torch.no_grad()
def walk(
    target: Target, head: DraftHead, prompt: list[int], text: list[int], counted: int, length: int
) -> tuple[tuple[int, int], bool]:
    """((emitted, verifications) of the first `counted` tokens, untrimmed; whether the text is greedy)."""
    ids = torch.tensor([prompt + text])
    output = target.forward(ids, layers=head.auxiliary_layers(target))
    right = torch.ones(ids.shape, dtype=torch.bool)  # so far, of the drafts after each entry
    leading = torch.zeros_like(ids)
    for step, hidden in enumerate(drafted_states(target, head, ids, output, length)):
        right &= head.vocabulary[head.logits(hidden).argmax(-1)] == shift_left(ids, step + 2)
        leading += right
    start = len(prompt)
    choice = target.logits(output.last_hidden[0, start - 1 : -1]).argmax(-1)
    greedy = bool((choice[:counted] == ids[0, start : start + counted]).all())
    emitted = verifications = 0
    last, end = start, start + counted - 1
    while last < end:
        gain = int(leading[0, last - 1]) + 1
        emitted, verifications, last = emitted + gain, verifications + 1, last + gain
    return (emitted, verifications), greedy


if __name__ == "__main__":
    sys.exit(main())
