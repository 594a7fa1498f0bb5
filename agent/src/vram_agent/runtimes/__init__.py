"""Runtimes: who loads a model and runs its tasks. One file each."""
