"""The agent inside of somebody else's process: what ``vram_agent.Manager`` is made of."""
