"""The memory that a process may have, in a container too."""

from pathlib import Path

import psutil
import pytest
import torch

from draft.memory import control_groups, free_memory, whole_memory


@pytest.mark.parametrize(
    ("line", "folder", "limit", "usage", "cached"),
    [
        ("0::/a/b", "a/b", "memory.max", "memory.current", "inactive_file"),
        ("3:cpu,memory:/a", "memory/a", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ("0::/not/here", "", "memory.max", "memory.current", "inactive_file"),  # as inside a container
    ],
)
def test_control_groups_limit_the_memory(
    tmp_path: Path, line: str, folder: str, limit: str, usage: str, cached: str
) -> None:
    process, root = tmp_path / "cgroup", tmp_path / "fs"
    process.write_text(f"9:pids:/\n{line}\n")
    assert list(control_groups(process, root)) == []
    group = root / folder
    group.mkdir(parents=True)
    for name, text in {limit: "5000", usage: "3000", "memory.stat": f"anon 1\n{cached} 700\n"}.items():
        (group / name).write_text(text)
    assert list(control_groups(process, root)) == [(5000, 2300)]
    (group / limit).write_text("max\n")
    assert list(control_groups(process, root)) == []


def test_the_smallest_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < free_memory(torch.device("cpu")) <= whole_memory() <= psutil.virtual_memory().total
    monkeypatch.setattr("draft.memory.control_groups", lambda: iter([(5000, 2300), (1 << 60, 1000)]))
    assert (whole_memory(), free_memory(torch.device("cpu"))) == (5000, 2700)
