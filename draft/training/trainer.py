"""One trainer for all modes: pretrain a head, or adapt one with AFA-LoRA, LoRA or all of its weights."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from rich.console import Console
from torch import Tensor

from draft.acceptance import replay_acceptance_length
from draft.afa import set_annealing_step
from draft.checkpoint import atomic_folder, head_sha256, save_head, write_json
from draft.comparison import row_ids
from draft.data.dataset import Row, open_dataset
from draft.data.examples import Batch, batches, collate
from draft.data.vocabulary import coverage, draft_vocabulary
from draft.errors import UserError
from draft.target import Target, load_target
from draft.training.build import (
    blank_head,
    initialise,
    load_base_head,
    make_trainable,
    settle,
    vocabulary_size,
    with_vocabulary,
)
from draft.training.config import RunSettings, to_yaml
from draft.training.features import Features, FeatureSource, fits_in_memory
from draft.training.monitor import Monitor, draw, provenance
from draft.training.objective import loss_sum, trained_positions
from draft.training.optimiser import learning_rate_at, parameter_groups
from draft.training.snapshots import latest_snapshot, load_snapshot, save_snapshot, trained_parameters

INITIAL_TOKENS = 40_000  # that a new head's first weights are solved from
ADAPTER_FILES = frozenset({"adapter_config.json", "adapter_model.safetensors", "README.md"})
EVALUATED_LENGTH = 5  # the speculation length of the replay that is logged


@dataclass
class Rows:
    train: list[Row]
    held_out: list[Row]  # greedy ones, a few, for the replay during training


class Trainer:
    """Loads everything a run needs, trains, and leaves RUN/head (all weights) or RUN/adapter.

    A run that was interrupted goes on from its last checkpoint when the same command is given again.
    """

    def __init__(self, settings: RunSettings, console: Console | None = None) -> None:
        self.settings = settings
        self.folder = Path(settings.out)
        self.console = console or Console()
        model = settings.model
        self.target = load_target(model.target, model.dtype, model.device, model.target_adapter)
        if self.target.dtype == torch.float16:
            raise UserError("dtype float16 is too narrow to train in without loss scaling; use bfloat16 or float32.")
        self.rows = _load_rows(settings, self.target)
        torch.manual_seed(settings.training.seed)
        self.features = self._feature_source()
        head, about = self._starting_head()
        self.features.layers = head.auxiliary_layers(self.target)
        self.objective = settle(settings, head)
        self.head, self.saver = make_trainable(head, settings)
        self.about = self._about(about)
        self.accelerator = Accelerator(cpu=self.target.device.type == "cpu")
        if self.accelerator.num_processes > 1:
            raise UserError(
                f"{self.accelerator.num_processes} processes: training runs in one; start it without a launcher."
            )
        self.parameters = list(trained_parameters(self.saver).values())
        self.optimizer = self.accelerator.prepare(
            torch.optim.AdamW(
                parameter_groups(self.parameters, scaled=settings.method == "full"),
                lr=settings.learning_rate,
                betas=(0.9, 0.95),
                weight_decay=0.0,
            )
        )
        training = settings.training
        self.steps_per_epoch = max(1, math.ceil(len(self._batches(0)) / training.gradient_accumulation))
        self.total_steps = training.max_steps or max(1, round(training.epochs * self.steps_per_epoch))
        self.step = 0

    def _feature_source(self) -> FeatureSource:
        training = self.settings.training
        remember = training.keep_hidden_states
        if remember is None:
            tokens = sum(len(row.ids) for row in self.rows.train)
            remember = training.epochs > 1 and fits_in_memory(self.target, tokens)
        return FeatureSource(self.target, remember=remember)

    def _autocast(self) -> torch.autocast:
        """Full training keeps float32 masters under autocast; adapters run at their base weights' dtype without it."""
        half = self.target.dtype == torch.bfloat16 and self.settings.method == "full"
        return torch.autocast(self.target.device.type, torch.bfloat16, enabled=half)

    def _starting_head(self) -> tuple[Any, dict[str, Any]]:
        settings, target = self.settings, self.target
        if settings.model.head:
            head, about = load_base_head(settings, target)
            if settings.model.rebuild_vocabulary:
                head = with_vocabulary(head, target, self._vocabulary())
            share = coverage(self.rows.train, head.vocabulary.cpu())
            self.console.print(f"The head's vocabulary covers {share:.1%} of the tokens that are trained on.")
            if share < 0.95:
                self.console.print(
                    f"[yellow]Warning:[/] {1 - share:.1%} of this domain's tokens can never be drafted with this head; "
                    "a head pretrained on this domain would know them."
                )
            return head, about
        # a run that goes on takes its weights from the checkpoint
        head = blank_head(target, self._vocabulary(), settings.model)
        self.features.layers = head.auxiliary_layers(target)
        if not self._latest():
            with self.console.status("Solving for the head's first weights"):
                initialise(head, target, self._first_batches(), settings.training.seed)
        return head, {}

    def _vocabulary(self) -> Tensor:
        size = vocabulary_size(self.settings.model, self.target)
        return draft_vocabulary(self.rows.train, size, self.target.vocab_size, sorted(self.target.eos_token_ids))

    def _latest(self) -> Path | None:
        return latest_snapshot(self.folder / "checkpoints")

    def _first_batches(self) -> Iterator[tuple[Features, Tensor]]:
        """Enough rows of the first epoch for the closed-form start: (features, attention mask)."""
        tokens = 0
        for rows in self._batches(0):
            batch = self._collate(rows)
            yield self.features.get(batch, rows), batch.attention_mask.bool()
            tokens += int(batch.attention_mask.sum())
            if tokens >= INITIAL_TOKENS:
                return

    def _collate(self, rows: list[int]) -> Batch:
        return collate([self.rows.train[row] for row in rows]).to(self.target.device)

    def _about(self, base: dict[str, Any]) -> dict[str, Any]:
        settings = self.settings
        return {
            "target": settings.model.target,
            "target_adapter": settings.model.target_adapter,
            "target_fingerprint": self.target.fingerprint,
            "mode": settings.mode,
            "method": settings.method,
            "base_head": settings.model.head and Path(settings.model.head).name,
            "base_head_sha256": settings.model.head and head_sha256(settings.model.head),
            "tokens": sum(len(row.ids) for row in self.rows.train),
            "trained_tokens": sum(sum(row.mask) for row in self.rows.train),
            "trained_rows": sorted({*row_ids(self.rows.train), *base.get("trained_rows", [])}),
            **provenance(),
        }

    def train(self) -> Path:
        """Run to the end; returns the folder of the head or adapter that was written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {str(self.folder)!r} cannot be made ({error.strerror}); choose another.") from error
        self._start_or_resume()
        parameters = sum(parameter.numel() for parameter in self.parameters)
        self.console.print(
            f"{self.settings.mode} ({self.settings.method}): {parameters:,} trained parameters, "
            f"{len(self.rows.train)} rows, {self.total_steps} steps, "
            f"{str(self.target.dtype)[6:]} on {self.target.device}"
        )
        try:
            self._loop()
        except KeyboardInterrupt:
            self._save_snapshot()  # an interrupted run goes on from here
            raise
        return self._finish()

    def _loop(self) -> None:
        training = self.settings.training
        with Monitor(self.folder, self.total_steps, self.step, self.console) as monitor:
            if self.step == 0:
                monitor.log(0, self._evaluate())
            for window in self._windows():
                rate = learning_rate_at(self.step, self.total_steps, self.settings)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate * group["scale"]
                metrics, tokens = self._optimise(window)
                self.step += 1
                beta = self._anneal()
                monitor.log(self.step, {"lr": rate, "beta": beta, **metrics}, tokens=tokens)
                if training.eval_every and self.step % training.eval_every == 0:
                    monitor.log(self.step, self._evaluate())
                if self.step % training.save_every == 0 or self.step == self.total_steps:
                    self._save_snapshot()
            if training.eval_every and self.step % training.eval_every:
                monitor.log(self.step, self._evaluate())

    def _optimise(self, window: list[list[int]]) -> tuple[dict[str, Any], int]:
        """One optimiser step over the batches of `window`, each a list of row numbers; metrics, and tokens read."""
        examples = [self._collate(rows) for rows in window]
        positions = sum(int(trained_positions(batch)) for batch in examples)
        self.optimizer.zero_grad()
        total, agreement = 0.0, torch.zeros(self.objective.draft_steps, 2)
        for batch, rows in zip(examples, window, strict=True):
            features = self.features.get(batch, rows)
            with self._autocast():
                loss, hits = loss_sum(self.head, self.target, batch, features, self.objective)
            self.accelerator.backward(loss / max(1, positions))
            total += loss.item()
            agreement += hits.cpu()
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.settings.training.max_grad_norm)
        if not math.isfinite(float(norm)):
            raise UserError(
                f"the gradient is not finite at step {self.step + 1}; start again in another --out with a lower "
                f"--learning-rate than {self.settings.learning_rate}."
            )
        self.optimizer.step()
        shares = agreement[:, 0] / agreement[:, 1].clamp_min(1)
        metrics = {
            "loss": total / max(1, positions),
            "agreement": [round(share, 4) for share in shares.tolist()],
            "grad_norm": round(float(norm), 4),
        }
        return metrics, sum(int(batch.attention_mask.sum()) for batch in examples)

    def _batches(self, epoch: int) -> list[list[int]]:
        return batches(self.rows.train, self.settings.data.tokens_per_batch, self.settings.training.seed, epoch)

    def _windows(self) -> Iterator[list[list[int]]]:
        """The batches of each optimiser step from `self.step` on; a function of the seed and the step alone."""
        size = self.settings.training.gradient_accumulation
        while self.step < self.total_steps:
            epoch, first = divmod(self.step, self.steps_per_epoch)
            order = self._batches(epoch)
            for start in range(first * size, self.steps_per_epoch * size, size):
                if self.step == self.total_steps:
                    return
                yield order[start : start + size] or order[:size]

    def _anneal(self) -> float | None:
        if self.settings.method != "afa-lora":
            return None
        return set_annealing_step(self.saver, self.step, self.total_steps)

    def _evaluate(self) -> dict[str, float]:
        if not (self.settings.training.eval_every and self.rows.held_out):
            return {}
        self.head.eval()
        with torch.no_grad(), self._autocast():
            tau = replay_acceptance_length(self.target, self.head, self.rows.held_out, EVALUATED_LENGTH)
        self.head.train()
        return {"tau": tau} if math.isfinite(tau) else {}

    def _start_or_resume(self) -> None:
        config = self.folder / "config.yaml"
        wanted = to_yaml(self.settings)
        if config.is_file() and config.read_text() != wanted:
            raise UserError(
                f"{str(self.folder)!r} holds a run with other settings; choose another --out, or delete it."
            )
        config.write_text(wanted)
        write_json(self.folder / "provenance.json", provenance())
        checkpoint = self._latest()
        if checkpoint is not None:
            progress = load_snapshot(checkpoint, self.saver, self.optimizer.optimizer)
            if progress["identity"] != self._identity():
                raise UserError(
                    f"the data, the target or the base head of {str(self.folder)!r} have changed since it was "
                    "interrupted; choose another --out, or delete it."
                )
            self.step = progress["step"]
            for group, scale in zip(self.optimizer.param_groups, progress["scales"], strict=True):
                group["scale"] = scale
            self.console.print(f"Continuing {str(self.folder)!r} from step {self.step} of {self.total_steps}.")
        self._anneal()

    def _identity(self) -> str:
        """Changes with anything but the settings that the weights of a run depend on."""
        rows = [(row.id, len(row.ids), row.trained) for row in self.rows.train]
        return hashlib.sha256(
            json.dumps([rows, self.target.fingerprint, self.about["base_head_sha256"], self.total_steps]).encode()
        ).hexdigest()[:32]

    def _save_snapshot(self) -> None:
        scales = [group["scale"] for group in self.optimizer.param_groups]
        progress = {"step": self.step, "scales": scales, "identity": self._identity()}
        save_snapshot(
            self.folder / "checkpoints",
            self.saver,
            self.optimizer.optimizer,
            progress,
            self.settings.training.keep_checkpoints,
        )

    def _finish(self) -> Path:
        draw(self.folder)
        about = {**self.about, "steps": self.step}
        if isinstance(self.saver, PeftModel):
            result = self.folder / "adapter"
            with atomic_folder(result, ADAPTER_FILES) as temporary:
                self.saver.save_pretrained(str(temporary))
        else:
            result = self.folder / "head"
            self.head.eval()
            save_head(self.head, result, dtype=self.target.stored_dtype, about=about)
        write_json(self.folder / "about.json", about)  # last: it marks the run as finished
        return result


def _load_rows(settings: RunSettings, target: Target) -> Rows:
    train: list[Row] = []
    held_out: list[Row] = []
    for folder in settings.data.data:
        dataset = open_dataset(Path(folder))
        dataset.check_target(target)
        train += dataset.rows("train")
        held_out += [row for row in dataset.rows("held-out") if row.greedy]
    train = [row for row in train if sum(row.mask[2:])]
    if not train:
        raise UserError(f"{', '.join(settings.data.data)}: no training rows; prepare a larger data set.")
    return Rows(train, held_out[: settings.training.eval_rows])
