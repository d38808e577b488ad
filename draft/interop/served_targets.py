"""Beside which targets other engines serve which heads: tables read out of their sources.

vLLM 0.32.0 asks a target's class for the interface SupportsEagle3 before it loads an EAGLE-3 head, and SGLang 0.5.23
for the method set_eagle3_layers_to_capture; both also count what a class inherits. For EAGLE-1 and Medusa heads, which
read nothing but the last hidden state, neither asks anything. The names are of config.json's `architectures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_VLLM_EAGLE3 = frozenset(
    """
    AfmoeForCausalLM ApertusForCausalLM Cohere2MoeForCausalLM CohereCompassForConditionalGeneration
    Cosmos3ForConditionalGeneration DeepseekForCausalLM DeepseekV2ForCausalLM DeepseekV32ForCausalLM
    DeepseekV3ForCausalLM DeepseekV41ForCausalLM DeepseekV4ForCausalLM DeepseekV4ForConditionalGeneration
    Ernie4_5ForCausalLM Exaone4_5_ForConditionalGeneration Gemma4ForCausalLM Gemma4ForConditionalGeneration
    Gemma4UnifiedForConditionalGeneration Glm5NextForCausalLM Glm5NextForConditionalGeneration
    GlmMoeDsaForCausalLM GptOssForCausalLM GraniteForCausalLM GraniteSWAForCausalLM IQuestCoderForCausalLM
    InternLM3ForCausalLM InternS1ProForConditionalGeneration InternS2MobiusForConditionalGeneration
    InternS2PreviewForConditionalGeneration K2HorizonForCausalLM KimiK25ForConditionalGeneration
    KimiK3ForConditionalGeneration KimiLinearForCausalLM LLaMAForCausalLM LagunaForCausalLM
    LightOnOCRForConditionalGeneration Llama4ForCausalLM Llama4ForConditionalGeneration LlamaForCausalLM
    LlavaForConditionalGeneration MiMoForCausalLM MiMoV2FlashForCausalLM MiMoV2ForCausalLM MiMoV2OmniForCausalLM
    MiniCPM3ForCausalLM MiniCPMForCausalLM MiniCPMV4_6ForConditionalGeneration
    MiniCPMV4_7ForConditionalGeneration MiniMaxM2ForCausalLM MiniMaxM3SparseForCausalLM
    MiniMaxM3SparseForConditionalGeneration Ministral3ForCausalLM Mistral3ForConditionalGeneration
    MistralForCausalLM MistralLarge3ForCausalLM MuseGlimmerForCausalLM MuseGlimmerForConditionalGeneration
    NemotronHForCausalLM NemotronHPuzzleForCausalLM NemotronH_Nano_Omni_Reasoning_V3 NemotronH_Nano_VL_V2
    NemotronH_Omni_Reasoning_V3 NemotronH_Super_Omni_Reasoning_V3 OpenCUAForConditionalGeneration
    Phi3ForCausalLM PixtralForConditionalGeneration Plamo3ForCausalLM Qwen2ForCausalLM
    Qwen2_5_VLForConditionalGeneration Qwen3ASRForConditionalGeneration Qwen3ASRRealtimeGeneration
    Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen3NextForCausalLM Qwen3OmniMoeForConditionalGeneration
    Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration Qwen3_5ForCausalLM
    Qwen3_5ForConditionalGeneration Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration
    Qwen4ExpForConditionalGeneration SarvamMLAForCausalLM Step1ForCausalLM TeleChat2ForCausalLM
    TeleChat3ForCausalLM TeleFLMForCausalLM
    """.split()  # noqa: SIM905
)
_SGLANG_EAGLE3 = frozenset(
    """
    ApertusForCausalLM BailingMoEForCausalLM BailingMoeForCausalLM BailingMoeV2ForCausalLM
    Cosmos3ForConditionalGeneration DeepseekV2ForCausalLM DeepseekV32ForCausalLM DeepseekV3ForCausalLM
    ExaoneMoEForCausalLM ExaoneMoeForCausalLM Gemma3ForCausalLM Gemma3ForConditionalGeneration Gemma4ForCausalLM
    Gemma4ForConditionalGeneration Gemma4UnifiedForConditionalGeneration Glm4MoeForCausalLM
    Glm4MoeLiteForCausalLM Glm5NextForConditionalGeneration GlmMoeDsaForCausalLM GptOssForCausalLM
    IQuestCoderForCausalLM InternLM3ForCausalLM InternS1ProForConditionalGeneration
    InternS2MobiusForConditionalGeneration InternS2PreviewForConditionalGeneration
    KimiK25ForConditionalGeneration Llama4ForCausalLM Llama4ForConditionalGeneration LlamaForCausalLM
    LongcatFlashForCausalLM MellumForCausalLM MiniMaxM2ForCausalLM MiniMaxM3SparseForCausalLM
    MiniMaxM3SparseForConditionalGeneration Ministral3ForCausalLM MistralForCausalLM MistralLarge3ForCausalLM
    Phi3ForCausalLM Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen2_5_VLForConditionalGeneration Qwen3ForCausalLM
    Qwen3MoeForCausalLM Qwen3NextForCausalLM Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration
    Qwen3_5ForCausalLM Qwen3_5ForConditionalGeneration Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration
    Qwen4ExpForConditionalGeneration SarvamMoEForCausalLM TeleFLMForCausalLM
    """.split()  # noqa: SIM905
)
# method -> engine, as the commands of an export call it -> its release, and the architectures that it accepts
_ACCEPTED: dict[str, dict[str, tuple[str, frozenset[str]]]] = {
    "eagle3": {"vLLM": ("0.32", _VLLM_EAGLE3), "SGLang": ("0.5.23", _SGLANG_EAGLE3)},
}


def accepted_by(
    commands: Mapping[str, str], architecture: str, about: Mapping[str, Any], method: str = "eagle3"
) -> tuple[dict[str, str], list[str]]:
    """Of the commands of an export, by engine, those that work beside such a target, and what a user must know.

    architecture: of the target's config.json; about: the head's draftsmith.json; method: the kind of head.
    """
    kept, notes = dict(commands), []
    for engine, (release, architectures) in _ACCEPTED.get(method, {}).items():
        if engine in kept and architecture not in architectures:
            del kept[engine]
            notes.append(
                f"{engine} {release} serves no {method} head beside {architecture}, so there is no command for it; "
                "draft-serve does."
            )
        elif engine in kept:
            notes.append(f"{engine} {release} serves {method} heads beside {architecture}.")
    if about.get("target_adapter"):
        notes.append(
            f"The head is for the target with its adapter {about['target_adapter']!r}: let these engines serve the two "
            "merged (PEFT's merge_and_unload, then save_pretrained), or most drafts are rejected."
        )
    return kept, notes
