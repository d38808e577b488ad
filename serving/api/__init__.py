"""HTTP in front of the engine: no tensors here."""
