"""What a device can do at most: dense bf16 matrix multiplication, from the makers' data sheets."""

from __future__ import annotations

import re

# First match wins; 1e12 floating-point operations a second. Where a data sheet prints the rate with sparsity, it was
# halved (Lightning's own table has the doubled numbers for H200 and H100 NVL, which makes the MFU half of what it is).
_BF16_TERAFLOPS: tuple[tuple[str, float], ...] = (
    (r"GB200|B200", 2250.0),
    (r"B100", 1750.0),
    (r"GH200", 989.4),
    (r"H200 NVL", 835.5),
    (r"H200", 989.4),
    (r"H100 NVL", 835.5),
    (r"H100 PCIe", 756.5),
    (r"H800|H100", 989.4),
    (r"A100|A800", 312.0),
    (r"L40S", 362.05),
    (r"L40", 181.05),
    (r"\bL4\b", 121.0),
    (r"A40", 149.7),
    (r"A30", 165.0),
    (r"\bA10\b", 125.0),
    (r"RTX 6000 Ada", 364.25),
    (r"RTX A6000", 154.8),
    (r"RTX 5090", 209.5),
    (r"RTX 4090", 165.2),
    (r"RTX 4080", 97.5),
    (r"RTX 3090", 71.0),
    (r"MI355X", 2516.6),
    (r"MI350X", 2306.9),
    (r"MI325X|MI300X", 1307.4),
    (r"MI300A", 980.6),
    (r"MI250X", 191.5),  # a card is two devices; this is one
)


def dense_peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of the device that calls itself ``device_name``; None where it is not known."""
    for pattern, tera in _BF16_TERAFLOPS:
        if re.search(pattern, device_name, re.IGNORECASE):
            return tera * 1e12
    return None
