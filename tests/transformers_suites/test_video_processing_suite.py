"""transformers' video processor tests."""

import unittest

from clipcap_hf import ClipCapVideoProcessor
from released_tests import load


common = load("test_video_processing_common")


class ClipCapVideoProcessingTester:
    """Sizes and settings, in the form that transformers' mixin expects."""

    batch_size = 3
    num_channels = 3
    num_frames = 8

    def expected_output_video_shape(self, videos):
        return [self.num_frames, 3, 18, 18]

    def prepare_video_inputs(self, equal_resolution=False, return_tensors="pil"):
        return common.prepare_video_inputs(
            batch_size=self.batch_size,
            num_frames=self.num_frames,
            num_channels=self.num_channels,
            min_resolution=30,
            max_resolution=80,
            equal_resolution=equal_resolution,
            return_tensors=return_tensors,
        )


class ClipCapVideoProcessingTest(common.VideoProcessingTestMixin, unittest.TestCase):
    fast_video_processing_class = ClipCapVideoProcessor
    input_name = "pixel_values"
    test_cast_dtype = True

    def setUp(self):
        super().setUp()
        self.video_processor_tester = ClipCapVideoProcessingTester()
        self.video_processor_dict = {
            "size": {"shortest_edge": 20},
            "crop_size": {"height": 18, "width": 18},
            "do_normalize": True,
            "image_mean": [0.5, 0.4, 0.3],
            "image_std": [0.2, 0.3, 0.4],
        }

    def test_call_sample_frames(self):
        # Its last check alone is not ours: shorter videos repeat frames.
        with self.assertRaisesRegex(AssertionError, "ValueError not raised"):
            super().test_call_sample_frames()
