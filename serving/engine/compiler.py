"""How torch.compile is used here, by target and head."""

from __future__ import annotations

import os

from draft.files import cache_folder

FORK = (-1, 0, 0)  # parents of a tree's nodes: a graph has to meet a mask before it can do without


def set_compiler_up() -> None:
    """Keep the artefacts for the next start, and leave the threads to the kernels."""
    from torch._inductor import config

    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
    config.cpp.threads = 1  # its parallel loops wait actively for threads that may not be running
