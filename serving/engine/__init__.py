"""The engine: tensors, no HTTP; usable from Python alone."""

from serving.engine.engine import Engine
from serving.engine.params import SamplingParams
from serving.engine.request import EngineStopped, Overloaded, Request, Speculation
from serving.engine.sequence import Completion, SpeculationStats, Token

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
