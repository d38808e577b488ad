"""The target: the model whose output a draft head predicts and the engine reproduces."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from draft.errors import UserError
from draft.target.adapter import Adapter, merge_into_target, read_adapter, warn_of_other_template
from draft.target.bundled import BUNDLED_TARGET, bundled_target_folder, dequantise_options
from draft.target.support import (
    LoadReport,
    check_code,
    check_config,
    check_loaded,
    check_model,
    check_numbers,
    decoder_of,
    rope_limit,
    weight_files,
)
from draft.target.template import render_template, template_hash, template_of
from draft.target.text import TextTarget

log = logging.getLogger(__name__)


def load_target(
    name: str, dtype: str | torch.dtype = "auto", device: str = "auto", adapter: str | Path | None = None
) -> Target:
    """Load a target: a hub id, a folder, a `.gguf` file, or `smollm2`, the bundled default.

    dtype "auto" takes the checkpoint's own on an accelerator and the faster of bfloat16 and float32 on a CPU.
    adapter: folder of a PEFT LoRA adapter, which is merged into the weights in memory.

    Raises:
        UserError: when it cannot be found, is of an architecture that heads cannot be attached to, needs code of its
            own, is quantised, incomplete, not finite or larger than the device, or when the adapter is not one for it.
    """
    from transformers import AutoConfig

    place = resolve_device(device)
    wanted = resolve_dtype(dtype, place)
    tokenizer = load_tokenizer(name)
    source, options = locate(name)
    with _loading(name):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
    if config.get_text_config() is not config:
        log.info("target %r is a model of text and other media: its text part is used", name)
    files: list[Path] = []
    if not options:  # a GGUF file's layers are known once it is read, and are dequantised
        check_config(name, config)
        check_numbers(name, config)
        check_model(name, config, wanted, place)
        with _loading(name):  # nothing is downloaded that does not fit
            files = weight_files(name, _finder(source))
    found = read_adapter(adapter) if adapter is not None else None
    if found is not None:
        warn_of_other_template(found, tokenizer)
    model = load_model(name, wanted, files).to(place)
    target = Target(name, model, tokenizer, config.dtype)
    if target.rope_limit:
        log.info("%s", target.limit_reason)
    if found is not None:
        model, merged = merge_into_target(target.model, found, target.title, target.fingerprint)
        target = Target(name, model, tokenizer, target.stored_dtype, merged)
    return target


def load_model(name: str, dtype: torch.dtype | str, files: Sequence[Path]) -> Any:
    """The model of a target on the CPU, whole and finite; names and errors as in `load_target`.

    files: of its weights, safetensors.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar, get_logger

    source, options = locate(name)
    logger, report = get_logger("transformers.modeling_utils"), LoadReport()
    logger.addFilter(report)
    if not sys.stderr.isatty():
        disable_progress_bar()  # a log would hold each of its states
    try:
        with _loading(name):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True,
                ignore_mismatched_sizes=True, **options, **dequantise_options(options),
            )  # fmt: skip
    except UserError as error:
        if report.unmade is None:
            raise
        raise UserError(
            f"target {name!r}: tensor {report.unmade} cannot be made of its parts, of which some are missing or of "
            "another shape; get the whole model, or correct its config.json."
        ) from error
    finally:
        logger.removeFilter(report)
    model, info = loaded
    check_loaded(name, model, info, files)
    return model


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a target, without its weights; names and errors as in `load_target`."""
    from transformers import AutoTokenizer

    source, options = locate(name)
    with _loading(name):
        if not options:
            check_code(name, _finder(source))
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)


def load_text_target(name: str, chat_template: str | None = None) -> TextTarget:
    """The texts of a target, without its weights; names and errors as in `load_target`.

    chat_template: instead of the tokenizer's.
    """
    from transformers import AutoConfig, GenerationConfig

    tokenizer = load_tokenizer(name)
    source, options = locate(name)
    with _loading(name):
        whole = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
    generation = None
    if not options:
        with suppress(OSError):  # it has none
            generation = GenerationConfig.from_pretrained(source)
    config = whole.get_text_config()
    target = TextTarget(name, tokenizer, config, config.vocab_size, generation)
    if chat_template is not None:
        target.use_chat_template(chat_template)
    return target


def _finder(source: str) -> Callable[[str], str | None]:
    """A function that gives the path of one of the target's files by its name; None where it has none of that name."""
    from transformers.utils import cached_file

    def find(file: str) -> str | None:
        if Path(source).is_dir():
            return str(Path(source, file)) if Path(source, file).is_file() else None
        return cached_file(source, file, _raise_exceptions_for_missing_entries=False)

    return find


def locate(name: str) -> tuple[str, dict[str, str]]:
    """The arguments of `from_pretrained` for a target's name."""
    if name == BUNDLED_TARGET:
        return str(bundled_target_folder()), {}
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"target {name!r}: no such file; give the path of an existing .gguf file.")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"target {name!r}: the folder has no config.json; give a folder that save_pretrained wrote.")
    return str(path) if path.is_dir() else name, {}


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turn what transformers raises about the target's files, which may be anything, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, KeyError):  # of one of transformers' tables
            reason = f"it has no {reason}"
        if isinstance(error, OSError) and not Path(name).expanduser().exists():
            raise UserError(
                f"target {name!r} is neither a folder here nor reachable on the hub ({reason}); on a machine with "
                f"network run `hf download {name}`, or pass a local folder, a .gguf file or `{BUNDLED_TARGET}`."
            ) from error
        raise UserError(
            f"target {name!r} could not be loaded ({reason}); get its files again, or pass a causal language "
            "model that transformers supports."
        ) from error


class Target(TextTarget):
    """A causal language model with its tokenizer and chat template.

    Layer ids count decoder layers that have run: id k is the residual stream that enters layer k (0-based), and
    id n (the number of layers) the stream after the last one, before the final norm. This is vLLM's convention. Id
    n + 1 (`output_layer`) is ours: the stream after the final norm, which the LM head reads.
    """

    def __init__(
        self, name: str, model: Any, tokenizer: Any, dtype: torch.dtype | None = None, adapter: Adapter | None = None
    ) -> None:
        """dtype: of the checkpoint; adapter: merged into the model, which is otherwise the one called `name`."""
        self.decoder = decoder_of(name, model)
        config, lm_head = model.config.get_text_config(), model.get_output_embeddings()
        generation = getattr(model, "generation_config", None)
        super().__init__(name, tokenizer, config, lm_head.out_features, generation, adapter)
        self.lock = threading.RLock()  # of the model: a pass changes how it attends, and hooks its layers
        # the dtype of the checkpoint, in which heads for it are saved too; `dtype` is that of computing
        self.stored_dtype = dtype or model.dtype
        self.model = model.eval().requires_grad_(False)
        if getattr(self.config, "attn_logit_softcapping", None) and self.config._attn_implementation == "sdpa":
            model.set_attn_implementation("eager")  # sdpa cannot bound scores
        if model.dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # grouped products know narrower dtypes only
        # Granite divides its logits by one number, Cohere multiplies them by another
        self.logit_scale: float = getattr(self.config, "logit_scale", None) or 1.0
        self.logit_scale /= getattr(self.config, "logits_scaling", None) or 1.0
        self.embedding: nn.Embedding = model.get_input_embeddings()
        self.lm_head: nn.Linear = lm_head
        self._rows: tuple[Tensor, Tensor] | None = None  # a vocabulary, and the LM head's rows of it
        self.hidden_size: int = self.config.hidden_size
        self.num_layers = n = len(self.decoder.layers)
        self.default_auxiliary_layers = (2, n // 2, n - 3)  # as vLLM and SGLang choose them
        self.output_layer = self.num_layers + 1  # the id of the last hidden states, after the final norm
        # tokens of context that it can be used with here: fewer than stated where its rotary embedding changes
        self.rope_limit = rope_limit(self.config)
        self.max_length = min(self.stated_length, self.rope_limit[1]) if self.rope_limit else self.stated_length

    @property
    def architecture(self) -> str:
        return type(self.model).__name__

    @property
    def base_fingerprint(self) -> str:
        """The fingerprint without the adapter, where there is one."""
        return self.adapter.base_fingerprint if self.adapter else self.fingerprint

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    def forward(self, input_ids: Tensor, *, layers: Sequence[int] = (), **options: Any) -> TargetOutput:
        """One forward pass without the LM head (see `logits`), capturing the residual stream at `layers`.

        input_ids: [batch, tokens]; options: attention_mask, position_ids, past_key_values as transformers takes them.

        Raises:
            UserError: for more tokens than the rotary embedding of such a target treats alike.
        """
        if self.rope_limit and input_ids.shape[1] > self.max_length:
            raise UserError(f"{input_ids.shape[1]} tokens: {self.limit_reason}; leave longer texts out.")
        captured: dict[int, Tensor] = {}
        use_cache = options.get("past_key_values") is not None
        with self.lock, capture_hidden_states(self.decoder, layers, captured):
            output = self.decoder(input_ids=input_ids, use_cache=use_cache, **options)
        auxiliary = torch.cat([captured[layer] for layer in layers], dim=-1) if layers else None
        return TargetOutput(output.last_hidden_state, auxiliary, tuple(layers))

    @property
    def limit_reason(self) -> str:
        """The sentence that gives the limit of texts, `max_length`, and its cause."""
        context = f"the context of target {self.title} is {self.max_length} tokens"
        if not self.rope_limit:
            return context
        kind = self.rope_limit[0]
        return f"{context}, since its {kind} rotary embedding gives other states beyond for all tokens of a batch"

    def logits(self, last_hidden: Tensor, vocabulary: Tensor | None = None) -> Tensor:
        """Logits [..., vocab] of normalised hidden states [..., hidden]; only the rows `vocabulary` when given."""
        if vocabulary is None:
            scores = self.lm_head(last_hidden)
        else:
            if self._rows is None or self._rows[0] is not vocabulary:  # a head reads the same ones at every batch
                self._rows = vocabulary, self.lm_head.weight[vocabulary].contiguous()
            bias = self.lm_head.bias
            scores = nn.functional.linear(last_hidden, self._rows[1], None if bias is None else bias[vocabulary])
        scores = scores * self.logit_scale
        cap = getattr(self.config, "final_logit_softcapping", None)
        return scores if cap is None else torch.tanh(scores / cap) * cap

    @cached_property
    def fingerprint(self) -> str:
        """Identifies weights, tokenizer and its template together, whatever dtype or device they were loaded to.

        (In float16 that holds for checkpoints stored in half precision; wider ones are rounded twice.)

        Of each weight up to 8192 evenly spread elements are hashed, in bfloat16: a change of training touches
        them all, and a large model is fingerprinted in seconds. An adapter counts by its file: what merging makes of
        the weights depends on the dtype.
        """
        if self.adapter:
            return self.adapter.fingerprint
        digest = hashlib.sha256(template_hash(self.tokenizer.chat_template).encode())
        digest.update(json.dumps(sorted(self.tokenizer.get_vocab().items())).encode())
        for name, weight in sorted(self.model.named_parameters()):
            flat = weight.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 8192)].to("cpu", torch.bfloat16)
            sample = sample.masked_fill(sample.abs() < 2**-14, 0)  # float16 cannot hold smaller ones exactly
            digest.update(f"{name}{tuple(weight.shape)}".encode())
            digest.update(sample.view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class TargetOutput:
    """The result of one forward pass of the target."""

    last_hidden: Tensor  # [batch, tokens, hidden], after the final norm: what the LM head reads
    auxiliary: Tensor | None  # [batch, tokens, layers * hidden], residual stream entering the chosen layers
    layers: tuple[int, ...] = ()  # the chosen layers

    def states_of(self, layers: Sequence[int]) -> Tensor:
        """`auxiliary` of some of the chosen layers only: [batch, tokens, len(layers) * hidden]."""
        assert self.auxiliary is not None
        if tuple(layers) == self.layers:
            return self.auxiliary
        states = dict(zip(self.layers, self.auxiliary.chunk(len(self.layers), dim=-1), strict=True))
        return torch.cat([states[layer] for layer in layers], dim=-1)


def render_chat(tokenizer: Any, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    """A conversation as text under the tokenizer's chat template."""
    template = template_of(tokenizer)
    return render_template(tokenizer, template, messages, generation_prompt=add_generation_prompt)


@contextmanager
def capture_hidden_states(decoder: nn.Module, layers: Sequence[int], into: dict[int, Tensor]) -> Iterator[None]:
    """Store the residual stream entering each of `layers` in `into` while the block runs.

    Index n is taken before the final norm, where vLLM takes it; transformers' own `output_hidden_states` would
    give it normalised. Index n + 1 is after it.
    """

    def store(layer: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            into[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    modules = [*decoder.layers, decoder.norm]  # type: ignore[misc]
    entered = [layer for layer in layers if layer < len(modules)]
    handles = [modules[layer].register_forward_pre_hook(store(layer), with_kwargs=True) for layer in entered]
    if len(modules) in layers:
        handles.append(modules[-1].register_forward_hook(lambda _, args, output: into.update({len(modules): output})))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def attending_by(target: Target, implementation: str) -> Iterator[None]:
    """Let the decoder attend by a function that is registered with transformers, while the block runs.

    No other pass of the same target begins meanwhile, in whatever thread.
    """
    config = target.decoder.config
    with target.lock:
        before = config._attn_implementation
        config._attn_implementation = implementation
        try:
            yield
        finally:
            config._attn_implementation = before


# ---- device and dtype ----


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def resolve_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} is not there on this machine; use auto, cpu or cuda.") from error
    return place


def wait_for(device: torch.device) -> None:
    """Wait until the device has done its work, so that a clock may be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_of_process(device: str) -> str:
    """`auto` under a launcher of several processes: each its own GPU, where there are as many."""
    rank = os.environ.get("LOCAL_RANK", "")
    if device == "auto" and rank.isdecimal() and int(rank) < torch.cuda.device_count():
        return f"cuda:{rank}"
    return device


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype | str:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return fastest_cpu_dtype() if device.type == "cpu" else "auto"
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; choose one of auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]


@lru_cache
def fastest_cpu_dtype() -> torch.dtype:
    """bfloat16 where the CPU multiplies it natively, else float32: without AVX-512 or AMX it is ten times slower."""

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(128, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        timings = []
        for _ in range(4):
            start = time.perf_counter()
            a @ b
            timings.append(time.perf_counter() - start)
        return min(timings)

    return torch.bfloat16 if seconds(torch.bfloat16) < seconds(torch.float32) else torch.float32
