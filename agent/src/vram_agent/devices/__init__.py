"""Devices: whose memory is given back. One file each."""
