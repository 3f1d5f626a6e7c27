"""Checkpoints: format, asynchronous writer, retention, backends."""
