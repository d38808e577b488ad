"""vLLM loads our exports by the command that `export` printed, and drafts our tokens. Imports nothing of ours.

    python tests/interop/check_vllm.py FOLDER TABLE

FOLDER is what `prepare` wrote; TABLE the JSON file that gets the names, shapes and keys which were loaded. Exit status
1: some head was not loaded whole, or not read as its config.json says, or drafted other tokens.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import vllm
from foreign import write_table
from safetensors.torch import load_file
from torch import Tensor, nn
from vllm import LLM, SamplingParams
from vllm.model_executor.models.llama_eagle import EagleLlamaForCausalLM
from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM
from vllm.model_executor.models.medusa import Medusa

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
# an EAGLE-3 head's flag -> how vLLM's draft model shows that it is set
FLAGS: dict[str, Callable[[Any], bool]] = {
    "norm_before_residual": lambda model: model.layers[0]._residual_norm.__name__ == "_norm_before_residual",
    "norm_before_fc": lambda model: model.input_norm is not None,
    "fc_norm": lambda model: model.fc_norm is not None,
    "norm_output": lambda model: bool(model.norm_output),
}
# keys in whose place its configuration has something of vLLM's own
REPLACED = {"architectures", "model_type", "torch_dtype"}
# tensors that no engine needs: vLLM goes by d2t, and Medusa's rows are already those of the target's vocabulary
OURS = {"Eagle3LlamaForCausalLM": {"t2d"}, "Medusa": {"d2t", "t2d"}}


def main(folder: Path, table: Path) -> int:
    """Check every export; write the table when all are good."""
    record = Record()
    rows: dict[str, Any] = {}
    failed = False
    for name, command in json.loads((folder / "commands.json").read_text()).items():
        row, problems = check(command, folder, name, record)
        failed |= bool(problems)
        print(f"{'FAIL' if problems else 'ok  '} {name:34} {'; '.join(problems)}", flush=True)
        rows[name] = row
    if not failed:
        write_table(table, "vllm", vllm.__version__, rows)
    return int(failed)


class Record:
    """Tensors that a draft model took from its file: each is looked for in the parameters right after the loading."""

    def __init__(self) -> None:
        self.file: dict[str, Tensor] = {}
        self.taken: set[str] = set()
        self.lacking: list[str] = []  # parameters that the file didn't fill
        for kind in (Eagle3LlamaForCausalLM, EagleLlamaForCausalLM, Medusa):
            kind.load_weights = self.around(kind.load_weights)

    def around(self, load: Callable[..., Any]) -> Callable[..., Any]:
        def load_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> Any:
            self.file = dict(weights)
            loaded = load(model, self.file.items())
            self.taken, self.lacking = places(self.file, dict(model.named_parameters()))
            return loaded

        return load_weights


def places(file: dict[str, Tensor], parameters: dict[str, Tensor]) -> tuple[set[str], list[str]]:
    """Return (tensors that are rows of a parameter, parameters with other rows than those and zeros)."""
    taken, lacking = set[str](), []
    for name, parameter in parameters.items():
        filled = torch.zeros(len(parameter), dtype=torch.bool)
        for key, tensor in file.items():
            if tensor.shape[1:] == parameter.shape[1:]:
                for start in starts(tensor, parameter):
                    filled[start : start + len(tensor)] = True
                    taken.add(key)
        if not filled.any() or parameter[~filled].any():
            lacking.append(name)
    return taken, lacking


def starts(tensor: Tensor, parameter: Tensor) -> list[int]:
    """Return the rows of a parameter at which all of a tensor begins."""
    rows = range(len(parameter) - len(tensor) + 1)
    return [row for row in rows if torch.equal(parameter[row : row + len(tensor)], tensor.to(parameter.dtype))]


def check(command: str, folder: Path, name: str, record: Record) -> tuple[dict[str, Any], list[str]]:
    """Return (a row of the table, the problems)."""
    llm = start(command)
    runner = llm.collective_rpc(lambda worker: worker.model_runner)[0]
    model, speculative = runner.drafter.model, llm.llm_engine.vllm_config.speculative_config
    text = (folder / name / "config.json").read_text()
    written, read = json.loads(text), speculative.draft_model_config.hf_config
    row = {
        "command": command.replace(str(folder), "FOLDER"),
        "class": type(model).__name__,
        "tensors": {name: list(value.shape) for name, value in sorted(record.file.items())},
        "config": json.loads(text.replace(str(folder), "FOLDER")),
    }
    left = set(record.file) - record.taken - OURS.get(row["class"], set())
    problems = [f"{name} was not taken" for name in sorted(left)]
    problems += [f"{name} is not filled" for name in record.lacking if not shared(runner, name)]
    for key, value in (written | written.get("transformer_layer_config", {})).items():
        if value is not None and key not in REPLACED and getattr(read, key, value) != value:
            problems.append(f"{key} is {getattr(read, key)}")
    if row["class"] == "Eagle3LlamaForCausalLM":
        row["flags"] = {flag: shows(model.model) for flag, shows in FLAGS.items()}
        row["auxiliary_layers"] = list(runner.model.model.aux_hidden_state_layers)
        problems += [f"{flag} is {value}" for flag, value in row["flags"].items() if value != written.get(flag, False)]
        layers = runner.model.config.num_hidden_layers
        if row["auxiliary_layers"] != (written.get(LAYER_IDS) or [2, layers // 2, layers - 3]):
            problems.append(f"the auxiliary layers are {row['auxiliary_layers']}")
    return row, problems + compare(llm, runner.drafter, load_file(folder / f"{Path(name).name}.safetensors"))


def start(command: str) -> LLM:
    """Load in this process what `vllm serve MODEL [--speculative-config JSON]` loads."""
    model, *rest = shlex.split(command)[2:]
    options: dict[str, Any] = {"speculative_config": json.loads(rest[1])} if rest else {}
    return LLM(
        model=model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=1,
        max_num_batched_tokens=256,
        enable_prefix_caching=False,
        disable_log_stats=False,
        seed=0,
        **options,
    )


def shared(runner: Any, name: str) -> bool:
    """Return True when a parameter of the draft model is one of the target's."""
    place = name.rpartition(".")[0]
    try:
        module = runner.drafter.model.get_submodule(place)
    except AttributeError:
        return False
    return any(module is each for each in runner.model.modules())


def compare(llm: LLM, drafter: Any, case: dict[str, Tensor]) -> list[str]:
    """Decode, and walk the text as vLLM did: its drafts after each verification have to be ours."""
    theirs: list[list[int]] = []
    propose = drafter.propose

    def recorded(*arguments: Any, **options: Any) -> Tensor:
        theirs.append((drafted := propose(*arguments, **options))[0].tolist())
        return drafted

    drafter.propose = recorded
    ours, text, prompt = (case[name].tolist() for name in ("drafts", "text", "prompt"))
    sampling = SamplingParams(temperature=0, max_tokens=len(ours), ignore_eos=True, detokenize=False)
    output = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0].outputs[0]
    if list(output.token_ids) != text[: len(ours)]:
        return ["the text is not the target's greedy one"]
    others, last = [], 0
    for drafted in theirs:
        if last >= len(ours) - 1:
            break
        if drafted != ours[last]:
            others.append(f"after token {last} it drafts {drafted}, and we {ours[last]}")
        right = [one == other for one, other in zip(drafted, text[last + 1 :], strict=False)]
        last += [*right, False].index(False) + 1
    if last < len(ours) - 1:
        return [f"it drafted up to token {last} only"]
    return [f"{len(others)} of {len(theirs)} drafts differ: {others[0]}"] if others else []


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
