"""AFA-LoRA (arXiv 2512.22455) as a variant of PEFT's LoRA: an adapter that learns non-linear and ends as a matrix.

    config = AfaLoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    model = add_adapter(model, config)                   # or peft.get_peft_model, or model.add_adapter
    Trainer(model, ..., callbacks=[AnnealingCallback()]).train()
    merged = merge_adapter(model)

A training loop without transformers.Trainer calls `set_annealing_step(model, step, total_steps)` before the first step
and after every optimiser step instead of the callback. `PeftModel.save_pretrained` writes an ordinary LoRA adapter at
beta = 0 and one that only `load_afa_adapter` opens at beta > 0.
"""

from draft.afa.adapter import AnnealingCallback, add_adapter, load_afa_adapter, merge_adapter
from draft.afa.layer import AfaLinear, AfaLoraConfig, beta_at, set_annealing_step

__all__ = [
    "AfaLinear",
    "AfaLoraConfig",
    "AnnealingCallback",
    "add_adapter",
    "beta_at",
    "load_afa_adapter",
    "merge_adapter",
    "set_annealing_step",
]
