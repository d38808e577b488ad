"""AFA-LoRA under transformers.Trainer: a tiny Llama fine-tuned with gradient accumulation, resumed, merged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from draft.afa import AfaLoraConfig, AnnealingCallback, add_adapter, beta_at, load_afa_adapter, merge_adapter
from draft.errors import UserError

STEPS, ACCUMULATION = 10, 3
TARGETS = ["q_proj", "v_proj", "down_proj"]


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, pad_token_id=0, initializer_range=0.3)).eval()


def rows(count: int = 2 * ACCUMULATION * STEPS) -> list[dict[str, Tensor]]:
    """Supervised rows with something to learn: the prompt is random and masked, the answer always 7 7 7 7."""
    ids = torch.randint(1, 32, (count, 8), generator=torch.Generator().manual_seed(2))
    ids[:, 4:] = 7
    labels = torch.where(torch.arange(8) < 4, -100, ids)
    return [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]


def make_trainer(out: Path, model: nn.Module, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    defaults = {"max_steps": STEPS, "gradient_accumulation_steps": ACCUMULATION, "save_strategy": "no"}
    arguments = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=2,
        learning_rate=0.02,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **(defaults | options),
    )
    data = rows()
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data[:4], callbacks=[*callbacks])


def adapted(**options: Any) -> PeftModel:
    torch.manual_seed(1)
    return add_adapter(tiny_llama(), AfaLoraConfig(**({"r": 4, "target_modules": TARGETS} | options)))


def betas_of_micro_batches(model: PeftModel) -> list[float]:
    """A list that grows by the beta of one layer with every training forward."""
    seen: list[float] = []
    layer = model.get_base_model().model.layers[1].mlp.down_proj

    def record(module: nn.Module, *_: Any) -> None:
        if module.training:
            seen.append(module.annealed["default"].beta_on(torch.device("cpu")).item())

    layer.register_forward_pre_hook(record)
    return seen


def test_beta_at_every_step_under_accumulation(tmp_path):
    model = adapted(decay_ratio=0.5, schedule="cosine")
    seen = betas_of_micro_batches(model)
    make_trainer(tmp_path, model, AnnealingCallback()).train()
    expected = [beta_at(step, STEPS, 0.5, "cosine") for step in range(STEPS) for _ in range(ACCUMULATION)]
    assert seen == expected and expected[0] == 1.0 and expected[-1] == 0.0
    config = model.peft_config["default"]
    assert (config.step, config.total_steps, config.beta) == (STEPS, STEPS, 0.0)


@pytest.mark.parametrize("placement", ["A-s-B", "s-A-s-B-s"])
def test_fine_tunes_and_merges(tmp_path, placement):
    model = adapted(placement=placement)
    trainer = make_trainer(tmp_path, model, AnnealingCallback())
    batch = torch.stack([row["input_ids"] for row in rows(6)])  # [6, 8]
    loss_before = trainer.evaluate()["eval_loss"]
    with pytest.raises(UserError, match="no number of steps"):
        merge_adapter(model)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < loss_before - 0.1
    logits = model.eval()(batch).logits
    model.save_pretrained(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(plain(batch).logits, logits, rtol=1e-4, atol=1e-5)
    merged = merge_adapter(model)
    assert type(merged) is LlamaForCausalLM
    torch.testing.assert_close(merged(batch).logits, logits, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    reloaded = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(reloaded(batch).logits, merged(batch).logits)


def test_a_resumed_run_goes_on_where_it_was(tmp_path):
    whole, part = adapted(decay_ratio=0.8), adapted(decay_ratio=0.8)
    make_trainer(tmp_path / "whole", whole, AnnealingCallback()).train()

    class StopAt4(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 4

    saving = {"save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path / "part", part, AnnealingCallback(), StopAt4(), **saving).train()
    checkpoint = tmp_path / "part" / "checkpoint-4"
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    assert (config["peft_type"], config["step"], config["beta"]) == ("AFA_LORA", 4, 0.5)
    assert load_afa_adapter(tiny_llama(), checkpoint).peft_config["default"].beta == 0.5

    resumed = adapted(decay_ratio=0.8)
    seen = betas_of_micro_batches(resumed)
    trainer = make_trainer(tmp_path / "part", resumed, AnnealingCallback(), **saving)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert seen == [beta_at(step, STEPS, 0.8) for step in range(4, STEPS) for _ in range(ACCUMULATION)]
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("greater_is_better", [True, False])
def test_the_best_checkpoint_is_loaded_only_at_beta_zero(tmp_path, greater_is_better):
    model = adapted(decay_ratio=0.5)
    every_step = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    best |= {"greater_is_better": greater_is_better}
    trainer = make_trainer(tmp_path, model, AnnealingCallback(), **every_step, **best)
    if not greater_is_better:  # the loss falls, so a late checkpoint is the best
        trainer.train()
        assert int(trainer.state.best_model_checkpoint.rpartition("-")[2]) >= 5
        return
    loads: list[str] = []
    trainer._load_best_model = lambda: loads.append("best")
    with pytest.raises(UserError, match="checkpoint-[24], saved at step [24] with beta 0.[62],.*from step 5 on"):
        trainer.train()
    assert not loads and model.peft_config["default"].step == STEPS


def test_the_callback_wants_an_active_afa_adapter(tmp_path):
    model = add_adapter(tiny_llama(), LoraConfig(target_modules=TARGETS))
    with pytest.raises(UserError, match="no active AFA-LoRA adapter"):
        make_trainer(tmp_path, model, AnnealingCallback()).train()


def test_a_finished_adapter_stays_linear_while_another_anneals(tmp_path):
    model = adapted(beta=0.0)
    add_adapter(model, AfaLoraConfig(r=4, target_modules=["q_proj"]), "new")
    model.set_adapter("new")
    make_trainer(tmp_path, model, AnnealingCallback(), max_steps=2).train()
    assert model.peft_config["default"].total_steps == 0 and model.peft_config["new"].total_steps == 2
