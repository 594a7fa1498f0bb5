"""An application that is not ours, as a child of the agent: ``vram-agent run``."""
