"""The settings of a training run: one field is one flag and one key of the YAML file."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from draft.errors import UserError

if typing.TYPE_CHECKING:
    from draft.heads.base import DraftHead

# Names of what others implement, written out so that `--help` and a mistake are answered without loading torch; a test
# compares them with the tables.
ACTIVATIONS = ("silu", "gelu", "relu", "tanh")
SCHEDULES = ("linear", "cosine", "exponential")
LOSSES = ("kl", "tv", "lk-alpha", "lk-lambda")
HEAD_OPTIONS = {  # architecture -> options of a new head; the default architecture first
    "eagle3": (
        "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "shared_lm_head", "auxiliary_layers",
    ),
    "eagle": ("fc_bias", "qkv_bias"),
    "medusa": ("num_heads", "num_layers", "shared_lm_head"),
}  # fmt: skip
DEFAULT = next(iter(HEAD_OPTIONS))
TRACKERS = ("tensorboard", "wandb", "trackio", "none")
OPTIMIZERS = ("adamw", "muon")
METHODS = ("full", "afa-lora", "lora")
DRAFT_VOCABULARY = 8192  # tokens of a new head's reduced vocabulary
DRAFT_STEPS = 3  # that training-time test unrolls, for heads that draft any number
EVAL_EVERY, REPLAYS = 50, 6  # steps between replays, and replays of a run that has fewer steps
_LEARNING_RATES = {"full": 2e-4, "lora": 1e-3, "afa-lora": 1e-3}
_NEW_HEADS = {"adamw": 1e-3, "muon": 2e-3}  # learning rates without --head
# mode -> its defaults where they differ from those of the settings; of pretrain: docs/reproduce.md
DEFAULTS: dict[str, dict[str, Any]] = {
    "pretrain": {"epochs": 1.0, "optimizer": "muon", "weight_average": 0.95},
    "adapt": {},
}


def _one_of(options: Collection[str]) -> AfterValidator:
    def validate(value: str | None) -> str | None:
        if value is not None and value not in options:
            raise ValueError(f"unknown, choose one of {', '.join(options)}")
        return value

    return AfterValidator(validate)


def _placement(value: str) -> str:
    from afa_kernels import canonical_placement

    canonical_placement(value)
    return value


def _number(value: Any) -> Any:
    """Read 1e-3, which is a string to YAML, as a number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Number = Annotated[float, BeforeValidator(_number)]
# absolute: a merge may be called from another folder
Folder = Annotated[
    str | None, AfterValidator(lambda value: str(Path(value).resolve()) if value and Path(value).is_dir() else value)
]


def _setting(default: Any, help: str, **bounds: Any) -> Any:
    return Field(default, description=help, **bounds)


class _Section(BaseModel):
    # strict: no "3" for 3 and no true for 1
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ModelSettings(_Section):
    """Target and head of a run."""

    target: str = _setting("smollm2", "Target: hub id, folder, .gguf file, or smollm2 (bundled).")
    target_adapter: Folder = _setting(None, "PEFT LoRA adapter of the target, merged in memory: a folder.")
    head: Folder = _setting(
        None,
        "Warm start: the head whose weights a new run starts from, a folder or smollm2-eagle3 (bundled). "
        "Needed by adapt. (To go on with an interrupted run: --resume.)",
    )
    architecture: Annotated[str | None, _one_of(HEAD_OPTIONS)] = _setting(
        None, f"Architecture of a new head: {', '.join(HEAD_OPTIONS)} [default: {DEFAULT}]."
    )
    head_options: list[str] = _setting(
        [],
        "Option of a new head, as num_heads=3; repeatable. "
        + "; ".join(f"{architecture}: {', '.join(options)}" for architecture, options in HEAD_OPTIONS.items())
        + ".",
    )
    draft_vocab_size: int | None = _setting(
        None,
        "Tokens of the reduced vocabulary of a new head, or with rebuild_vocabulary of --head "
        f"[default: {DRAFT_VOCABULARY}, or as many as --head has; with head option shared_lm_head the target's].",
        ge=1,
    )
    rebuild_vocabulary: bool = _setting(
        False,
        "Put tokens that the data use often in the place of tokens of --head's vocabulary that they lack (all weights "
        "only); one that is whole needs draft_vocab_size, and is reduced to it.",
    )
    dtype: str = _setting("auto", "Compute dtype: auto, bfloat16, float16, float32 or float64.")
    device: str = _setting("auto", "Device: auto, cpu, cuda.")
    other_target: bool = _setting(False, "Accept a head that was made for another version of this target.")

    @property
    def new_architecture(self) -> str:
        return self.architecture or DEFAULT

    @property
    def new_head_class(self) -> type[DraftHead]:
        from draft.heads.registry import ARCHITECTURES

        return ARCHITECTURES[self.new_architecture]

    @cached_property
    def options(self) -> dict[str, Any]:
        """`head_options` as arguments of the configuration of a new head."""
        head = self.new_head_class
        types, options = typing.get_type_hints(head.config_class), {}
        for text in self.head_options:
            key, equals, value = text.partition("=")
            if key not in head.options or not equals:
                raise UserError(
                    f"head option {text!r} is none of {head.architecture}'s; they are "
                    f"{', '.join(f'{option}=...' for option in head.options)}."
                )
            try:
                options[key] = TypeAdapter(types[key]).validate_python(_yaml_value(text, value), strict=True)
            except ValidationError as error:
                raise UserError(_sentence(error, f"head option {key}")) from error
        return options


class AdapterSettings(_Section):
    """The adapter that is trained, or all weights."""

    method: Annotated[str, _one_of(METHODS)] = _setting("full", "Training method: full, afa-lora or lora (adapt).")
    rank: int = _setting(16, "Rank r of the adapter.", ge=1)
    alpha: Number | None = _setting(
        None, "Scaling: the adapter's output is multiplied by alpha / rank [default: twice the rank].", ge=1e-6
    )
    activation: Annotated[str, _one_of(ACTIVATIONS)] = _setting(
        "silu", "Annealed activation: silu, gelu, relu or tanh (afa-lora)."
    )
    placement: Annotated[str, AfterValidator(_placement)] = _setting(
        "A-s-B", "Placement of the activation: A-s-B, s-A-B, s-A-B-s, s-A-s-B or s-A-s-B-s (afa-lora)."
    )
    decay_ratio: Number = _setting(0.3, "Share of steps that anneal the activation away (afa-lora).", gt=0, le=1)
    schedule: Annotated[str, _one_of(SCHEDULES)] = _setting(
        "linear", "Annealing schedule: linear, cosine or exponential (afa-lora)."
    )
    targets: list[str] = _setting(
        [], "Layers that get an adapter [default: the decoder layer's matrices, or Medusa's blocks]."
    )

    @model_validator(mode="after")
    def _scaling(self) -> AdapterSettings:
        if self.alpha is None:  # what the rates of docs/evidence.md were measured with, at every rank
            self.alpha = 2.0 * self.rank
        return self


class DataSettings(_Section):
    """Data of a run, and how much of it a batch holds."""

    data: list[str] = _setting([], "Folder that `draft-train prepare` wrote; repeatable, to mix several.")
    every_position: bool = _setting(False, "Train on the prompts of conversations as well, not on the answers only.")
    mix_general: Number = _setting(
        0.0, "Share of the training tokens that are of general conversations, so that the head keeps them.", ge=0, lt=1
    )
    general: str | None = _setting(
        None, "Folder of the general conversations for mix_general [default: those that ship for the bundled target]."
    )
    tokens_per_batch: int = _setting(2048, "Tokens (padding included) of one forward pass of one process.", ge=1)
    packing: bool | None = _setting(
        None, "Several conversations in one row, each attending to itself only (default: on CUDA)."
    )


class TrainingSettings(_Section):
    """Optimisation, and what a run keeps and shows."""

    epochs: Number = _setting(3.0, "Passes over the training rows.", ge=1e-6)
    max_steps: int | None = _setting(None, "Optimiser steps; overrides epochs.", ge=1)
    learning_rate: Number | None = _setting(
        None,
        "Peak learning rate [default: 2e-4 for all weights of a head, 1e-3 for adapters; for new heads 2e-3 with muon "
        "and 1e-3 with adamw].",
        ge=0,
    )
    warmup_ratio: Number = _setting(
        0.05, "Share of steps in which the rate rises; then it falls to final_rate.", ge=0, le=1
    )
    final_rate: Number = _setting(0.1, "Learning rate at the end, as a share of the peak.", ge=0, le=1)
    optimizer: Annotated[str, _one_of(OPTIMIZERS)] = _setting(
        "adamw",
        "Optimiser: adamw, or muon for the matrices of the decoder layer with adamw for the rest (all weights).",
    )
    freeze_lm_head: bool = _setting(False, "Keep the LM head of the head as it is (all weights).")
    weight_average: Number = _setting(
        0.0,
        "Decay of the moving average of the weights, which is evaluated and kept: 0.99, say; 0 for none.",
        ge=0,
        lt=1,
    )
    max_grad_norm: Number = _setting(0.5, "Gradients are clipped to this norm.", ge=1e-12)
    gradient_accumulation: int = _setting(1, "Batches per optimiser step and process.", ge=1)
    draft_steps: int | None = _setting(
        None,
        f"Draft steps K that training-time test unrolls [default: {DRAFT_STEPS}, or all that a Medusa head has].",
        ge=1,
    )
    step_decay: Number = _setting(0.8, "Draft step k weighs step_decay ** k in the loss.", ge=0)
    loss: Annotated[str, _one_of(LOSSES)] = _setting("kl", f"Loss: {', '.join(LOSSES)}.")
    feature_weight: Number | None = _setting(
        None,
        "Weight of the regression to the target's states beside the loss [default: 10 for eagle, else none].",
        ge=0,
    )
    seed: int = _setting(0, "Seed of initialisation and data order.")
    eval_every: int | None = _setting(
        None,
        f"Steps between replays on a few held-out rows; 0 for never [default: at least {REPLAYS} in a run, and every "
        f"{EVAL_EVERY} steps].",
        ge=0,
    )
    eval_rows: int = _setting(32, "Held-out greedy rows of the replay during training.", ge=0)
    keep_best: bool = _setting(
        True, "Keep the weights of the best replay, not the last (of afa-lora: once the activation is annealed away)."
    )
    patience: int | None = _setting(None, "End the run after so many replays without a better one.", ge=1)
    save_every: int = _setting(100, "Steps between checkpoints.", ge=1)
    keep_checkpoints: int = _setting(2, "Newest checkpoints that are kept.", ge=1)
    keep_hidden_states: bool | None = _setting(
        None, "Keep the target's hidden states in memory between epochs (default: if they fit in a third of it)."
    )
    cache_hidden_states: str | None = _setting(
        None, "Folder to keep the target's hidden states in, for targets too large to run at every epoch."
    )
    deterministic: bool | None = _setting(
        None, "Use only algorithms that give the same bits every time (default: on a CPU, where they cost nothing)."
    )
    log_with: list[Annotated[str, _one_of(TRACKERS)]] = _setting(
        [], "Tracker: tensorboard (the default where it is installed), wandb, trackio or none; repeatable."
    )


SECTIONS: dict[str, type[_Section]] = {
    "model": ModelSettings,
    "adapter": AdapterSettings,
    "data": DataSettings,
    "training": TrainingSettings,
}
_ANNEALING = ("activation", "placement", "decay_ratio", "schedule")
# method -> settings of an adapter that it has no use for
_UNUSED_BY = {"afa-lora": (), "lora": _ANNEALING, "full": ("rank", "alpha", "targets", *_ANNEALING)}


class RunSettings(_Section):
    """All settings of a run, by section, plus what the command line says: the mode and the run's folder."""

    mode: Literal["pretrain", "adapt"]
    out: str
    model: ModelSettings = Field(default_factory=ModelSettings)
    adapter: AdapterSettings = Field(default_factory=AdapterSettings)
    data: DataSettings = Field(default_factory=DataSettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)

    @property
    def method(self) -> str:
        return "full" if self.mode == "pretrain" else self.adapter.method

    @property
    def learning_rate(self) -> float:
        if self.training.learning_rate is not None:
            return self.training.learning_rate
        return _LEARNING_RATES[self.method] if self.model.head else _NEW_HEADS[self.training.optimizer]

    @property
    def unused(self) -> list[str]:
        """Settings of an adapter that were given, and that the method has no use for."""
        usual = {**AdapterSettings().model_dump(), "alpha": AdapterSettings(rank=self.adapter.rank).alpha}
        return [name for name in _UNUSED_BY[self.method] if getattr(self.adapter, name) != usual[name]]

    @model_validator(mode="after")
    def _combination(self) -> RunSettings:
        model, head, size = self.model, self.model.head, self.model.draft_vocab_size
        if not self.data.data:
            raise UserError("no data given; pass --data DIR, a folder that `draft-train prepare` wrote.")
        if self.mode == "adapt" and not head:
            raise UserError("no head given; pass --head, the head to adapt (the bundled one is smollm2-eagle3).")
        if self.mode == "pretrain" and self.adapter.method != "full":
            raise UserError(f"adapter.method {self.adapter.method} is for `adapt`: `pretrain` trains all weights.")
        if self.data.general and not self.data.mix_general:
            raise UserError(
                f"general {self.data.general!r} is mixed in by mix_general, which is 0; add --mix-general 0.25, say, "
                "or leave it out."
            )
        if model.rebuild_vocabulary and self.method != "full":
            raise UserError(f"rebuild_vocabulary needs method full, not {self.method}: an adapter keeps its map.")
        if model.rebuild_vocabulary and not head:
            raise UserError("rebuild_vocabulary: a new head's is chosen from the data anyway; leave the flag out.")
        if head and model.head_options:
            raise UserError(f"head_options {model.head_options} are of a new head, and {head!r} is given; choose one.")
        if head and size and not model.rebuild_vocabulary:
            raise UserError(f"draft_vocab_size = {size}: {head!r} has one; leave it out, or add --rebuild-vocabulary.")
        if not head and size and not model.new_head_class.reduced_vocabulary:
            raise UserError(f"draft_vocab_size = {size}: {model.architecture} has the whole vocabulary; leave it out.")
        training = self.training
        if self.method != "full" and (training.optimizer != "adamw" or training.freeze_lm_head):
            what = "freeze_lm_head" if training.freeze_lm_head else f"optimizer {training.optimizer}"
            raise UserError(f"{what} is for the training of all weights, not for method {self.method}; leave it out.")
        if training.patience and not (training.keep_best and training.eval_every != 0 and training.eval_rows):
            raise UserError(
                "patience counts replays without a better one; it needs keep_best, eval_every and eval_rows."
            )
        if "none" in self.training.log_with and len(self.training.log_with) > 1:
            raise UserError(f"log_with {', '.join(self.training.log_with)}: choose trackers, or none alone.")
        _ = model.options  # refuses what the architecture does not have
        return self


def resolve(
    mode: Literal["pretrain", "adapt"],
    out: str,
    *,
    config_file: Path | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> RunSettings:
    """Settings from the mode's defaults, the YAML file, flags (None = not given), and then `section.key=value`.

    Raises:
        UserError: for an unknown section or key, or a value that is none of its key's.
    """
    values = {} if config_file is None else _read_sections(config_file)
    for key, value in (flags or {}).items():
        if value is not None:
            section = next(name for name, kind in SECTIONS.items() if key in kind.model_fields)
            values.setdefault(section, {})[key] = value
    for override in overrides:
        name, equals, text = override.partition("=")
        section, dot, key = name.partition(".")
        if not (equals and dot):
            raise UserError(f"override {override!r} is not of the form section.key=value.")
        values.setdefault(section, {})[key] = _yaml_value(override, text)
    values["training"] = {**DEFAULTS[mode], **values.get("training", {})}
    try:
        return RunSettings.model_validate({**values, "mode": mode, "out": out})
    except ValidationError as error:
        raise UserError(_sentence(error)) from error


def to_yaml(settings: RunSettings) -> str:
    return yaml.safe_dump(settings.model_dump(), sort_keys=False)


def _read_sections(path: Path) -> dict[str, Any]:
    """A configuration file; a run's resolved one has mode and out too, which the command line decides."""
    try:
        values = yaml.safe_load(path.read_text()) or {}
        return {section: dict(keys) for section, keys in values.items() if section not in ("mode", "out")}
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: 2020-13-45, which is no date, or no UTF-8
        raise UserError(f"config {str(path)!r} could not be read ({str(error).splitlines()[0]}).") from error
    except (AttributeError, TypeError) as error:
        raise UserError(
            f"config {str(path)!r} must hold sections of keys and values: {', '.join(SECTIONS)}."
        ) from error


def _yaml_value(override: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"override {override!r}: the value is not YAML; quote it.") from error


def _sentence(error: ValidationError, name: str = "") -> str:
    """The first mistake that pydantic found, with its value and the remedy."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    name = name or ".".join(path)
    if first["type"] == "extra_forbidden":
        known = list(SECTIONS if len(path) == 1 else SECTIONS[path[0]].model_fields)
        close = difflib.get_close_matches(path[-1], known)
        return f"unknown setting {name!r}; use {'one of ' * (len(close) != 1)}{', '.join(close or known)}."
    reason = first["msg"].removeprefix("Value error, ")
    return f"{name} = {first['input']!r}: {reason[0].lower()}{reason[1:]}; correct the value."
