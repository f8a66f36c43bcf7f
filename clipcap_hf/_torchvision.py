"""Let `import torchvision` succeed next to a CPU-only PyTorch.

The torchvision wheels on PyPI are built for CUDA. Beside a CPU build of PyTorch their C++ extension does not load, and
`import torchvision` then fails with "operator torchvision::nms does not exist", which takes transformers' vision models
and open_clip with it, although both use torchvision's Python transforms alone. Declaring the schemas of the two
operators that torchvision registers unconditionally is enough for the import; calling one of them still raises.
"""

import importlib.util

import torch


_UNCONDITIONAL_OPS = ("nms", "qnms")
_libraries = []  # a torch.library.Library undoes its definitions when it is collected


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
