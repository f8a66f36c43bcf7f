"""Defaults that fit the data, the paper's recipe, and values that are refused before any work."""

import pytest
from clipcap_hf.training.arguments import CaptioningArguments, DataArguments, ModelArguments
from clipcap_hf.training.recipe import LEARNING_RATES, fit_recipe, trained_part


def test_the_papers_numbers():
    args = CaptioningArguments.paper("out", use_cpu=True)
    assert (args.num_train_epochs, args.per_device_train_batch_size, args.learning_rate) == (10, 40, 2e-5)
    assert (args.warmup_steps, args.lr_scheduler_type, args.weight_decay, args.max_grad_norm) == (5000, "linear", 0, 0)
    assert args.adam_epsilon == 1e-6
    assert CaptioningArguments.paper("out", learning_rate=1e-3, use_cpu=True).learning_rate == 1e-3


def test_the_papers_numbers_stay_whatever_the_data(make_model):
    args = CaptioningArguments.paper("out", use_cpu=True)
    fit_recipe(args, make_model(None), 300)
    assert (args.learning_rate, args.per_device_train_batch_size, args.num_train_epochs) == (2e-5, 40, 10)


@pytest.mark.parametrize("start", ["existing", "new"])
def test_the_learning_rate_fits_what_is_trained(make_model, start):
    pytest.importorskip("peft")
    models = {
        "everything": make_model(None),
        "LoRA": make_model(None, lora={"r": 2}),
        "mapping network": make_model(None, freeze_language_model=True),
    }
    for part, model in models.items():
        args = CaptioningArguments(output_dir="out", use_cpu=True)
        fit_recipe(args, model, 300, new=start == "new")
        assert trained_part(model) == part and args.learning_rate == LEARNING_RATES[start][part]
        assert args.warmup_steps < 1  # a share of the steps
        model.config.text_config.n_embd = 768  # the models of the fixture share this config
        args = CaptioningArguments(output_dir="out", use_cpu=True)
        fit_recipe(args, model, 300, new=start == "new")
        assert args.learning_rate < LEARNING_RATES[start][part] / 3
        model.config.text_config.n_embd = 32


def test_few_captions_want_small_batches_and_more_epochs(make_model):
    found = []
    for captions in (20, 300, 566_000):
        args = CaptioningArguments(output_dir="out", use_cpu=True)
        fit_recipe(args, make_model(None), captions)
        found.append((args.per_device_train_batch_size, args.num_train_epochs))
    batches, epochs = zip(*found)
    assert sorted(batches) == list(batches) and batches[-1] == 40
    assert sorted(epochs, reverse=True) == list(epochs) and epochs[-1] == 10


def test_what_the_user_says_stays(make_model):
    args = CaptioningArguments(output_dir="out", learning_rate=0.5, num_train_epochs=3, use_cpu=True)
    fit_recipe(args, make_model(None), 300)
    assert (args.learning_rate, args.num_train_epochs) == (0.5, 3)


NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_train_epochs", 0),
        ("num_train_epochs", -1),
        ("num_train_epochs", NAN),
        ("max_steps", 0),
        ("gradient_accumulation_steps", 0),
        ("per_device_train_batch_size", 0),
        ("per_device_eval_batch_size", 0),
        ("early_stopping_patience", -1),
        ("early_stopping_patience", 0),
        ("learning_rate", -1e-4),
        ("learning_rate", NAN),
        ("warmup_steps", -1),
        ("weight_decay", -0.1),
        ("label_smoothing_factor", 1.5),
        ("save_total_limit", 0),
        ("logging_steps", 0),
        ("num_samples", -1),
        ("metric_for_best_model", "cidr"),
        ("recipe", "papers"),
    ],
)
def test_values_of_the_recipe_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        CaptioningArguments(output_dir="out", use_cpu=True, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("prefix_length", 0), ("clip_length", -1), ("clip_embed_dim", 0), ("lora_r", 0), ("warm_start", -5)],
)
def test_values_of_the_captioner_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be at least"):
        ModelArguments(**{name: value})


@pytest.mark.parametrize("value", ["[1]", "{", '"a"', [1]])
def test_overrides_must_be_an_object(value):
    with pytest.raises(ValueError, match="`config_overrides`"):
        ModelArguments(config_overrides=value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("embeds_noise", 100),
        ("embeds_noise", NAN),
        ("embeds_noise", -1),
        ("max_caption_length", 0),
        ("max_train_samples", 0),
        ("validation_share", -0.1),
        ("validation_share", 0.9),
        ("validation_share", NAN),
    ],
)
def test_values_of_the_data_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be at least"):
        DataArguments(**{name: value})


def test_a_reporter_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: [])
    with pytest.raises(ValueError, match="`report_to` tensorboard is not installed: pip install .*tensorboard"):
        CaptioningArguments(output_dir="out", report_to="tensorboard", use_cpu=True)
