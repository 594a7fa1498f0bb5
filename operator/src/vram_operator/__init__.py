"""The operator: declares GPU model workloads and restarts pods that leak device memory."""

__version__ = "0.1.0"
