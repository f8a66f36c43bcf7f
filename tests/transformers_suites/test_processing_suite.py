"""transformers' processor tests."""

import unittest

from clipcap_hf import ClipCapProcessor
from conftest import build_tokenizer
from released_tests import load
from transformers import CLIPImageProcessorPil


common = load("test_processing_common")

NUM_FRAMES = (
    "`num_frames` would belong to a video processor, which our processor does not have: frames are images to it."
)


class ClipCapProcessorTest(common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = ClipCapProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return build_tokenizer()

    @classmethod
    def _setup_image_processor(cls):
        return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})

    @staticmethod
    def prepare_processor_dict():
        return {"prefix_length": 4}

    def prepare_videos_inputs(self, *args, **kwargs):
        return None  # a call takes images or videos, and the tests would give it both

    @unittest.skip(NUM_FRAMES)
    def test_init_arguments_not_in_processor_kwargs(self):
        pass
