"""Let `import torchvision` succeed next to a CPU-only PyTorch.

The torchvision wheels on PyPI are built for CUDA. Next to a CPU build of PyTorch their C++ extension does not load,
and `import torchvision` fails with "operator torchvision::nms does not exist". transformers' vision models and
open_clip then fail, too, although both use only torchvision's Python transforms. Declaring the schemas of the two
operators that torchvision registers unconditionally is enough for the import; calling one of them still raises.
"""

import importlib.util

import torch


_UNCONDITIONAL_OPS = ("nms", "qnms")
# A library removes its definitions when it is garbage-collected.
_libraries: list[torch.library.Library] = []


def ensure_torchvision_imports() -> None:
    """Declare torchvision's operators if, and only if, its C++ extension could not be loaded."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for op in _UNCONDITIONAL_OPS:
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
        import torchvision  # noqa: F401
