"""transformers' processor tests."""

import unittest
from unittest import mock

from clipcap_hf import ClipCapProcessor, ClipCapVideoProcessor
from conftest import build_tokenizer
from released_tests import load
from transformers import CLIPImageProcessorPil


common = load("test_processing_common")


class ClipCapProcessorTest(common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = ClipCapProcessor
    videos_input_name = "pixel_values"  # the name of images, too

    @classmethod
    def _setup_tokenizer(cls):
        return build_tokenizer()

    @classmethod
    def _setup_image_processor(cls):
        return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})

    @classmethod
    def _setup_video_processor(cls):
        return ClipCapVideoProcessor(cls._setup_image_processor())

    @staticmethod
    def prepare_processor_dict():
        return {"prefix_length": 4}

    @property
    def video_sampling_expectations(self):
        # Without arguments, the video processor's own number of frames; transformers' processors would take all.
        return [
            {**wanted, "output_length": 8} if len(wanted) == 2 else wanted
            for wanted in super().video_sampling_expectations
        ]

    def _with_images_and_with_videos(self, test):
        # A call takes images or videos, and transformers' test would give it both.
        for left_out in ("images", "videos"):
            with (
                self.subTest(without=left_out),
                mock.patch.object(self, f"prepare_{left_out}_inputs", return_value=None),
            ):
                test()

    def test_model_input_names(self):
        self._with_images_and_with_videos(super().test_model_input_names)

    def test_flat_kwarg_applied_when_modality_dict_lacks_it(self):
        self._with_images_and_with_videos(super().test_flat_kwarg_applied_when_modality_dict_lacks_it)

    def test_replacement_offsets(self):
        self._with_images_and_with_videos(super().test_replacement_offsets)

    def test_processor_with_multiple_inputs(self):
        self._with_images_and_with_videos(super().test_processor_with_multiple_inputs)

    def test_apply_chat_template_video_frame_sampling(self):
        # Its last check alone is not ours: frames by their paths are sampled, too.
        with self.assertRaisesRegex(AssertionError, "ValueError not raised"):
            super().test_apply_chat_template_video_frame_sampling()
