"""What data sheets say of a device."""

from dataclasses import dataclass

from common import UserError


@dataclass(frozen=True)
class Device:
    """By NVIDIA's data sheets: bytes, bytes/s of its memory, bytes/s of NVLink in one direction."""

    memory: float
    bandwidth: float
    link: float


DEVICES = {
    "h100": Device(80e9, 3.35e12, 450e9),
    "h200": Device(141e9, 4.8e12, 450e9),
    "a100": Device(80e9, 2.04e12, 300e9),  # the larger one
}


def device_of(name: str) -> str:
    """Of a device's full name. Raises UserError: its data sheet is not known here."""
    for device in ("cpu", *DEVICES):
        if device in name.lower():
            return device
    raise UserError(f"{name}: no data sheet of it is known here: give --device, one of {', '.join(DEVICES)}, cpu")
