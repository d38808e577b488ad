"""vLLM decodes the bundled target with our exported head, greedily. Imports nothing of ours.

    python tests/interop/run_vllm.py FOLDER

FOLDER/prompts.json (`compare_engines prepare` wrote it) names target, head, K, the tokens per prompt and the prompts'
token ids; FOLDER/result.json gets the texts and the counts. One generation is counted; a second one, which isn't,
continues each text by a few tokens, so that the drafts of its last verification can be judged too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import vllm
from foreign import COUNTS, write_result
from vllm import LLM, SamplingParams


def main(folder: Path) -> None:
    """Decode, and write what came out."""
    job = json.loads((folder / "prompts.json").read_text())
    speculative = {"method": "eagle3", "model": job["head"], "num_speculative_tokens": job["speculation_length"]}
    llm = LLM(
        model=job["target"],
        dtype="float32",  # in half precision the texts of two engines differ
        speculative_config=speculative,
        enforce_eager=True,
        max_model_len=job["max_length"],
        max_num_seqs=16,
        enable_prefix_caching=False,
        disable_log_stats=False,
        seed=0,
    )
    texts = decode(llm, job["prompts"], job["tokens"])
    metrics = {metric.name.removeprefix("vllm:spec_decode_"): metric for metric in llm.get_metrics()}
    counts = {name: metrics[name].value for name in COUNTS}  # accepted tokens before a text is trimmed to its length
    longer = [prompt + text for prompt, text in zip(job["prompts"], texts, strict=True)]
    beyond = decode(llm, longer, job["speculation_length"] + 1)
    rest = {"trimmed": False, "texts": texts, "beyond": beyond, "forbidden": []}
    write_result(folder, "vLLM", vllm.__version__, counts, **rest)


def decode(llm: LLM, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """`tokens` greedy tokens after each prompt, EOS or not."""
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
    return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
