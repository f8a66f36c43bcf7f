"""transformers' model tests on captioners: GPT-2 and Llama, MLP and transformer mapping.

The generation tests join if `TRANSFORMERS_TESTS` names the `tests/` of a checkout: a source distribution has neither
them nor the pipelines' tests, whose mixin cannot be imported without the rest. For want of a checkout they have not
been run yet, and so have no exclusions; tests/model/test_generate_outputs.py has checks of the same kind. The
placeholder lies within the vocabulary here, so that a random captioner may write it and then fail to go on.
"""

import tempfile
import unittest
from unittest import mock

import pytest
import torch
from clipcap_hf import ClipCapConfig, ClipCapForConditionalGeneration, ClipCapModel
from released_tests import GenerationTesterMixin, load
from transformers import CLIPVisionConfig, GPT2Config, LlamaConfig
from transformers.models.auto import modeling_auto


common = load("test_modeling_common")

PREFIX_LENGTH = 3
IMAGE_TOKEN_ID = 1  # within the vocabulary: the tests of resizing cut the ids down to a smaller one
LANGUAGE_MODELS = {
    "gpt2": GPT2Config(
        vocab_size=99,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=98,
        eos_token_id=98,
        pad_token_id=97,
    ),
    "llama": LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=96,
        eos_token_id=98,
        pad_token_id=97,
    ),
}


class CaptionerTester:
    """Tiny random captioners and their inputs, in the form that transformers' mixins expect."""

    batch_size = 3
    seq_length = PREFIX_LENGTH + 5
    image_size = 30
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32
    vocab_size = 99
    is_training = True

    def __init__(self, language_model: str, mapping_type: str):
        self.language_model = language_model
        self.mapping_type = mapping_type

    def get_config(self) -> ClipCapConfig:
        return ClipCapConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=37,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=30,
                patch_size=15,
                projection_dim=16,
            ),
            text_config=LANGUAGE_MODELS[self.language_model].to_dict(),
            mapping_type=self.mapping_type,
            prefix_length=PREFIX_LENGTH,
            image_token_id=IMAGE_TOKEN_ID,
            mapping_num_layers=2,
            mapping_num_heads=4,
            freeze_vision=False,  # the training tests want a gradient in every parameter
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        input_ids = 2 + common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 6)
        input_ids[:, :PREFIX_LENGTH] = IMAGE_TOKEN_ID
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": common.floats_tensor([self.batch_size, 3, self.image_size, self.image_size]),
        }
        return config, inputs


class CaptionerSuite(common.ModelTesterMixin, common.GenerationTesterMixin):
    all_model_classes = (ClipCapModel, ClipCapForConditionalGeneration)
    _is_composite = True
    language_model: str
    mapping_type: str

    def setUp(self):
        self.model_tester = CaptionerTester(self.language_model, self.mapping_type)
        # The tests tell what a model is for by these tables of names, which registration does not change.
        for table, model_class in (
            (modeling_auto.MODEL_MAPPING_NAMES, ClipCapModel),
            (modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, ClipCapForConditionalGeneration),
        ):
            patched = mock.patch.dict(table, {"clipcap": model_class.__name__})
            patched.start()
            self.addCleanup(patched.stop)

    def test_correct_missing_keys(self):
        # transformers' test wants a captioner that is loaded from a base model to lack the head. Our base model holds
        # the whole language model, so nothing may be missing.
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        model = ClipCapForConditionalGeneration(config)
        with tempfile.TemporaryDirectory() as folder:
            model.base_model.save_pretrained(folder)
            again, info = ClipCapForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        self.assertFalse(info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
        self.assertEqual(model.state_dict().keys(), again.state_dict().keys())
        for name, weight in model.state_dict().items():
            self.assertTrue(torch.equal(weight, again.state_dict()[name]), name)

    @unittest.skip(
        "Loads a checkpoint without weights, which is an error here; test_pretrained_clipcap.py has that case."
    )
    def test_model_weights_reload_no_missing_tied_weights(self):
        pass

    def test_generation_tester_mixin_inheritance(self):
        if common.GenerationTesterMixin is GenerationTesterMixin:
            self.skipTest("A source distribution has no generation tests: set TRANSFORMERS_TESTS to a checkout's.")
        super().test_generation_tester_mixin_inheritance()


@pytest.mark.slow
class GPT2MLPTest(CaptionerSuite, unittest.TestCase):
    language_model, mapping_type = "gpt2", "mlp"


@pytest.mark.slow
class GPT2TransformerTest(CaptionerSuite, unittest.TestCase):
    language_model, mapping_type = "gpt2", "transformer"


@pytest.mark.slow
class LlamaMLPTest(CaptionerSuite, unittest.TestCase):
    language_model, mapping_type = "llama", "mlp"


class LlamaTransformerTest(CaptionerSuite, unittest.TestCase):
    language_model, mapping_type = "llama", "transformer"
