"""Where things run: job submission to Ray clusters."""
