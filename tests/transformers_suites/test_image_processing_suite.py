"""transformers' image processor tests on open_clip's transform."""

import unittest

from clipcap_hf import OpenClipImageProcessor
from released_tests import load


common = load("test_image_processing_common")


class OpenClipImageProcessingTester(getattr(common, "ImageProcessingTester", object)):
    """Sizes and settings, in the form that transformers' mixin expects."""

    def __init__(self, parent, **kwargs):
        super().__init__(parent, size={"height": 18, "width": 20}, resize_mode="longest", fill_color=7, **kwargs)

    def _get_image_processing_classes(self):
        return {"pil": OpenClipImageProcessor}  # transformers looks them up by the folder of the test


class OpenClipImageProcessingTest(common.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = OpenClipImageProcessingTester

    @unittest.skip("Its process imports transformers alone, where our class is not registered.")
    def test_pil_can_run_without_torchvision(self):
        pass

    @unittest.skip("Before transformers 5.24: looks for the class among the models of transformers.")
    def test_pil_can_load_without_torchvision(self):
        pass

    @unittest.skip("open_clip's transform takes pictures, and makes them RGB.")
    def test_call_numpy_4_channels(self):
        pass

    @unittest.skip("Equal to open_clip's transform to the last bit, unlike torchvision's resampling of tensors.")
    def test_new_models_require_torchvision_backend(self):
        pass
