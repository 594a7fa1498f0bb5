"""The supervisor's parts: its state, how it is read, changed, acted on and reported."""
