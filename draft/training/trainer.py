"""One trainer for all modes: pretrain a head, or adapt one with AFA-LoRA, LoRA or all of its weights.

Trainer.step:  batches.window() and read() -> head.unroll() -> loss -> backward -> optimiser -> anneal
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console

from draft.afa import set_annealing_step
from draft.errors import UserError, plain_console
from draft.evaluation.replay import TOKENS_PER_BATCH, Pass, replay_acceptance_length, target_passes
from draft.files import atomic_folder, write_json
from draft.heads import DraftHead
from draft.heads.checkpoint import save_head
from draft.target import Target, load_target
from draft.training.batches import Batches, fits_in_memory, load_rows
from draft.training.config import EVAL_EVERY, REPLAYS, RunSettings
from draft.training.distributed import Processes, launcher_dtype, whole
from draft.training.hidden_states import HiddenStateCache
from draft.training.loss import HeadLoss
from draft.training.model import (
    about_run,
    autocast,
    make_trainable,
    settle,
    starting_head,
)
from draft.training.monitor import Monitor, abandon_trackers, choose_trackers, draw, read_lines, start_trackers
from draft.training.optimizer import Average, learning_rate_at, make_optimizer
from draft.training.run import (
    Best,
    Interrupted,
    RunFolder,
    deterministic_algorithms,
    noting_signals,
    snapshot,
    trained_parameters,
    trained_weights,
)

INITIAL_TOKENS = 40_000  # that a new head's first weights are solved from
ADAPTER_FILES = frozenset({"adapter_config.json", "adapter_model.safetensors", "README.md"})
EVALUATED_LENGTH = 5  # the speculation length of the replay that is logged


class Trainer:
    """A run: everything that it needs is loaded at first; `train` leaves RUN/head (all weights) or RUN/adapter.

    A run that was interrupted goes on from its last checkpoint when the same command is given again; `resume` as
    `RunFolder.open` has it. Under `accelerate launch` or `torchrun` every process makes one of these.
    """

    def __init__(
        self,
        settings: RunSettings,
        console: Console | None = None,
        *,
        resume: bool | None = None,
        target: Target | None = None,
        pace: Callable[[], None] | None = None,
    ) -> None:
        """target: the one that the settings name, where it is loaded already. pace: called before each step."""
        self.settings, self.pace = settings, pace
        self.processes = Processes(settings, choose_trackers(settings.training.log_with))
        self.accelerator = self.processes.accelerator
        self.console = (console or plain_console()) if self.processes.is_main else Console(quiet=True)
        self.run = RunFolder(settings)
        self.progress = self.processes.on_main(lambda: self.run.open(resume))
        if settings.unused and not self.progress:  # the resolved configuration of a run names more than was given
            advice = " It trains all weights; choose an adapter with --method." if settings.method == "full" else ""
            self.console.print(f"Not used by method {settings.method}: {', '.join(settings.unused)}.{advice}")
        model = settings.model
        self.target = target or load_target(model.target, launcher_dtype(settings), model.device, model.target_adapter)
        if self.target.dtype == torch.float16:
            raise UserError("dtype float16 is too narrow to train in without loss scaling; use bfloat16 or float32.")
        with self._arithmetic():
            self._prepare_batches()
            self._prepare_head()

    def _arithmetic(self) -> AbstractContextManager[None]:
        wanted = self.settings.training.deterministic
        return deterministic_algorithms(self.target.device.type == "cpu" if wanted is None else wanted)

    def _prepare_batches(self) -> None:
        """Rows and batches, and the head that the run starts from: enough to tell whether it may go on."""
        settings, processes = self.settings, self.processes
        self.rows, self.held_out = load_rows(settings, self.target, self.console)
        replays = settings.training.eval_every != 0 and settings.training.eval_rows
        if replays and not self.held_out and not self.progress:
            kept = "patience does not apply, and " if settings.training.patience else ""
            self.console.print(f"No held-out greedy rows to replay: {kept}the last weights are kept, not the best.")
        self.batches = Batches(self.rows, settings, self.target, rank=processes.rank, processes=processes.count)
        self.total_steps, self.done = self.batches.total_steps, 0
        self.eval_every = settings.training.eval_every  # not settled in the settings: a longer run may reuse these
        if self.eval_every is None:
            self.eval_every = min(EVAL_EVERY, max(1, self.total_steps // REPLAYS))
        if processes.sharded and settings.training.optimizer == "muon":
            raise UserError(
                "optimizer muon needs whole matrices, and FSDP2 divides them; use DDP, or add --optimizer adamw."
            )
        torch.manual_seed(settings.training.seed)
        self.head, base = starting_head(settings, self.target, self.rows, self.console)
        self.objective = settle(settings, self.head)
        self.about = about_run(settings, self.target, self.rows, base)
        rows = [(row.id, len(row.ids), row.trained) for row in self.rows]
        weights_depend_on = [rows, self.target.fingerprint, self.about["base_head_sha256"], self.total_steps]
        self.identity = hashlib.sha256(json.dumps(weights_depend_on).encode()).hexdigest()[:32]
        state = self.progress, self.identity, self.batches.per_step, processes.count
        processes.on_main(lambda: self.run.check(*state))
        self.batches.features.layers = self.head.auxiliary_layers(self.target)
        training = settings.training
        keep = training.keep_hidden_states if training.cache_hidden_states is None else False
        if keep is None:
            tokens = sum(len(row.ids) for row in self.rows) * processes.count
            again = self.total_steps > self.batches.steps_per_epoch
            fits = again and fits_in_memory(self.target, self.batches.features.layers, tokens)
            keep = processes.on_main(lambda: bool(self.progress.get("remember", fits)))  # a run goes on as before
        self.remember = keep
        if self.remember:
            self.batches.remember()

    def _prepare_head(self) -> None:
        """First weights, the adapter, the optimiser, and all of it as the processes share it."""
        settings, training, processes = self.settings, self.settings.training, self.processes
        # a run that goes on takes what it trains from the checkpoint, and the others take theirs from process 0
        solved = settings.model.head or (self.progress and not self.head.beyond(self.objective.draft_steps))
        if processes.is_main and not solved:
            with self.console.status("Solving for the head's first weights"):
                self.head.initialise(self.target, self.batches.first(INITIAL_TOKENS), training.seed)
        processes.spread(self.head)
        self.head, self.saver = make_trainable(self.head, settings)
        # FSDP2 leaves a part of each weight in a process: whole ones are gathered into a copy
        self.copy = copy.deepcopy(self.saver) if processes.sharded else None
        optimizer = make_optimizer(trained_parameters(self.saver), self.head, settings)
        self.module, self.optimizer = processes.wrap(
            HeadLoss(self.head, self.target, self.objective),
            optimizer,
            idle=self.objective.draft_steps < (self.head.longest or 0),  # Medusa has weights of its own for each step
        )
        self.parameters = list(trained_parameters(self.saver).values())
        decay = training.weight_average
        self.average = Average(trained_parameters(self.saver), decay) if decay else None
        self.best: Best | None = None
        self.worse = 0  # replays since the best one
        self.beta: float | None = None  # None: there is no activation
        self.passes: list[Pass] = []  # of the target over the held-out rows
        self.rates = [learning_rate_at(step, self.total_steps, settings) for step in range(self.total_steps)]
        self.autocast = autocast(self.target, settings)
        self.signals: list[int] = []
        self.stopping = False

    def train(self) -> Path:
        """Run to the end; returns the folder of the head or adapter that was written.

        Raises:
            Interrupted: after Ctrl-C or SIGTERM, when the step under way is done and saved.
        """
        with self._arithmetic(), ExitStack() as locks:
            self.processes.on_main(lambda: locks.enter_context(self.run.alone()))
            self.processes.on_main(self.run.begin)
            if progress := self.progress:
                self.run.load(progress["name"], self.saver, self.optimizer.optimizer, self.average)
                self.done, self.worse = progress["step"], progress.get("worse", 0)
                self.best = self.processes.on_main(self.run.best)
                for group, scale in zip(self.optimizer.param_groups, progress["scales"], strict=True):
                    group["scale"] = scale
                self.console.print(
                    f"Continuing {str(self.run.folder)!r} from step {self.done} of {self.total_steps}.", soft_wrap=True
                )
            self._anneal()
            folder = self.settings.training.cache_hidden_states
            if folder is not None:
                cache = HiddenStateCache(Path(folder), self.target, self.batches.features.layers, self.rows)
                cache.fill(self.batches.states, self.processes, self.console)
                self.batches.features.kept = cache
            parameters = sum(parameter.numel() for parameter in self.parameters)
            processes = f" in {self.processes.count} processes" if self.processes.count > 1 else ""
            self.console.print(
                f"{self.settings.mode} ({self.settings.method}): {parameters:,} trained parameters, "
                f"{len(self.rows)} rows, {self.total_steps} steps, "
                f"{str(self.target.dtype)[6:]} on {self.target.device.type}{processes}"
            )
            try:
                self._loop()
                self._take_best()
                head, saver = self._whole()
                result = self.processes.on_main(lambda: self._write_result(head, saver))
            except Interrupted:
                if self.processes.is_main:
                    draw(self.run.folder, self.console)
                self.processes.end()
                raise
            except Exception:
                abandon_trackers(self.accelerator)
                raise
        self.processes.end()
        return result

    def _loop(self) -> None:
        training, main = self.settings.training, self.processes.is_main
        if main:
            start_trackers(self.accelerator, self.run.folder, self.done, self.settings.model_dump())
        monitor = Monitor(self.run.folder, self.total_steps, self.done, self.console, self.accelerator, silent=not main)
        with monitor.progress, noting_signals(self.signals):
            if self.done == 0:
                monitor.log(0, self._evaluate())
            while self.done < self.total_steps and not self._patience_is_over():
                if self.pace is not None:
                    self.pace()
                metrics, tokens = self.step()
                monitor.log(self.done, metrics, tokens=tokens)
                last = self.done == self.total_steps
                if self.eval_every and (self.done % self.eval_every == 0 or last):
                    monitor.log(self.done, self._evaluate())
                last = last or self._patience_is_over()
                if self.done % training.save_every == 0 or last or self.stopping:
                    progress = {
                        "step": self.done,
                        "scales": [group["scale"] for group in self.optimizer.param_groups],
                        "identity": self.identity,
                        "batches_per_step": self.batches.per_step,
                        "remember": self.remember,
                        "worse": self.worse,
                    }
                    tensors = snapshot(self.saver, self.optimizer.optimizer, self.average)
                    self.processes.on_main(partial(self.run.save, tensors, progress))
                if self.stopping and not last:
                    raise Interrupted(self.signals[0] if self.signals else None, self.done)

    def step(self) -> tuple[dict[str, Any], int]:
        """One optimiser step over this process's share of the next batches.

        The loss is divided by the trained positions of the batches of all processes, so that accumulation, processes
        and padding don't change the curve. Returns metrics, and tokens of all processes.
        """
        window, rate, count = self.batches.window(self.done), self.rates[self.done], self.processes.count
        positions = max(1, window.positions)
        # signals, loss, and for each draft step hits and positions
        sums = torch.zeros(2 + 2 * self.objective.draft_steps, dtype=torch.float64, device=self.target.device)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.optimizer.zero_grad()
        for place, (rows, counts) in enumerate(window.share, start=1):
            batch, features = self.batches.read(rows)
            # gradients are summed over the processes after the last batch only
            summed = place == len(window.share) or count == 1
            with nullcontext() if summed else self.accelerator.no_sync(self.module):
                with self.autocast:
                    loss, hits = self.module(batch, features)
                # gradients are averaged over the processes, and their sum is needed
                self.accelerator.backward(loss * (counts * count) / positions)
            if counts:
                sums[1:] += torch.cat([loss.detach()[None], hits.flatten()])
        size = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.training.max_grad_norm)
        norm = float(size if self.copy is None else whole(size))
        if not math.isfinite(norm):
            raise UserError(
                f"the gradient is not finite at step {self.done + 1}; start again in another --out with a lower "
                f"--learning-rate than {self.settings.learning_rate}."
            )
        self.optimizer.step()
        self.done += 1
        if self.average is not None:
            self.average.update(self.done)
        sums[0] = len(self.signals)
        signals, total, *agreement = self.accelerator.reduce(sums, "sum").tolist()
        self.stopping = signals > 0
        metrics = {
            "lr": rate,
            "beta": self._anneal(),
            "loss": total / positions,
            "agreement": [
                round(hit / max(1, among), 4) for hit, among in zip(agreement[::2], agreement[1::2], strict=True)
            ],
            "grad_norm": round(norm, 4),
        }
        return metrics, window.tokens

    def _anneal(self) -> float | None:
        for model in (self.saver, self.copy):
            if model is not None and self.settings.method == "afa-lora":
                self.beta = set_annealing_step(model, self.done, self.total_steps)
        return self.beta

    def _whole(self) -> tuple[Any, Any]:
        """The head, and the module that saves it, with whole weights; all processes have to ask for them."""
        if self.copy is None:
            return self.head, self.saver
        parts = trained_parameters(self.saver)
        with torch.no_grad():
            for name, parameter in trained_parameters(self.copy).items():
                parameter.copy_(whole(parts[name].detach()))
        return self.copy.get_base_model() if isinstance(self.copy, PeftModel) else self.copy, self.copy

    def _evaluate(self) -> dict[str, float]:
        """τ by replay of the held-out rows, in process 0, and the weights kept where it is the best so far."""
        if not (self.eval_every and self.held_out):
            return {}
        with self.average.in_place() if self.average is not None else nullcontext():
            head, _ = self._whole()
            tau = self.processes.on_main(lambda: self._replay(head))
            if not math.isfinite(tau):
                return {}
            if self.settings.training.keep_best and self.done and self._annealed():
                if self.best is None or tau >= self.best.tau:
                    self.best, self.worse = Best(self.done, tau), 0
                    weights = trained_weights(self.saver)
                    self.processes.on_main(lambda: self.run.save_best(weights, self.done, tau))
                elif self.done > self.best.step:  # after an interruption the best may lie behind the checkpoint
                    self.worse += 1
        return {"tau": tau}

    def _replay(self, head: DraftHead) -> float:
        if not self.passes:
            with torch.no_grad():
                self.passes = list(target_passes(self.target, self.held_out, TOKENS_PER_BATCH, None, [head]))
        with torch.no_grad(), self.autocast:
            return replay_acceptance_length(self.target, head, self.held_out, EVALUATED_LENGTH, self.passes)

    def _annealed(self) -> bool:
        """True where the weights are what a merge would write."""
        return not self.beta

    def _patience_is_over(self) -> bool:
        patience = self.settings.training.patience
        return patience is not None and self.worse >= patience

    def _take_best(self) -> None:
        """Let the trained parameters hold what is kept: the weights of the best replay, or the average of them."""
        if self.best is not None:
            self.run.load_best(self.saver)
            self.console.print(f"Kept: step {self.best.step} of {self.done}, τ {self.best.tau:.3f} by replay.")
            lines = read_lines(self.run.folder / "metrics.jsonl")
            before = next((line["tau"] for line in lines if line.get("step") == 0 and "tau" in line), 0.0)
            if before > self.best.tau:
                self.console.print(
                    f"[yellow]Before training τ was {before:.3f} on these rows: the run has made the head worse. Try a "
                    "lower --learning-rate, or other data.[/yellow]",
                    soft_wrap=True,
                )
        elif self.average is not None:
            for name, parameter in trained_parameters(self.saver).items():
                parameter.data.copy_(self.average.values[name])

    def _write_result(self, head: Any, saver: Any) -> Path:
        draw(self.run.folder, self.console)
        best: dict[str, Any] = {}
        if self.best is not None:  # kept_by: a comparison on these rows is not quite impartial
            kept_by = sorted({row.id for row in self.held_out})
            best = {"kept_step": self.best.step, "kept_tau": self.best.tau, "kept_by": kept_by}
        about = {**self.about, "steps": self.done, **best}
        if isinstance(saver, PeftModel):
            result = self.run.folder / "adapter"
            with atomic_folder(result, ADAPTER_FILES) as temporary:
                saver.save_pretrained(str(temporary))
        else:
            result = self.run.folder / "head"
            head.eval()
            save_head(head, result, dtype=self.target.stored_dtype, about=about)
        write_json(self.run.folder / "about.json", about)  # last: it marks the run as finished
        return result
