"""Tiny random models of the bundled target's family: fast enough for float64 and thousands of cases."""

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.shared import cores
from draft.heads.registry import ARCHITECTURES
from draft.target import Target

ROOT = Path(__file__).parents[1]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# of tiny models of every family
SHAPE: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "initializer_range": 0.2,
}
# the same cases in every run, on machines of any speed
settings.register_profile(
    "suite", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")
MOST_WORKERS = 4  # of `pytest -n auto`: a process that has loaded torch and models takes some 2 GB


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One process for each core that this one may use; a container may have fewer than the machine."""
    return min(cores(), MOST_WORKERS)


def pytest_configure() -> None:
    """Share the cores among the processes of pytest-xdist: PyTorch's threads stall when others take their cores."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        threads = max(1, torch.get_num_threads() // workers)
        torch.set_num_threads(threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # for the servers and programs that tests start


def pytest_collection_finish() -> None:
    """Keep what was imported out of each collection of garbage, which takes most of a second with it."""
    gc.freeze()


def python(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """An interpreter of its own that finds our packages, with one pipe for all that it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", **environment}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *arguments], env=environment, cwd=ROOT, **pipes)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit status, and all that it printed."""
    try:
        shown = process.communicate(timeout=280)[0]
    finally:
        process.kill()
    return process.returncode, shown


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes plus three chat tokens: ids 0 = end of text, 1 = <|im_start|>, 2 = <|im_end|> (EOS), 3.. = bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    vocabulary.update({symbol: index + 3 for index, symbol in enumerate(alphabet)})
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    fast.chat_template = TEMPLATE
    return fast


def make_tiny_target(
    seed: int = 0, dtype: torch.dtype = torch.float64, max_length: int = 512, **options: Any
) -> Target:
    """A random Llama of 8 layers over the byte vocabulary, with logits wide enough that greedy text is not constant.

    options: fields of its configuration.
    """
    torch.manual_seed(seed)
    own = {"max_position_embeddings": max_length, "tie_word_embeddings": True, **options}
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **own})).to(dtype)
    return Target("tiny", model, byte_tokenizer())


def make_writing_target() -> Target:
    """A float32 tiny target that writes lower-case words, and ends its turns."""
    made = make_tiny_target(dtype=torch.float32)
    head = torch.nn.Linear(32, 259).requires_grad_(False)
    head.weight.copy_(made.lm_head.weight)
    head.bias.fill_(-1e4)
    letters = made.tokenizer("abcdefghijklmnopqrstuvwxyz", add_special_tokens=False).input_ids
    head.bias[letters] = 0.0
    head.bias[made.tokenizer(" ", add_special_tokens=False).input_ids + [2]] = 2.0
    made.lm_head = made.model.lm_head = head
    return made


def save_target(folder: Path, target: Target) -> Target:
    """Write a target to `folder` as a user would have it."""
    target.model.save_pretrained(folder)
    target.tokenizer.save_pretrained(folder)
    return target


def save_tiny_target(folder: Path, **options: Any) -> Target:
    """A float32 tiny target, also written to `folder`."""
    return save_target(folder, make_tiny_target(dtype=torch.float32, **options))


def make_tiny_head(
    target: Target, seed: int = 0, draft_vocab_size: int = 200, architecture: str = "eagle3", **options: Any
) -> Any:
    """A random head over the first `draft_vocab_size` tokens (EAGLE-1: over all), in the target's dtype.

    options: fields of its configuration.
    """
    torch.manual_seed(seed)
    entry = ARCHITECTURES[architecture]
    size = draft_vocab_size if entry.reduced_vocabulary else target.vocab_size
    head = entry(entry.config_class.for_target(target, size, **options))
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
        for step, lm_head in enumerate(head.lm_head_modules.values()):
            lm_head.weight.copy_(target.lm_head.weight[:size] * (1 + step / 10))  # no two are the same
    head.set_vocabulary(torch.arange(size))
    head.use_target_lm_head(target)
    return head.to(target.dtype).eval()


@pytest.fixture
def draft_train(monkeypatch, capsys):
    """`draft-train` in this process: its words -> exit status, and everything printed."""
    from draft.cli import main

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["draft-train", *map(str, words)])
        status: Any = 0
        try:
            main()
        except SystemExit as stop:
            status = stop.code or 0
        return status, "".join(capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def tiny_target():
    return make_tiny_target()


@pytest.fixture(scope="session")
def tiny_head(tiny_target):
    return make_tiny_head(tiny_target)
