"""The per-pod agent of vram-operator: gives a GPU's memory back when its models are idle."""

__version__ = "0.1.0"
