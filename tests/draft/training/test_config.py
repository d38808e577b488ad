"""Settings: precedence, types and unknown keys."""

import pytest
from conftest import ended, python

from afa_kernels import reference
from draft.afa import layer
from draft.errors import UserError
from draft.heads import registry
from draft.training import config, loss
from draft.training.config import resolve, to_yaml

MINIMUM = {"data": ["d"], "head": "h"}
NEW = {"mode": "pretrain", "head": None}


def test_the_names_in_the_help_are_those_of_the_tables():
    for table, names in (
        (reference.ACTIVATIONS, config.ACTIVATIONS),
        (layer.SCHEDULES, config.SCHEDULES),
        (loss.LOSSES, config.LOSSES),
    ):
        assert tuple(table) == names
    assert {name: head.options for name, head in registry.ARCHITECTURES.items()} == config.HEAD_OPTIONS
    assert registry.DEFAULT == config.DEFAULT


def test_the_command_line_loads_no_torch_before_there_is_work():
    """A help text, or an option that is mistyped, would wait for it for seconds."""
    status, shown = ended(python("-c", "import sys, draft.cli; print({'torch', 'transformers'} & set(sys.modules))"))
    assert (status, shown.strip()) == (0, "set()")


def test_overrides_beat_flags_beat_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("training: {seed: 1, epochs: 2, learning_rate: 1e-3}\nadapter: {rank: 4}\n")
    flags = {**MINIMUM, "seed": 5, "rank": None}
    settings = resolve("adapt", "o", config_file=file, flags=flags, overrides=["training.seed=9"])
    assert (settings.training.seed, settings.training.epochs, settings.adapter.rank) == (9, 2.0, 4)
    assert settings.learning_rate == 1e-3


def test_a_head_that_is_trained_on_moves_more_slowly_than_a_new_one():
    """At a new head's rate a trained one loses more than it learns."""
    assert resolve("pretrain", "o", flags={"data": ["d"]}).learning_rate == 2e-3
    assert resolve("pretrain", "o", flags={"data": ["d"], "optimizer": "adamw"}).learning_rate == 1e-3
    assert resolve("pretrain", "o", flags=MINIMUM).learning_rate == 2e-4
    assert resolve("adapt", "o", flags=MINIMUM).learning_rate == 2e-4
    assert resolve("adapt", "o", flags={**MINIMUM, "method": "afa-lora"}).learning_rate == 1e-3


def test_pretrain_has_the_recipes_defaults_and_adapt_its_own(tmp_path):
    def chosen(mode, **more):
        training = resolve(mode, "o", flags=MINIMUM, **more).training
        return training.optimizer, training.weight_average, training.epochs

    assert chosen("pretrain") == ("muon", 0.95, 1.0) and chosen("adapt") == ("adamw", 0.0, 3.0)
    file = tmp_path / "run.yaml"
    file.write_text("training: {epochs: 2, optimizer: adamw}\n")
    assert chosen("pretrain", config_file=file, overrides=["training.weight_average=0.5"]) == ("adamw", 0.5, 2.0)


def test_a_resolved_configuration_reads_back_the_same(tmp_path):
    settings = resolve("adapt", "o", flags={**MINIMUM, "method": "lora", "targets": ["fc"]})
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(settings))
    assert resolve("adapt", "o", config_file=file) == settings


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"overrides": ["training.sed=1"]}, "'training.sed'; use seed"),
        ({"overrides": ["training.colour=1"]}, "'training.colour'; use one of epochs, max_steps, .*log_with"),
        ({"overrides": ["training.seed=true"]}, "training.seed = True: input should be a valid integer; correct"),
        ({"overrides": ["training.seed=2020-13-45"]}, "'training.seed=2020-13-45': the value is not YAML"),
        ({"overrides": ["training.seed"]}, "section.key=value"),
        ({"overrides": ["training.learning_rate=.nan"]}, "learning_rate = nan: .* finite"),
        ({"alpha": -3.0}, "alpha = -3.0: .* greater than or equal to"),
        ({"log_with": ["none", "wandb"]}, "log_with none, wandb"),
        ({"log_with": ["mlflow"]}, "log_with.0 = 'mlflow': unknown, choose one of tensorboard"),
        ({"draft_vocab_size": 9}, "draft_vocab_size = 9: 'h' has .*--rebuild-vocabulary"),
        ({"loss": "mse"}, "loss = 'mse': unknown, choose one of kl"),
        # also by methods that have no use for them
        ({"method": "full", "activation": "banana"}, "activation = 'banana': unknown, choose one of"),
        ({"placement": "banana"}, "placement = 'banana': unknown placement"),
        ({"data": []}, "--data"),
        ({"head": None}, "--head"),
        ({"head_options": ["fc_norm=true"]}, "of a new head, and 'h' is given"),
        (NEW | {"rebuild_vocabulary": True}, "chosen from the data anyway"),
        (NEW | {"head_options": ["num_heads=3"]}, "none of eagle3's; they are .*fc_norm"),
        (NEW | {"architecture": "medusa", "head_options": ["num_heads=x"]}, "head option num_heads = 'x': "),
        (NEW | {"architecture": "eagle", "draft_vocab_size": 9}, "draft_vocab_size = 9: .*whole vocabulary"),
    ],
)
def test_a_mistake_is_named(change, words):
    flags = {**MINIMUM, **change}
    mode, overrides = flags.pop("mode", "adapt"), flags.pop("overrides", ())
    with pytest.raises(UserError, match=words):
        resolve(mode, "o", flags=flags, overrides=overrides)


@pytest.mark.parametrize(
    ("mode", "flags", "names"),
    [
        ("adapt", {"method": "full", "targets": ["q_proj"], "rank": 3, "alpha": 8.0}, ["rank", "alpha", "targets"]),
        ("adapt", {"method": "lora", "activation": "gelu", "rank": 3}, ["activation"]),
        (
            "adapt",
            {"method": "afa-lora", "rank": 4, "activation": "gelu", "placement": "σ-A-B", "decay_ratio": 0.5},
            [],
        ),
        ("adapt", {"rank": 4, "activation": "gelu"}, ["rank", "activation"]),
        ("pretrain", {"rank": 4}, ["rank"]),
    ],
)
def test_settings_that_the_method_has_no_use_for_are_named(mode, flags, names):
    assert resolve(mode, "o", flags={**MINIMUM, **flags}).unused == names


def test_alpha_is_twice_the_rank_unless_given():
    for given, alpha in (({}, 32), ({"rank": 64}, 128), ({"rank": 64, "alpha": 8.0}, 8)):
        settings = resolve("adapt", "o", flags={**MINIMUM, "method": "lora", **given})
        assert settings.adapter.alpha == alpha and not settings.unused


def test_a_broken_file_is_named(tmp_path):
    file = tmp_path / "run.yaml"
    for content in (b"training: [\n", b"\xff", b"training: {seed: 2020-13-45}\n"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"run\.yaml"):
            resolve("adapt", "o", config_file=file, flags=MINIMUM)
