"""Settings: precedence, types and unknown keys."""

import pytest

from draft.errors import UserError
from draft.training.config import resolve, to_yaml
from draft.training.run_folder import RunFolder

MINIMUM = {"data": ["d"], "head": "h"}
NEW = {"data": ["d"]}


def test_overrides_beat_flags_beat_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("training: {seed: 1, epochs: 2, learning_rate: 1e-3}\nadapter: {rank: 4}\n")
    flags = {**MINIMUM, "seed": 5, "rank": None}
    settings = resolve("adapt", "o", config_file=file, flags=flags, overrides=["training.seed=9"])
    assert (settings.training.seed, settings.training.epochs, settings.adapter.rank) == (9, 2.0, 4)
    assert settings.learning_rate == 1e-3


def test_a_resolved_configuration_reads_back_the_same(tmp_path):
    settings = resolve("adapt", "o", flags={**MINIMUM, "method": "lora", "targets": ["fc"]})
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(settings))
    assert resolve("adapt", "o", config_file=file) == settings


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"overrides": ["training.sed=1"]}, "training.sed"),
        ({"overrides": ["train.seed=1"]}, "'train'"),
        ({"overrides": ["training.seed=x"]}, "'x'"),
        ({"overrides": ["training.seed=true"]}, "True"),
        ({"overrides": ["training.seed=2020-13-45"]}, "'training.seed=2020-13-45': the value is not YAML"),
        ({"overrides": ["training.seed"]}, "section.key=value"),
        ({"overrides": ["adapter.rank=0"]}, "rank = 0"),
        ({"overrides": ["adapter.alpha=0"]}, "alpha = 0.0 is too small"),
        ({"flags": {**MINIMUM, "alpha": -3.0}}, "alpha = -3.0 is too small"),
        ({"flags": {**MINIMUM, "warmup_ratio": 5.0}}, "warmup_ratio = 5.0 is too large; use at most 1.0"),
        ({"flags": {**MINIMUM, "epochs": float("inf")}}, "epochs = inf is not of type finite number"),
        ({"overrides": ["training.learning_rate=.nan"]}, "learning_rate = nan"),
        ({"flags": {**MINIMUM, "draft_vocab_size": 9}}, "draft_vocab_size = 9: 'h' has .*--rebuild-vocabulary"),
        ({"flags": {**MINIMUM, "method": "dora"}}, "'dora'"),
        ({"flags": {**MINIMUM, "loss": "mse"}}, "'mse'"),
        ({"flags": {"head": "h"}}, "--data"),
        ({"flags": {"data": ["d"]}}, "--head"),
        ({"flags": {**MINIMUM, "architecture": "hydra"}}, "'hydra' is unknown; choose .* eagle3, eagle, medusa"),
        ({"flags": {**MINIMUM, "head_options": ["fc_norm=true"]}}, "of a new head, and 'h' is given"),
        ({"flags": NEW | {"head_options": ["num_heads=3"]}}, "none of eagle3's; they are .*auxiliary_layers"),
        ({"flags": NEW | {"architecture": "medusa", "head_options": ["num_heads=x"]}}, "num_heads = 'x'"),
        ({"flags": NEW | {"architecture": "medusa", "head_options": ["num_heads"]}}, "'num_heads' is none of"),
        ({"flags": NEW | {"architecture": "eagle", "draft_vocab_size": 9}}, "draft_vocab_size = 9: .*whole vocabulary"),
    ],
)
def test_a_mistake_is_named(change, words):
    with pytest.raises(UserError, match=words):
        resolve("adapt", "o", **{"flags": MINIMUM, **change})


@pytest.mark.parametrize(
    ("mode", "flags", "words"),
    [
        ("adapt", {"method": "full", "targets": ["q_proj"], "rank": 3}, "rank = 3 is of an adapter, .* method is full"),
        ("adapt", {"method": "full", "targets": ["q_proj"]}, r"targets = \['q_proj'\] is of an adapter, .* full"),
        ("adapt", {"method": "full", "alpha": 8.0}, "alpha = 8.0 is of an adapter"),
        ("adapt", {"method": "lora", "placement": "banana"}, "placement = 'banana' is of an AFA-LoRA .* is lora"),
        ("adapt", {"method": "lora", "activation": "gelu"}, "activation = 'gelu' is of an AFA-LoRA"),
        ("adapt", {"method": "full", "decay_ratio": 0.5}, "decay_ratio = 0.5 is of an AFA-LoRA"),
        ("adapt", {"method": "lora", "schedule": "cosine"}, "schedule = 'cosine' is of an AFA-LoRA"),
        ("pretrain", {"rank": 4}, "rank = 4 is of an adapter, and pretrain trains all weights; leave it out"),
        ("pretrain", {"method": "lora"}, "method = 'lora' is of adapt, and pretrain trains all weights"),
    ],
)
def test_settings_that_the_method_has_no_use_for_are_refused(mode, flags, words):
    with pytest.raises(UserError, match=words):
        resolve(mode, "o", flags={**MINIMUM, **flags})


def test_settings_that_the_method_uses_or_that_say_nothing_new_are_taken():
    annealed = {"activation": "gelu", "placement": "s-A-B", "decay_ratio": 0.5, "schedule": "cosine"}
    for flags in (
        annealed,
        {"method": "lora", "rank": 3, "alpha": 1.0, "targets": ["fc"]},
        {"method": "full", "rank": 16},
    ):
        resolve("adapt", "o", flags={**MINIMUM, **flags})


def test_the_resolved_configuration_of_an_older_run_goes_on(tmp_path):
    """It names the targets that its architecture would have given an adapter, and whatever flags it was given."""
    settings = resolve("adapt", "o", flags={**MINIMUM, "method": "full"})
    settings.adapter.targets, settings.adapter.rank = ["q_proj"], 8
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(settings))
    assert resolve("adapt", "o", config_file=file) == settings
    with pytest.raises(UserError, match="rank = 3 is of an adapter"):
        resolve("adapt", "o", config_file=file, flags={"rank": 3})


def test_a_broken_file_is_named(tmp_path):
    file = tmp_path / "run.yaml"
    for content in (b"training: [\n", b"\xff", b"training: {seed: 2020-13-45}\n"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"run\.yaml"):
            resolve("adapt", "o", config_file=file, flags=MINIMUM)


def test_a_broken_configuration_of_a_run_is_named(tmp_path):
    (tmp_path / "head").mkdir()  # the result of a run
    (tmp_path / "config.yaml").write_text("training: {seed: 2020-13-45}\n")
    with pytest.raises(UserError, match=r"config\.yaml is missing or damaged"):
        RunFolder(resolve("adapt", str(tmp_path), flags=MINIMUM)).check_settings()


def test_a_new_heads_vocabulary_is_not_rebuilt():
    with pytest.raises(UserError, match="chosen from the data anyway"):
        resolve("pretrain", "o", flags={**NEW, "rebuild_vocabulary": True})


def test_options_of_a_new_head_have_their_types():
    flags = {**NEW, "head_options": ["auxiliary_layers=[1, 3]", "fc_norm=true"]}
    assert resolve("pretrain", "o", flags=flags).model.options() == {"auxiliary_layers": [1, 3], "fc_norm": True}
