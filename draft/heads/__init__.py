"""Draft heads, one file an architecture."""

from draft.heads.eagle3 import Eagle3Head
from draft.heads.eagle3_config import Eagle3Config

# the `architectures` entry of a head's config.json -> (configuration, head)
ARCHITECTURES = {"LlamaForCausalLMEagle3": (Eagle3Config, Eagle3Head)}

__all__ = ["ARCHITECTURES", "Eagle3Config", "Eagle3Head"]
