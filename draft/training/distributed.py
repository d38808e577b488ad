"""Training in one process or in several.

`accelerate launch` and `torchrun` start the processes; Accelerate wraps the head (DDP or FSDP2). The target is frozen
and whole in every process, outside of what is wrapped.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    broadcast,
    broadcast_object_list,
)
from torch import Tensor, nn

from draft.errors import UserError
from draft.training.config import RunSettings

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # the others wait while process 0 solves for a new head's weights or writes a checkpoint
# Groups of processes stay until their process ends: the destructor of one waits for gloo's threads with the
# interpreter's lock held, and a thread that drops the tensors of the last exchange waits for that lock.
_GROUPS: list[Any] = []
# a process that runs alone, and the kinds of several that a head is trained in
KINDS = ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU", "FSDP")


class Processes:
    """The processes of a run: how many, which one this is, and what they do together."""

    def __init__(self, settings: RunSettings, trackers: Sequence[str] = ()) -> None:
        device = settings.model.device
        self.accelerator = Accelerator(
            cpu=device == "cpu" or (device == "auto" and not torch.cuda.is_available()),
            mixed_precision="no",  # the dtype is a setting of the run; see `launcher_dtype`
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the loss is divided by positions
            log_with=list(trackers) or None,
            project_config=ProjectConfiguration(settings.out, str(Path(settings.out) / "logs")),
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=PATIENCE),
            ],
        )
        if self.accelerator.num_processes > 1:
            _GROUPS.append((self.accelerator, torch.distributed.group.WORLD))
        launcher_shards = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if self.accelerator.distributed_type == DistributedType.MULTI_CPU and launcher_shards:
            # without an accelerator Accelerate 1.15 would fall back to DDP without a word; torch shards there too
            self.accelerator.state.distributed_type = DistributedType.FSDP
            self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        self.count, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.is_main = self.accelerator.is_main_process
        kind, reason = self.accelerator.distributed_type.value, ""
        if kind not in KINDS:
            reason = f"the launcher requests {kind}; heads are trained with DDP or FSDP2, choose one of them."
        elif self.sharded and self.accelerator.state.fsdp_plugin.fsdp_version != 2:
            reason = "the launcher requests FSDP of version 1; add --fsdp_version 2."
        elif self.count > 1 and ":" in device:
            reason = f"device {device} is one for {self.count} processes; use cuda, and each takes one."
        if reason:
            self.wait()  # the others refuse too, once they have met: no group goes on whose process 0 is gone
            raise UserError(reason)
        if self.sharded:
            plugin = self.accelerator.state.fsdp_plugin
            # a head is one layer, so it is sharded as one unit
            plugin.auto_wrap_policy = None
            plugin.cpu_ram_efficient_loading = False
            plugin.activation_checkpointing = False

    @property
    def sharded(self) -> bool:
        """True when each process holds only a part of each weight (FSDP2)."""
        return self.accelerator.distributed_type == DistributedType.FSDP

    def spread(self, module: nn.Module) -> None:
        """Give every process the weights and buffers of process 0."""
        for tensor in (*module.parameters(), *module.buffers()):
            broadcast(tensor.data)

    def wrap(self, module: nn.Module, optimizer: torch.optim.Optimizer, *, idle: bool) -> tuple[nn.Module, Any]:
        """The module whose forward is called for training, and the optimiser over its weights.

        idle: some weights take no part in a step, and DDP must not wait for them.
        """
        if self.accelerator.ddp_handler is not None:
            self.accelerator.ddp_handler.find_unused_parameters = idle
        # FSDP2 decides itself where things go, and takes no option
        places = {} if self.sharded else {"device_placement": [False, False]}
        with warnings.catch_warnings():
            # Accelerate 1.15 passes the option by the name that PyTorch 2.13 calls deprecated, and knows no other
            warnings.filterwarnings("ignore", ".*broadcast_buffers.* is deprecated", FutureWarning)
            return tuple(self.accelerator.prepare(module, optimizer, **places))

    def on_main(self, action: Callable[[], T]) -> T:
        """The result of `action`, which process 0 alone runs; what it refuses ends all of them.

        Raises:
            UserError: in every process, if process 0 raised it.
        """
        if self.count == 1:
            return action()
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer[0] = action()
            except UserError as error:
                answer[1] = str(error)
        broadcast_object_list(answer)
        if answer[1] is not None:
            raise UserError(answer[1])
        return answer[0]

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def end(self) -> None:
        """Close the trackers and leave the group of processes, none before the others are done with it."""
        self.wait()
        self.accelerator.end_training()


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which this process may hold a part, as a whole one: all processes have to call this together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, divided as `like` is."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]


def launcher_dtype(settings: RunSettings) -> str:
    """The run's dtype: `--dtype`, or where that is auto the `--mixed_precision` of `accelerate launch`.

    Raises:
        UserError: for a mixed precision that heads can't be trained in.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if settings.model.dtype != "auto" or precision == "no":
        return settings.model.dtype
    if precision != "bf16":
        raise UserError(f"the launcher requests mixed precision {precision}; heads are trained in bf16 or float32.")
    return "bfloat16"
