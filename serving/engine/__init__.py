"""The engine: tensors, no HTTP; usable from Python alone."""

from serving.engine.engine import Engine
from serving.engine.sequence import Completion, SamplingParams, SpeculationStats, Token

__all__ = ["Completion", "Engine", "SamplingParams", "SpeculationStats", "Token"]
