"""Evaluation: run a model over clips (`inference`), and measure features and predictions (`metrics`)."""
