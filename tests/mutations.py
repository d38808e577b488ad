"""Damage to files, drawn by hypothesis: in JSON, in safetensors, and to any file as a whole.

A test copies a valid folder, applies a mutation, and asserts that what reads it either refuses it in one sentence, or
gives the right result.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from draft.errors import UserError

VALUES = [None, 0, -1, 1, 3, 2.5, 10**12, 1e300, True, False, "x", "", [], [1], ["x"], {}, {"x": 1}]


@dataclass(frozen=True)
class Mutation:
    """One change of one file."""

    file: str
    how: str
    key: str = ""  # of JSON, or the tensor's name
    value: Any = None  # of JSON

    def apply(self, folder: Path) -> None:
        path = folder / self.file
        if self.how in _OF_FILES:
            _OF_FILES[self.how](path)
        elif path.suffix == ".json":
            values = json.loads(path.read_text())
            if self.how == "drop":
                del values[self.key]
            else:
                values[self.key] = self.value
            path.write_text(json.dumps(values))
        else:
            tensors = load_file(path)
            OF_TENSORS[self.how](tensors, self.key)
            save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata={"format": "pt"})

    @property
    def keeps_values(self) -> bool:
        """The weights stay what they were, to rounding: no file is wrong."""
        return self.how == "narrow"


def _spoil(value: float) -> Callable[[dict[str, Tensor], str], None]:
    def change(tensors: dict[str, Tensor], key: str) -> None:
        if tensors[key].is_floating_point():
            tensors[key].view(-1)[-1] = value
        else:
            tensors[key] = tensors[key] + (10**6 if tensors[key].dtype != torch.bool else 1)

    return change


OF_TENSORS: dict[str, Callable[[dict[str, Tensor], str], Any]] = {
    "drop": lambda t, key: t.pop(key),
    "rename": lambda t, key: t.update({f"module.{key}": t.pop(key)}),
    "add": lambda t, key: t.update({f"{key}_scale": torch.ones(1)}),
    "narrow": lambda t, key: t.update({key: t[key].to(torch.bfloat16 if t[key].is_floating_point() else torch.int32)}),
    "integers": lambda t, key: t.update({key: t[key].to(torch.int8)}),
    "float8": lambda t, key: t.update({key: t[key].float().to(torch.float8_e4m3fn)}),
    "floats": lambda t, key: (
        t.update({key: t[key].to(torch.float16)}) if not t[key].is_floating_point() else t.pop(key)
    ),
    "shorten": lambda t, key: t.update({key: t[key][:-1].clone()}),
    "flatten": lambda t, key: t.update({key: t[key].reshape(1, -1)}),
    "empty": lambda t, key: t.update({key: t[key].new_empty(0)}),
    "nan": _spoil(float("nan")),
    "infinity": _spoil(float("-inf")),
}


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


_OF_FILES: dict[str, Callable[[Path], Any]] = {
    "remove": Path.unlink,
    "truncate": _truncate,
    "clear": lambda path: path.write_bytes(b""),
    "garble": lambda path: path.write_bytes(b"\xff\x00damaged"),
    "wrap": lambda path: path.write_text("[1]"),
}


def mutations(folder: Path, files: Iterable[str], *, settled: Iterable[str] = ()) -> st.SearchStrategy[Mutation]:
    """Mutations of these files of a valid folder.

    settled: keys of JSON that may mean something else with any value, or nothing: they are left alone.
    """
    drawn: list[st.SearchStrategy[Mutation]] = []
    for file in files:
        drawn.append(st.sampled_from([Mutation(file, how) for how in _OF_FILES]))
        if file.endswith(".json"):
            keys = sorted(set(json.loads((folder / file).read_text())) - set(settled))
            drawn.append(st.builds(Mutation, st.just(file), st.just("drop"), st.sampled_from(keys)))
            drawn.append(
                st.builds(Mutation, st.just(file), st.just("set"), st.sampled_from(keys), st.sampled_from(VALUES))
            )
        elif file.endswith(".safetensors"):
            names = sorted(load_file(folder / file))
            one = st.builds(Mutation, st.just(file), st.sampled_from(sorted(OF_TENSORS)), st.sampled_from(names))
            drawn.extend([one, one])
    return st.one_of(drawn)


def mutated(folder: Path, mutation: Mutation, into: Path) -> Path:
    """A copy of a valid folder with the mutation."""
    shutil.rmtree(into, ignore_errors=True)
    shutil.copytree(folder, into)
    mutation.apply(into)
    return into


def result_or_refusal(read: Callable[[], Any]) -> Any:
    """What `read` returns; None where it refuses in one sentence. Any other exception is the test's failure."""
    try:
        return read()
    except UserError as refusal:
        sentence = str(refusal)
        assert "\n" not in sentence and sentence.endswith(".") and len(sentence) < 700, sentence
        return None
