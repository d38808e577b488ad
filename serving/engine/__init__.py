"""The engine: tensors, no HTTP; usable from Python alone."""

from serving.engine.engine import Engine
from serving.engine.request import Completion, EngineStopped, Overloaded, Request, Speculation, SpeculationStats, Token
from serving.engine.sampling import SamplingParams

__all__ = [
    "Completion",
    "Engine",
    "EngineStopped",
    "Overloaded",
    "Request",
    "SamplingParams",
    "Speculation",
    "SpeculationStats",
    "Token",
]
