"""The most bfloat16 operations per second of a device, by the name that JAX gives it."""

import re

from simvlg_jax.forecast.chips import CHIPS

# Dense, without sparsity, from the vendors' data sheets. An H100 as a PCIe card or NVL is slower and not listed.
KINDS = {
    r"NVIDIA H100 80GB HBM3|NVIDIA H100 SXM.*": 989e12,
    r"NVIDIA H200.*": 989e12,
    r"NVIDIA A100.*": 312e12,
    r"TPU v4": CHIPS["v4"].flops,
    r"TPU v5 lite|TPU v5e": CHIPS["v5e"].flops,
    r"TPU v5|TPU v5p": CHIPS["v5p"].flops,
    r"TPU v6 lite|TPU v6e": CHIPS["v6e"].flops,
}


def peak_flops(kind: str) -> float | None:
    """Returns the peak of a `device_kind`; None for a CPU and for a device that is not listed."""
    return next((flops for pattern, flops in KINDS.items() if re.fullmatch(pattern, kind)), None)


def utilization(flop: float, seconds: float, peak: float | None, devices: int) -> float | None:
    """Returns the share of the peak that matrix products reach (model FLOP utilization, MFU); None without a peak."""
    return None if peak is None else flop / seconds / (peak * devices)
