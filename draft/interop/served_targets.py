"""Beside which targets other engines serve which heads: tables read out of their sources.

vLLM 0.32.0 asks a target's class for the interface SupportsEagle3 before it loads an EAGLE-3 head, and SGLang 0.5.23
for the method set_eagle3_layers_to_capture; both also count what a class inherits. llama.cpp b11434 stops where a
target's graph does not keep its layers' inputs. For EAGLE-1, vLLM takes the embedding from `model.embed_tokens` or
`model.embedding`, and SGLang from the method get_embed_and_head. Medusa heads read nothing but the last hidden state,
and vLLM asks nothing; FasterDecoding's own code knows two kinds of models. The names are of config.json's
`architectures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
_LLAMA_CPP_EAGLE3 = frozenset(
    """
    BailingMoeV3ForCausalLM BailingMoeV3VLForConditionalGeneration DeepseekV4ForCausalLM Gemma4ForCausalLM
    Gemma4ForConditionalGeneration Gemma4UnifiedForConditionalGeneration GptOssForCausalLM
    HunYuanVLForConditionalGeneration IQuestCoderForCausalLM InternLM3ForCausalLM JanusForConditionalGeneration
    LFM2ForCausalLM LLaMAForCausalLM Lfm2ForCausalLM LlamaForCausalLM LlavaForConditionalGeneration
    MiMoV2FlashForCausalLM MiMoV2ForCausalLM MiniCPMV4_6ForConditionalGeneration MiniMaxM2ForCausalLM
    MistralForCausalLM MixtralForCausalLM MuseGlimmerForConditionalGeneration NanbeigeForCausalLM
    NemotronHForCausalLM Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen3NextForCausalLM Qwen3_5ForCausalLM
    Qwen3_5ForConditionalGeneration Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration Qwen4ExpForCausalLM
    Qwen4ExpForConditionalGeneration Sarashina2VisionForCausalLM StepVLForConditionalGeneration
    VLlama3ForCausalLM VoxtralForConditionalGeneration
    """.split()  # noqa: SIM905
)
# whose embedding is where an EAGLE-1 draft model borrows it
_VLLM_EAGLE1 = frozenset(
    """
    AfmoeForCausalLM ApertusForCausalLM Cohere2ForCausalLM Cohere2MoeForCausalLM CohereForCausalLM
    DeciLMForCausalLM Ernie4_5ForCausalLM Ernie4_5_MoeForCausalLM Exaone4ForCausalLM ExaoneMoEForCausalLM
    ExaoneMoeForCausalLM FalconH1ForCausalLM Glm4ForCausalLM Glm4MoeForCausalLM Glm4MoeLiteForCausalLM
    GptOssForCausalLM GraniteForCausalLM GraniteMoeForCausalLM GraniteMoeHybridForCausalLM
    GraniteMoeSWAForCausalLM GraniteMoeSharedForCausalLM GraniteSWAForCausalLM HYV3ForCausalLM
    HrmTextForCausalLM HyperCLOVAXForCausalLM IQuestCoderForCausalLM IQuestLoopCoderForCausalLM
    InternLM3ForCausalLM JambaForCausalLM K2HorizonForCausalLM LLaMAForCausalLM LagunaForCausalLM
    Lfm2ForCausalLM Lfm2MoeForCausalLM Llama4ForCausalLM LlamaForCausalLM LongcatFlashForCausalLM
    LongcatFlashNgramForCausalLM MiMoForCausalLM MiMoV2FlashForCausalLM MiMoV2ForCausalLM MiniCPMForCausalLM
    MiniMaxM2ForCausalLM Ministral3ForCausalLM MistralForCausalLM MixtralForCausalLM MuseGlimmerForCausalLM
    NemotronForCausalLM NemotronHForCausalLM NemotronHPuzzleForCausalLM OlmoHybridForCausalLM OlmoeForCausalLM
    OrionForCausalLM PanguEmbeddedForCausalLM PanguProMoEV2ForCausalLM PanguUltraMoEForCausalLM
    Param2MoEForCausalLM Phi3ForCausalLM PhiMoEForCausalLM Plamo3ForCausalLM Qwen2ForCausalLM
    Qwen2MoeForCausalLM Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen3NextForCausalLM Qwen3_5ForCausalLM
    Qwen3_5MoeForCausalLM Rnj1ForCausalLM SarvamMLAForCausalLM SolarForCausalLM StableLmForCausalLM
    Step1ForCausalLM Step3TextForCausalLM Step3p5ForCausalLM TeleChat2ForCausalLM TeleChat3ForCausalLM
    TeleFLMForCausalLM Zamba2ForCausalLM
    """.split()  # noqa: SIM905
)
# what was looked at and has it elsewhere
_VLLM_NO_EAGLE1 = frozenset(
    """
    BailingMoeForCausalLM BailingMoeV2ForCausalLM BloomForCausalLM ChatGLMModel DbrxForCausalLM
    ExaoneForCausalLM FalconForCausalLM FalconMambaForCausalLM GPT2LMHeadModel GPTJForCausalLM
    InternLM2ForCausalLM Mamba2ForCausalLM MambaForCausalLM OPTForCausalLM
    """.split()  # noqa: SIM905
)
_SGLANG_EAGLE1 = frozenset(
    """
    ApertusForCausalLM BailingMoEForCausalLM BailingMoeForCausalLM BailingMoeV2ForCausalLM
    BailingMoeV2_5ForCausalLM BailingMoeV3ForCausalLM Cosmos3ForConditionalGeneration DeepseekV2ForCausalLM
    DeepseekV32ForCausalLM DeepseekV3ForCausalLM DeepseekV4ForCausalLM Dots3NoteForCausalLM DotsOCRForCausalLM
    Ernie4_5_ForCausalLM Ernie4_5_MoeForCausalLM Exaone4ForCausalLM ExaoneMoEForCausalLM ExaoneMoeForCausalLM
    FalconH1ForCausalLM GigaChat35ForCausalLM Glm4ForCausalLM Glm4MoeForCausalLM Glm4MoeLiteForCausalLM
    Glm4vForConditionalGeneration Glm4vMoeForConditionalGeneration Glm5NextForConditionalGeneration
    GlmMoeDsaForCausalLM GlmOcrForConditionalGeneration GptOssForCausalLM HYV3ForCausalLM HYV4ForCausalLM
    IQuestCoderForCausalLM IQuestQ1ForCausalLM InklingForConditionalGeneration InternLM3ForCausalLM
    InternS1ProForConditionalGeneration InternS2MobiusForConditionalGeneration
    InternS2PreviewForConditionalGeneration KimiK25ForConditionalGeneration LagunaForCausalLM
    LightOnOCRForConditionalGeneration Llama4ForCausalLM Llama4ForConditionalGeneration LlamaForCausalLM
    LlavaForConditionalGeneration LlavaLlamaForCausalLM LlavaMistralForCausalLM LlavaQwenForCausalLM
    LongcatFlashForCausalLM MellumForCausalLM MiDashengLMModel MiMoForCausalLM MiMoV2ASRForCausalLM
    MiMoV2FlashForCausalLM MiMoV2ForCausalLM MindSporeForCausalLM MiniMaxM2ForCausalLM
    MiniMaxM3SparseForCausalLM MiniMaxM3SparseForConditionalGeneration Ministral3ForCausalLM
    Mistral3ForConditionalGeneration MistralForCausalLM MistralLarge3ForCausalLM NanbeigeForCausalLM
    NemotronHForCausalLM NemotronHPuzzleForCausalLM NemotronH_Nano_Omni_Reasoning_V3 NemotronH_Nano_VL_V2
    NemotronH_Omni_Reasoning_V3 OPTForCausalLM PaddleOCRVLForConditionalGeneration Phi3ForCausalLM
    PixtralForConditionalGeneration Qwen2ForCausalLM Qwen2_5_VLForConditionalGeneration Qwen3ForCausalLM
    Qwen3MoeForCausalLM Qwen3NextForCausalLM Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration
    Qwen3_5ForCausalLM Qwen3_5ForConditionalGeneration Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration
    Qwen4ExpForConditionalGeneration SarvamMoEForCausalLM Spark2_5ForCausalLM Step3p5ForCausalLM
    Step3p7ForConditionalGeneration TeleFLMForCausalLM YiVLForCausalLM
    """.split()  # noqa: SIM905
)
# whose embedding multiplies what it looks up, and engines lend its rows alone; EAGLE-3 heads norm them
_SCALED = frozenset(
    """
    Gemma2ForCausalLM Gemma3ForCausalLM Gemma3ForConditionalGeneration Gemma4ForCausalLM
    Gemma4ForConditionalGeneration Gemma4UnifiedForConditionalGeneration GemmaForCausalLM MiniCPM3ForCausalLM
    VaultGemmaForCausalLM
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class _Engine:
    """What an engine makes of the class of a target, beside one kind of head."""

    release: str
    takes: frozenset[str]  # architectures
    # it is known not to take; None: all others
    refuses: frozenset[str] | None = None
    # it lends the head an embedding without its scale
    misreads: frozenset[str] = frozenset()

    def about(self, engine: str, method: str, architecture: str) -> tuple[bool, str]:
        """Whether there is a command, and a sentence for the user."""
        name, nothing = f"{engine.split(' (')[0]} {self.release}", "so there is no command for it; draft-serve does."
        if architecture in self.misreads:
            return False, (
                f"{name} would lend the {method} head the embedding of {architecture} without its scale, and most "
                f"drafts would be rejected, {nothing}"
            )
        if architecture in self.takes:
            return True, f"{name} serves {method} heads beside {architecture}."
        if self.refuses is None or architecture in self.refuses:
            return False, f"{name} serves no {method} head beside {architecture}, {nothing}"
        return True, f"{name}: not checked whether it serves {method} heads beside {architecture}; it does not ask."


_NONE: frozenset[str] = frozenset()
# method -> engine, as the commands of an export call it
_ENGINES: dict[str, dict[str, _Engine]] = {
    "eagle3": {
        "vLLM": _Engine("0.32", _VLLM_EAGLE3),
        "SGLang": _Engine("0.5.23", _SGLANG_EAGLE3),
        "llama.cpp (conversion)": _Engine("b11434", _LLAMA_CPP_EAGLE3),
    },
    "eagle": {
        "vLLM": _Engine("0.32", _VLLM_EAGLE1, _VLLM_NO_EAGLE1, _SCALED),
        "SGLang": _Engine("0.5.23", _SGLANG_EAGLE1, misreads=_SCALED),
    },
    "medusa": {
        "vLLM": _Engine("0.32", _NONE, _NONE),
        "FasterDecoding": _Engine("1.0", frozenset({"LlamaForCausalLM", "MistralForCausalLM"})),
    },
}


def accepted_by(
    commands: Mapping[str, str], architecture: str, about: Mapping[str, Any], method: str = "eagle3"
) -> tuple[dict[str, str], list[str]]:
    """Of the commands of an export, by engine, those that work beside such a target, and what a user must know.

    architecture: of the target's config.json; about: the head's draftsmith.json; method: the kind of head.
    """
    kept, notes = dict(commands), []
    for engine, known in _ENGINES.get(method, {}).items():
        if engine in kept:
            served, note = known.about(engine, method, architecture)
            notes.append(note)
            if not served:
                del kept[engine]
    if about.get("target_adapter"):
        notes.append(
            f"The head is for the target with its adapter {about['target_adapter']!r}: let these engines serve the two "
            "merged (PEFT's merge_and_unload, then save_pretrained), or most drafts are rejected."
        )
    return kept, notes
