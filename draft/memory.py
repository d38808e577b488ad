"""The memory of this machine, and of the container that this process may be in."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process may still take: on CUDA of the device, otherwise of the system."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    rooms = [psutil.virtual_memory().available, *(allowed - used for allowed, used in control_groups())]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        rooms.append(limit - psutil.Process().memory_info().vms)
    return max(0, min(rooms))


def whole_memory() -> int:
    """Return the bytes of the system, or of the container: the same at each start, whatever else runs."""
    return min([psutil.virtual_memory().total, *(allowed for allowed, _ in control_groups())])


def control_groups(
    process: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[tuple[int, int]]:
    """Yield the bytes that each limited control group of this process may have, and has.

    Cached files give way, so they do not count.
    """
    for line in process.read_text().splitlines() if process.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            top, limit, usage, cached = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, cached = root / "memory", "total_inactive_file"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = top / path.strip("/")  # in a container its own group is the top, whatever the path says
        for group in (folder, *folder.parents):
            if group.is_relative_to(top) and (group / limit).is_file():
                allowed, figures = (group / limit).read_text().strip(), (group / "memory.stat").read_text().split()
                files = int(figures[figures.index(cached) + 1]) if cached in figures else 0
                if allowed != "max":
                    yield int(allowed), int((group / usage).read_text()) - files
