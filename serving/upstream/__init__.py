"""Another server of the target behind the API, by its OpenAI-compatible surface: vLLM, SGLang or draft-serve."""

from serving.upstream.upstream import Upstream, load_upstream

__all__ = ["Upstream", "load_upstream"]
