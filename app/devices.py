"""What one accelerator can do and hold, by its name: dense 16-bit FLOP/s, FP8, memory; from the vendors' data sheets.

Training reads it for the MFU, planning for what fits. It looks at no machine.
"""

from __future__ import annotations

import re

PEAK_FLOPS = {  # dense, of one device, from the vendors' data sheets; the first whose words the device's name has
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,  # float16: it has no bfloat16
}
WITHOUT_FLOAT8 = frozenset({"A100", "A800", "A40", "A30", "A10G", "A10", "3090", "V100", "P100", "T4", "P4", "K80"})
MEMORY_GIB = {  # what the driver shows, which is a little less than the name says
    "A100-40GB": 40.0,
    "A100-80GB": 80.0,
    "H100": 79.6,
    "H200": 140.4,
    "L40S": 45.0,
}


def published_flops(device_name: str) -> float:
    """PEAK_FLOPS of a device by the name that CUDA gives it, or 0.0.

    >>> published_flops("NVIDIA A100-SXM4-80GB"), published_flops("NVIDIA H20"), published_flops("Tesla T4")
    (312000000000000.0, 148000000000000.0, 0.0)
    """
    words = _words(device_name)
    return next((flops for name, flops in PEAK_FLOPS.items() if words.issuperset(name.upper().split())), 0.0)


def has_float8(device_name: str) -> bool:
    """Whether its matrix products take FP8, by the name that CUDA or Ray gives it; of an unknown one: yes.

    >>> has_float8("NVIDIA A100-SXM4-80GB"), has_float8("H100"), has_float8("NVIDIA L4")
    (False, True, True)
    """
    return _words(device_name).isdisjoint(WITHOUT_FLOAT8)


def _words(device_name: str) -> set[str]:
    return set(re.split(r"[\s-]+", device_name.upper()))
