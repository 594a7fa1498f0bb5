"""Processes that hold models: templates, GPU processes and the channel to them."""
