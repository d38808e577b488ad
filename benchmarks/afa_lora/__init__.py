"""Experiments about AFA-LoRA in the three settings of its paper, and what they share."""
