"""Devices: whose memory is given back. One file each."""

from vram_agent.devices.base import Device
from vram_agent.devices.select import select_device

__all__ = ["Device", "select_device"]
