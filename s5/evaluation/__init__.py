"""Inference over clips, and metrics."""
