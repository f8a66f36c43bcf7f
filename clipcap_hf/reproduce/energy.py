"""The energy that the device has used, where it tells."""

import ctypes


def joules() -> float | None:
    """Return the joules that all NVIDIA GPUs have used since their drivers started, or None where nothing tells."""
    try:
        driver = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None  # no NVIDIA driver
    count, total = ctypes.c_uint(), 0.0
    if driver.nvmlInit_v2() or driver.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return None
    for index in range(count.value):
        device, used = ctypes.c_void_p(), ctypes.c_ulonglong()  # in millijoules
        if driver.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)):
            return None
        if driver.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(used)):
            return None  # the GPU has no counter
        total += used.value / 1000
    return total or None
