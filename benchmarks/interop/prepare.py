"""Write what the other engines are to load, and what we make of the same input.

    python -m benchmarks.interop.prepare FOLDER

FOLDER/target is a tiny target; FOLDER/FORMAT/CASE an export; FOLDER/CASE.safetensors the inputs and our logits.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.interop.cases import CASES, random_head, tiny_target
from draft.checkpoint import save_head
from draft.heads.registry import architecture_of
from draft.interop.exporting import export_head
from draft.target import Target, load_target

STEPS, TOKENS = 3, 24
FORMATS = ("speculators", "vllm")


def main(folder: Path) -> None:
    """Write everything; the bundled head on the bundled target too, as the case `bundled`."""
    target = tiny_target(folder / "target")
    for case, options in CASES.items():
        head = folder / "heads" / case
        save_head(random_head(target, **options), head, dtype=torch.float32, about={"target": target.name})
        write_case(folder, case, head, target)
    write_case(folder, "bundled", "smollm2-eagle3", load_target("smollm2", torch.float32, "cpu"))


def write_case(folder: Path, case: str, head: str | Path, target: Target) -> None:
    """Export a head in all formats, and unroll it over random tokens."""
    from draft.checkpoint import check_fits, load_head

    for format in FORMATS:
        export_head(head, format, folder / format / case)
    loaded, about = load_head(head, dtype=torch.float32)
    check_fits(loaded, about, target)
    generator = torch.Generator().manual_seed(len(case))
    ids = torch.randint(3, target.vocab_size, (1, TOKENS), generator=generator)
    with torch.no_grad():
        auxiliary = target.forward(ids, layers=loaded.auxiliary_layers(target)).auxiliary
        assert auxiliary is not None
        steps = architecture_of(loaded).unroll(loaded, target.embedding(ids), auxiliary, STEPS)
        logits = {f"logits.{step}": loaded.logits(hidden) for step, hidden in enumerate(steps)}
    tensors = {"ids": ids, "auxiliary": auxiliary, **logits}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / f"{case}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
