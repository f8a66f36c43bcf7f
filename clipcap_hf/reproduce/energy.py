"""The energy that the device has used, where it tells."""

from contextlib import suppress


def joules() -> float | None:
    """Return the joules that all NVIDIA GPUs have used since their drivers started, or None where nothing tells."""
    with suppress(Exception):  # the library or the driver is missing, or the GPU has no counter
        import pynvml

        pynvml.nvmlInit()
        devices = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return sum(map(pynvml.nvmlDeviceGetTotalEnergyConsumption, devices)) / 1000 or None
    return None
