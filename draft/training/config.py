"""The settings of a training run: one dataclass field is one flag and one key of the YAML file."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from afa_kernels import ACTIVATIONS, canonical_placement
from draft.afa.schedule import SCHEDULES
from draft.errors import UserError
from draft.heads.registry import ARCHITECTURES, DEFAULT
from draft.training.loss import LOSSES

TRACKERS = ("tensorboard", "wandb", "trackio", "none")
METHODS = ("afa-lora", "lora", "full")
DRAFT_VOCABULARY = 8192  # tokens of a new head's reduced vocabulary
DRAFT_STEPS = 4  # that training-time test unrolls, for heads that draft any number
LEFT_TO_THE_HEAD = {"architecture", "targets", "draft_steps", "feature_weight"}  # what `build.settle` fills in
_LEARNING_RATES = {"pretrain": 1e-3, "full": 2e-4, "lora": 1e-3, "afa-lora": 1e-3}


def _setting(default: Any, help: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class ModelSettings:
    target: str = _setting("smollm2", "Target: hub id, folder, .gguf file, or smollm2 (bundled).")
    target_adapter: str | None = _setting(None, "PEFT LoRA adapter of the target, merged in memory: a folder.")
    head: str | None = _setting(
        None,
        "Warm start: the head whose weights a new run starts from, a folder or smollm2-eagle3 (bundled). Needed by "
        "adapt. (To go on with an interrupted run: --resume.)",
    )
    architecture: str | None = _setting(None, f"Of a new head: {', '.join(ARCHITECTURES)} [default: {DEFAULT}].")
    head_options: list[str] = _setting(
        [],
        "Option of a new head, as num_heads=3; repeatable. "
        + "; ".join(f"{each.architecture}: {', '.join(each.options)}" for each in ARCHITECTURES.values())
        + ".",
    )
    draft_vocab_size: int | None = _setting(
        None,
        f"Tokens of a new head's reduced vocabulary [default: {DRAFT_VOCABULARY}; the target's where the LM head is].",
    )
    rebuild_vocabulary: bool = _setting(
        False, "Choose --head's vocabulary anew from the data (pretrain, adapt by full)."
    )
    dtype: str = _setting("auto", "Compute dtype: auto, bfloat16, float16, float32 or float64.")
    device: str = _setting("auto", "Device: auto, cpu, cuda.")
    other_target: bool = _setting(False, "Accept a head that was made for another version of this target.")

    @property
    def new_architecture(self) -> str:
        return self.architecture or DEFAULT

    def options(self) -> dict[str, Any]:
        """`head_options` as arguments of the configuration of a new head."""
        architecture = ARCHITECTURES[self.new_architecture]
        hints, options = typing.get_type_hints(architecture.config_class), {}
        for text in self.head_options:
            key, equals, value = text.partition("=")
            if key not in architecture.options or not equals:
                raise UserError(
                    f"head option {text!r} is none of {architecture.architecture}'s; they are "
                    f"{', '.join(f'{option}=...' for option in architecture.options)}."
                )
            options[key] = convert(f"head option {key}", read_value(text, value), hints[key])
        return options


@dataclass
class AdapterSettings:
    method: str = _setting("afa-lora", "What is trained: afa-lora, lora or full (adapt).")
    rank: int = _setting(16, "Rank r of the adapter.")
    alpha: float = _setting(32, "Scaling: the adapter's output is multiplied by alpha / rank.")
    activation: str = _setting("silu", "Annealed activation: silu, gelu, relu or tanh (afa-lora).")
    placement: str = _setting("A-s-B", "Where it stands: A-s-B, s-A-B, s-A-B-s, s-A-s-B or s-A-s-B-s (afa-lora).")
    decay_ratio: float = _setting(0.3, "Share of the steps after which the activation is gone (afa-lora).")
    schedule: str = _setting("linear", "How it goes: linear, cosine or exponential (afa-lora).")
    targets: list[str] = _setting(
        [], "Layers that get an adapter [default: the decoder layer's matrices, or Medusa's blocks]."
    )


@dataclass
class DataSettings:
    data: list[str] = _setting([], "Folders that `draft-train prepare` wrote; give it more than once to mix.")
    tokens_per_batch: int = _setting(2048, "Tokens (padding included) of one forward pass of one process.")
    packing: bool | None = _setting(
        None, "Several conversations in one row, each attending to itself only (default: on CUDA)."
    )


@dataclass
class TrainingSettings:
    epochs: float = _setting(3.0, "Passes over the training rows.")
    max_steps: int | None = _setting(None, "Optimiser steps, instead of epochs.")
    learning_rate: float | None = _setting(None, f"Peak learning rate; by default {_LEARNING_RATES}.")
    warmup_ratio: float = _setting(0.05, "Share of the steps in which the rate rises; then a cosine to a tenth.")
    max_grad_norm: float = _setting(0.5, "Gradients are clipped to this norm.")
    gradient_accumulation: int = _setting(1, "Batches per optimiser step and process.")
    draft_steps: int | None = _setting(
        None, f"Draft steps K that training-time test unrolls [default: {DRAFT_STEPS}, or all that a Medusa head has]."
    )
    step_decay: float = _setting(0.8, "Draft step k weighs step_decay ** k in the loss.")
    loss: str = _setting("kl", f"Loss: {', '.join(LOSSES)}.")
    feature_weight: float | None = _setting(
        None, "Weight of the regression to the target's states beside the loss [default: 10 for eagle, else none]."
    )
    seed: int = _setting(0, "Seed of initialisation and data order.")
    eval_every: int = _setting(50, "Steps between replays on a few held-out rows; 0 for never.")
    eval_rows: int = _setting(12, "Held-out greedy rows of that replay.")
    save_every: int = _setting(100, "Steps between checkpoints.")
    keep_checkpoints: int = _setting(2, "Newest checkpoints that are kept.")
    keep_hidden_states: bool | None = _setting(
        None, "Keep the target's hidden states in memory between epochs (default: if they fit in a third of it)."
    )
    cache_hidden_states: str | None = _setting(
        None, "Folder to keep the target's hidden states in, for targets too large to run at every epoch."
    )
    deterministic: bool | None = _setting(
        None, "Use only algorithms that give the same bits every time (default: on a CPU, where they cost nothing)."
    )
    log_with: list[str] = _setting(
        [], "Tracker: tensorboard (the default where it is installed), wandb, trackio or none; repeatable."
    )


@dataclass
class RunSettings:
    """All settings of a run, by section, plus what the command line says: the mode and the run's folder."""

    mode: Literal["pretrain", "adapt"]
    out: str
    model: ModelSettings = field(default_factory=ModelSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    data: DataSettings = field(default_factory=DataSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)

    @property
    def method(self) -> str:
        return "full" if self.mode == "pretrain" else self.adapter.method

    @property
    def learning_rate(self) -> float:
        kind = "pretrain" if self.mode == "pretrain" else self.adapter.method
        return _LEARNING_RATES[kind] if self.training.learning_rate is None else self.training.learning_rate

    def check(self) -> None:
        """Refuse values that can only fail later."""
        if self.method not in METHODS:
            raise UserError(f"method {self.method!r} is unknown; choose one of {', '.join(METHODS)}.")
        if self.training.loss not in LOSSES:
            raise UserError(f"loss {self.training.loss!r} is unknown; choose one of {', '.join(LOSSES)}.")
        self._check_adapter()
        self._check_head()
        if not self.data.data:
            raise UserError("no data given; pass --data DIR, a folder that `draft-train prepare` wrote.")
        if self.mode == "adapt" and not self.model.head:
            raise UserError("no head given; pass --head, the head to adapt (the bundled one is smollm2-eagle3).")
        if self.model.rebuild_vocabulary and self.method != "full":
            raise UserError(f"rebuild_vocabulary needs method full, not {self.method}: an adapter keeps its map.")
        unknown = [name for name in self.training.log_with if name not in TRACKERS]
        if unknown or ("none" in self.training.log_with and len(self.training.log_with) > 1):
            raise UserError(
                f"log_with {', '.join(self.training.log_with)}: choose from {', '.join(TRACKERS[:-1])}, or none alone."
            )
        for section, name, least, most in _RANGES:
            value = getattr(getattr(self, section), name)
            if value is not None and not value >= least:
                raise UserError(f"{name} = {value} is too small; use at least {least}.")
            if value is not None and not value <= most:
                raise UserError(f"{name} = {value} is too large; use at most {most}.")

    def _check_adapter(self) -> None:
        """Also where the method has no use for it: what is misspelt is never meant."""
        activation, schedule = self.adapter.activation, self.adapter.schedule
        if activation not in ACTIVATIONS:
            raise UserError(f"activation {activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}.")
        if schedule not in SCHEDULES:
            raise UserError(f"schedule {schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}.")
        try:
            canonical_placement(self.adapter.placement)
        except ValueError as error:
            raise UserError(f"{error}.") from error

    def unused(self) -> list[str]:
        """Settings of an adapter that were given, and that the method has no use for."""
        usual = AdapterSettings()
        names = [name for name, methods in _ADAPTERS.items() if self.method not in methods]
        return [name for name in names if getattr(self.adapter, name) != getattr(usual, name)]

    def _check_head(self) -> None:
        model = self.model
        if model.new_architecture not in ARCHITECTURES:
            raise UserError(
                f"architecture {model.architecture!r} is unknown; choose one of {', '.join(ARCHITECTURES)}."
            )
        if model.head and model.head_options:
            raise UserError(
                f"head_options {', '.join(model.head_options)}: they are of a new head, and {model.head!r} is given; "
                "leave one of them out."
            )
        if not model.head and model.draft_vocab_size and not ARCHITECTURES[model.new_architecture].reduced_vocabulary:
            raise UserError(
                f"draft_vocab_size = {model.draft_vocab_size}: a head of architecture {model.architecture} drafts from "
                "the target's whole vocabulary; leave the flag out."
            )
        if model.rebuild_vocabulary and not model.head:
            raise UserError("rebuild_vocabulary: a new head's is chosen from the data anyway; leave the flag out.")
        if model.head and model.draft_vocab_size and not model.rebuild_vocabulary:
            raise UserError(
                f"draft_vocab_size = {model.draft_vocab_size}: {model.head!r} has a vocabulary already, and keeps it; "
                "leave the flag out, or choose one anew with --rebuild-vocabulary."
            )
        model.options()


# setting of an adapter -> methods that go by it
_ADAPTERS = {
    **dict.fromkeys(("rank", "alpha", "targets"), ("afa-lora", "lora")),
    **dict.fromkeys(("activation", "placement", "decay_ratio", "schedule"), ("afa-lora",)),
}
_RANGES = (
    ("model", "draft_vocab_size", 1, math.inf),
    ("adapter", "rank", 1, math.inf),
    ("adapter", "alpha", 1e-6, math.inf),
    ("data", "tokens_per_batch", 1, math.inf),
    ("training", "epochs", 1e-6, math.inf),
    ("training", "max_steps", 1, math.inf),
    ("training", "learning_rate", 0.0, math.inf),
    ("training", "warmup_ratio", 0.0, 1.0),
    ("training", "gradient_accumulation", 1, math.inf),
    ("training", "draft_steps", 1, math.inf),
    ("training", "max_grad_norm", 1e-12, math.inf),
    ("training", "keep_checkpoints", 1, math.inf),
    ("training", "save_every", 1, math.inf),
    ("training", "eval_every", 0, math.inf),
    ("training", "eval_rows", 0, math.inf),
    ("training", "step_decay", 0.0, math.inf),
    ("training", "feature_weight", 0.0, math.inf),
)
SECTIONS: dict[str, type] = {
    "model": ModelSettings,
    "adapter": AdapterSettings,
    "data": DataSettings,
    "training": TrainingSettings,
}


def setting_types(section: type) -> dict[str, Any]:
    """Field name -> type of a section's settings."""
    return typing.get_type_hints(section)


def resolve(
    mode: Literal["pretrain", "adapt"],
    out: str,
    *,
    config_file: Path | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> RunSettings:
    """Settings from defaults, then the YAML file, then flags (None = not given), then `section.key=value`.

    Raises:
        UserError: for an unknown section or key, or a value of the wrong type.
    """
    settings = RunSettings(mode=mode, out=out)
    for section, values in read_sections(config_file, SECTIONS).items():
        if section in ("mode", "out"):  # a resolved config of an earlier run has them; the command line decides
            continue
        if not isinstance(values, dict):
            raise UserError(f"config {str(config_file)!r}: section {section!r} must hold keys and values.")
        for key, value in values.items():
            _set(settings, section, key, value)
    for key, value in (flags or {}).items():
        if value is not None:
            section = next(name for name, kind in SECTIONS.items() if key in setting_types(kind))
            _set(settings, section, key, value)
    for override in overrides:
        name, equals, text = override.partition("=")
        section, dot, key = name.partition(".")
        if not (equals and dot):
            raise UserError(f"override {override!r} is not of the form section.key=value.")
        _set(settings, section, key, read_value(override, text))
    settings.check()
    for name in ("head", "target_adapter"):  # merge may be called from another folder
        given = getattr(settings.model, name)
        if given and Path(given).is_dir():
            setattr(settings.model, name, str(Path(given).resolve()))
    return settings


def _set(settings: RunSettings, section: str, key: str, value: Any) -> None:
    if section not in SECTIONS:
        raise UserError(f"unknown section {section!r} in the configuration; known are {', '.join(SECTIONS)}.")
    hints = setting_types(SECTIONS[section])
    if key not in hints:
        raise UserError(f"unknown key {section}.{key} in the configuration; known are {', '.join(hints)}.")
    setattr(getattr(settings, section), key, convert(f"{section}.{key}", value, hints[key]))


def to_yaml(settings: RunSettings) -> str:
    return yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False)


# Values of settings as a file or a command line has them: YAML, checked against a field's type.


# what looks like a date and is none (2020-13-45) is a ValueError and not a YAMLError; so is a file that is no UTF-8


def read_sections(path: Path | None, known: Iterable[str]) -> dict[str, Any]:
    """A configuration file; empty without one."""
    if path is None:
        return {}
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"config {str(path)!r} could not be read ({str(error).splitlines()[0]}).") from error
    if not isinstance(values, dict):
        raise UserError(f"config {str(path)!r} must hold sections: {', '.join(known)}.")
    return values


def read_value(override: str, text: str) -> Any:
    """The YAML `text` of an override, which is named in the error."""
    try:
        return yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"override {override!r}: the value is not YAML; quote it.") from error


def convert(name: str, value: Any, kind: Any) -> Any:
    """Check a value against a field's type; integers pass for floats, and 1e-3 (a string to YAML) too."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in options:
        return None
    wanted = next(option for option in options if option is not type(None))
    if typing.get_origin(wanted) is list:
        (item_kind,) = typing.get_args(wanted)
        if isinstance(value, (list, tuple)) and all(isinstance(item, item_kind) for item in value):
            return list(value)
    elif wanted is float and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif isinstance(value, wanted) and isinstance(value, bool) == (wanted is bool):
        return value
    kind_name = "finite number" if wanted is float else getattr(wanted, "__name__", wanted)
    raise UserError(f"{name} = {value!r} is not of type {kind_name}; correct the value.")
