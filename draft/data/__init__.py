"""Data to train draft heads on: prompts, the target's own responses, and the files that hold them."""
