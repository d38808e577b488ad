"""Fine-tune a target by an ordinary PEFT LoRA: what a team has before it adapts a draft head.

This is no part of the product: it makes the adapter of the demonstration and of `benchmarks.adaptation_domains` again,
and shows what `--target-adapter` takes. The pairs of prompt and answer are trained on the answers only.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks import shared
from draft.data.dataset import Row, open_dataset
from draft.data.examples import batches, collate
from draft.data.prompts import kept_rows, load_prompts
from draft.errors import UserError
from draft.target import Target, load_target

MODULE = "benchmarks.fine_tuned_target"
MODULES = ["q_proj", "v_proj", "down_proj"]
EXAMPLES = f"""
example (the adapter that ships; runs/selfplay: any data set that the target wrote; some minutes on one core):
  python -m benchmarks.domains tickets --no-system --answers --count 90 --seed 2 --out runs/pairs.jsonl
  python -m {MODULE} --pairs runs/pairs.jsonl --general runs/selfplay --out runs/smollm2-tickets-lora
"""


def parse(arguments: Sequence[str]) -> Namespace:
    parser = shared.Parser(MODULE, __doc__, EXAMPLES)
    parser.add("--target", default="smollm2", help="hub id, folder, .gguf file, or smollm2")
    parser.add("--pairs", metavar="FILE", required=True, help="conversations with answers, as JSONL")
    parser.add("--general", metavar="DIR", help="data set of the target's own text, to keep it as it is elsewhere")
    parser.add("--general-rows", shared.whole(0), default=8, metavar="N", help="rows of --general to mix in")
    parser.add("--rank", shared.whole(1), default=4, metavar="N", help="rank of the adapter; alpha is twice that")
    parser.add("--modules", nargs="+", default=MODULES, metavar="NAME", help="matrices that are adapted")
    parser.add("--epochs", shared.whole(1), default=1, metavar="N", help="passes over the pairs")
    parser.add("--tokens-per-batch", shared.whole(1), default=512, metavar="N", help="tokens of an optimiser step")
    parser.add("--learning-rate", shared.real(0, 1), default=3e-3, metavar="X", help="at its peak")
    parser.add("--seed", shared.whole(0), default=0, metavar="N", help="of the adapter and the order")
    parser.add("--dtype", default="auto", help="auto, bfloat16 or float32")
    parser.add("--out", metavar="DIR", required=True, help="folder of the adapter")
    return parser.parse_args(arguments)


def rows_to_learn(target: Target, arguments: Namespace) -> list[Row]:
    """Return the rows of the pairs and, of --general, some that are trained on."""
    pairs = load_prompts(arguments.pairs, keep_responses=True)
    rows = [row for pair in pairs for row in kept_rows(target, pair) if any(row.mask)]
    if not rows:
        raise UserError(f"--pairs {arguments.pairs!r} has no answers to learn.")
    if arguments.general:
        dataset = open_dataset(Path(arguments.general))
        dataset.check_target(target)
        rows += list(dataset.rows("train"))[: arguments.general_rows]
    return rows


def fine_tune(arguments: Namespace, command: Sequence[str]) -> int:
    from peft import LoraConfig, get_peft_model

    folder = shared.output_folder(arguments.out)
    target = load_target(arguments.target, arguments.dtype)
    rows = rows_to_learn(target, arguments)
    torch.manual_seed(arguments.seed)
    config = LoraConfig(r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules=arguments.modules)
    model = get_peft_model(target.model, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arguments.learning_rate, weight_decay=0.0)
    size, seed = arguments.tokens_per_batch, arguments.seed
    steps = [batch for epoch in range(arguments.epochs) for batch in batches(rows, size, seed, epoch)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, arguments.learning_rate, len(steps), pct_start=0.1)
    began = time.monotonic()
    for step, indices in enumerate(steps, 1):
        loss = answer_loss(target, [rows[index] for index in indices])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 2 == 0 or step == len(steps):
            print(f"step {step}/{len(steps)}: loss {loss.item():.3f}, {time.monotonic() - began:.0f} s", flush=True)
    for parameter in trained:  # half the size, and what a target in bfloat16 merges
        parameter.data = parameter.data.to(torch.bfloat16)
    model.peft_config["default"].base_model_name_or_path = arguments.target
    model.save_pretrained(str(folder), save_embedding_layers=False)  # no question to the hub
    write_card(folder, arguments, command, len(rows), loss.item())
    print(f"wrote {folder}: {sum(parameter.numel() for parameter in trained):,} parameters")
    return 0


def answer_loss(target: Target, rows: list[Row]) -> Any:
    """Return the mean cross-entropy of the tokens that are trained on."""
    batch = collate(rows).to(target.device)
    hidden = target.forward(batch.input_ids, attention_mask=batch.attention_mask).last_hidden
    wanted = batch.loss_mask[:, 1:]  # [batch, tokens - 1]
    logits = target.lm_head(hidden[:, :-1][wanted])  # [trained tokens, vocabulary]
    return functional.cross_entropy(logits.float(), batch.input_ids[:, 1:][wanted])


def write_card(folder: Path, arguments: Namespace, command: Sequence[str], rows: int, loss: float) -> None:
    """Write README.md in place of PEFT's empty form."""
    about = shared.run_provenance(MODULE, command)
    (folder / "README.md").write_text(
        f"# {folder.name}\n\nA LoRA adapter (rank {arguments.rank}, {', '.join(arguments.modules)}, bfloat16) of "
        f"{arguments.target}, made by\n\n    {about['command']}\n\nat commit {about['commit']}: {rows} "
        f"conversations, loss of the last step {loss:.3f}.\n"
    )


main = partial(shared.run_program, parse, fine_tune)

if __name__ == "__main__":
    sys.exit(main())
