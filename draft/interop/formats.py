"""Parts of a format: how a checkpoint is completed for an import, and how an export is written and checked.

The rules of an export are what engines do with a head's folder when they load it, read from the sources of vLLM 0.32.0
(`llama_eagle3.py`, `gpu_model_runner.py`, `configs/speculators/`), SGLang 0.5.23 (`llama_eagle3.py`,
`spec_aux_hidden_state.py`, `eagle_worker_v2.py`) and speculators 0.9.0 (`models/eagle3/`). An engine that finds a
tensor that it doesn't know fails (vLLM) or goes on without it (SGLang); one that misses a tensor goes on with random
weights or zeros. A head that was loaded has exactly the tensors of its config.json; that engines take those was tried
with each of its options (`make interop`), and tests compare what is written with what they loaded.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from draft.errors import UserError
from draft.heads.checkpoint import token_map_problem
from draft.target import Target
from draft.target.bundled import BUNDLED_TARGET, bundled_target_folder

# --- import ---


@dataclass
class Checkpoint:
    """A folder of another project, nothing of it executed; `notes` grows while it is understood."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    about: dict[str, Any]  # draftsmith.json, where it is one of our exports
    auxiliary_layers: list[int] | None = None  # the user's choice
    notes: list[str] = field(default_factory=list)  # sentences for the user

    @property
    def architecture(self) -> str:
        names = self.config.get("architectures") or ""
        return str(names[0] if isinstance(names, list) else names)


@dataclass(frozen=True)
class Source:
    """The formats that heads of one architecture are imported from.

    translate: (checkpoint, target) -> config.json of this program; it renames and completes the checkpoint's tensors in
    place, and leaves out copies of the target's.
    """

    kinds: Mapping[str, Callable[[Checkpoint], bool]]  # name -> recognises a checkpoint; the first that does counts
    translate: Callable[[Checkpoint, Target], dict[str, Any]]


def check_sizes(found: Checkpoint, *sizes: tuple[str, Any, int]) -> None:
    """sizes: (name, the head's, the target's). Raises UserError at the first that differs."""
    for name, ours, theirs in sizes:
        if ours != theirs:
            raise UserError(
                f"{str(found.folder)!r}: the head's {name} is {ours} and the target's is {theirs}; use the target "
                "that it was made for."
            )


def complete_layer(values: dict[str, Any], found: Checkpoint, target: Target) -> None:
    """Fill in keys that a decoder layer's config.json may lack, in place.

    The head's context is its target's; scaled RoPE remembers the length that it was made for.
    """
    # engines assume the same where a LlamaConfig says nothing
    defaults: dict[str, Any] = {"rms_norm_eps": 1e-6, "hidden_act": "silu"}
    if not values.get("rope_parameters") and values.get("rope_theta") is None:
        defaults["rope_theta"] = 10000.0
    for key, value in defaults.items():
        if values.get(key) is None:
            values[key] = value
            found.notes.append(f"filled in {key} = {value}, which engines assume.")
    theirs = values.get("max_position_embeddings")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    scaled = rope.get("rope_type", rope.get("type", "default"))
    if scaled != "default":
        rope = {**rope, "rope_type": scaled}
        if theirs and scaled in ("yarn", "longrope"):
            rope.setdefault("original_max_position_embeddings", theirs)
        rope.setdefault("rope_theta", values.get("rope_theta") or 10000.0)
        values["rope_parameters"] = rope
    if theirs != target.stated_length:
        values["max_position_embeddings"] = target.stated_length
        found.notes.append(f"set max_position_embeddings from {theirs} to the target's {target.stated_length}.")


def drop_embedding(found: Checkpoint, target: Target) -> None:
    """Leave out a copy of the target's embedding; refuse another one, which vLLM would use and SGLang would not."""
    theirs = found.tensors.pop("embed_tokens.weight", None)
    if theirs is None:
        return
    ours = target.embedding.weight.detach().cpu()
    if theirs.shape != ours.shape:
        raise UserError(
            f"{str(found.folder)!r}: embed_tokens.weight is {list(theirs.shape)} and the target's {list(ours.shape)}; "
            "use the target that the head was made for."
        )
    # both may have been rounded, to different half precisions
    if not torch.allclose(theirs.float(), ours.float(), rtol=2**-8, atol=2**-24):
        worst = float((theirs.float() - ours.float()).abs().max())
        raise UserError(
            f"{str(found.folder)!r}: embed_tokens.weight differs from the target's by up to {worst:.2g}: vLLM would "
            "use it and SGLang would not; use the target that the head was made for, or a head without one."
        )
    found.notes.append("left out embed_tokens.weight: it is the target's.")


def is_the_targets(lm_head: Tensor, target: Target) -> bool:
    """True for an LM head that is a copy of the target's, in its own dtype."""
    theirs = target.lm_head.weight.detach()
    return lm_head.shape == theirs.shape and torch.equal(lm_head, theirs.to("cpu", lm_head.dtype))


def complete_token_map(found: Checkpoint, values: dict[str, Any]) -> None:
    """Make both directions of the map between a reduced vocabulary and the target's, d2t and t2d, in place.

    Raises:
        UserError: for a map that is missing, or that the target's vocabulary has no room for.
    """
    tensors, vocab = found.tensors, int(values["vocab_size"])
    size = int(values.get("draft_vocab_size") or vocab)
    if size == vocab:
        return  # `fill` takes trivial maps only
    d2t, t2d = tensors.get("d2t"), tensors.get("t2d")
    if d2t is None and t2d is None:
        raise UserError(
            f"{str(found.folder)!r}: draft_vocab_size is {size} of {vocab} tokens, and there is no d2t to say which; "
            "get the whole head."
        )
    if t2d is not None and t2d.shape != (vocab,):
        raise UserError(
            f"{str(found.folder)!r}: t2d has {len(t2d)} entries and the target's vocabulary {vocab} tokens."
        )
    if d2t is None:
        assert t2d is not None
        ids = t2d.bool().nonzero()[:, 0]
        tensors["d2t"] = ids - torch.arange(len(ids))
        found.notes.append("filled in d2t from t2d: draft ids in the order of their target ids.")
    else:
        tensors["d2t"] = d2t.to(torch.int64)
    problem = token_map_problem(tensors["d2t"], size, vocab)
    if problem:
        raise UserError(f"{str(found.folder)!r}: {problem}; use the target that the head was made for.")
    marks = torch.zeros(vocab, dtype=torch.bool)
    marks[tensors["d2t"] + torch.arange(size)] = True
    if t2d is None:
        found.notes.append("filled in t2d from d2t.")
    elif not torch.equal(t2d.bool(), marks):
        raise UserError(
            f"{str(found.folder)!r}: t2d marks {int(t2d.bool().sum())} target tokens and d2t gives {size}, others; "
            "the two belong to different heads."
        )
    tensors["t2d"] = marks


# --- export ---

# how an engine is started with a head; `command_lines` fills in the names
VLLM = "vllm serve {target} --speculative-config {speculative}"
SGLANG = (
    "python -m sglang.launch_server --model-path {target} --speculative-algorithm {algorithm} "
    "--speculative-draft-model-path {head} --speculative-num-steps {length} --speculative-eagle-topk 1 "
    "--speculative-num-draft-tokens {tokens}"
)


@dataclass(frozen=True)
class TargetShape:
    """Entries of the target's config.json that engines compare a head with."""

    path: str  # for engines: hub id or folder
    architecture: str
    hidden_size: int
    vocab_size: int
    num_layers: int
    max_length: int


# (the head's config.json, tensors, target) -> what an engine can't take
Rule = Callable[[dict[str, Any], dict[str, Tensor], TargetShape], Iterator[str]]


def own_tensors(head: Any, target: TargetShape) -> dict[str, Tensor]:
    """The tensors of the head's own file."""
    return {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}


@dataclass(frozen=True)
class Format:
    """A format that heads of one architecture are exported in."""

    commands: Callable[[Any], dict[str, str]]  # of a head: engine -> how it is started
    lacking: Mapping[str, str] = field(default_factory=dict)  # options that are set together -> why that can't be
    rules: tuple[Rule, ...] = ()
    # (head, target) -> the file's tensors
    tensors: Callable[[Any, TargetShape], dict[str, Tensor]] = own_tensors
    # (the head's config.json, target, drafted tokens) -> the file's
    config: Callable[[dict[str, Any], TargetShape, int], dict[str, Any]] = lambda config, target, length: config
    notes: Callable[[Any], list[str]] = lambda head: []  # of a head: sentences for the user


def problems(format: Format, config: dict[str, Any], tensors: dict[str, Tensor], target: TargetShape) -> Iterator[str]:
    """Everything that an engine of this format would stumble over; config: the head's own."""
    for key, theirs in (
        ("hidden_size", target.hidden_size),
        ("vocab_size", target.vocab_size),
        ("max_position_embeddings", target.max_length),
    ):
        if config.get(key, theirs) != theirs:  # a Medusa head has no positions
            yield f"{key} is {config[key]} and the target's is {theirs}"
    if "d2t" in tensors:
        problem = token_map_problem(tensors["d2t"], len(tensors["d2t"]), config["vocab_size"])
        if problem:
            yield problem
    yield from (reason for keys, reason in format.lacking.items() if all(config.get(key) for key in keys.split()))
    for rule in format.rules:
        yield from rule(config, tensors, target)


def command_lines(format: Format, head: Any, out: Path, target: TargetShape, length: int) -> dict[str, str]:
    """Engine -> the command that starts it with the head in the folder `out`; length: drafted tokens."""
    speculative = {"method": head.architecture, "model": str(out), "num_speculative_tokens": length}
    values = {
        "target": target.path,
        "head": out,
        "length": length,
        "tokens": length + 1,
        "algorithm": head.architecture.upper(),
        "speculative": json.dumps(speculative),
    }
    commands = format.commands(head).items()
    return {engine: shlex.join(word.format(**values) for word in command.split()) for engine, command in commands}


def target_shape(name: str) -> TargetShape:
    """Read the config.json of a target, hub id, folder or the bundled one: it may be larger than this machine.

    Raises:
        UserError: when there is none, or it is a GGUF file, which the other engines' EAGLE-3 does not take.
    """
    from transformers import AutoConfig

    if name.endswith(".gguf"):
        raise UserError(f"target {name!r}: vLLM and SGLang serve EAGLE-3 beside a folder or hub id, not a GGUF file.")
    path = str(bundled_target_folder()) if name == BUNDLED_TARGET else name
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"target {name!r}: its config.json can't be read ({reason}); pass --target.") from error
    inner = config.get_text_config()
    return TargetShape(
        path=path,
        architecture=(config.architectures or ["unknown"])[0],
        hidden_size=inner.hidden_size,
        vocab_size=inner.vocab_size,
        num_layers=inner.num_hidden_layers,
        max_length=int(getattr(inner, "max_position_embeddings", 2048)),
    )


def target_tensor(path: str, *names: str) -> Tensor:
    """The first of `names` (ends of tensor names) in a target's safetensors files; hub ids as transformers finds them.

    Raises:
        UserError: when the target has no safetensors files, or none of them has such a tensor.
    """
    from transformers.utils import cached_file

    def find(name: str) -> str | None:
        try:
            return cached_file(path, name)
        except OSError:  # it has no such file
            return None

    files, index = [find("model.safetensors")], find("model.safetensors.index.json")
    if files == [None] and index is not None:
        files = [find(shard) for shard in dict.fromkeys(json.loads(Path(index).read_text())["weight_map"].values())]
    for name in names:
        for file in filter(None, files):
            with safe_open(file, "pt") as tensors:
                found = next((key for key in tensors.keys() if f".{key}".endswith(f".{name}")), None)  # noqa: SIM118
                if found is not None:
                    return tensors.get_tensor(found)
    raise UserError(f"target {path!r}: its safetensors files have no {' or '.join(names)}; export in another format.")
