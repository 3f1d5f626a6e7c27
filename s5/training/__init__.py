"""The training loop, its step, optimiser, context and monitors."""
