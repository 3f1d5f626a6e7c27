"""When the frames of a clip are, and reading them; imports no torch."""
