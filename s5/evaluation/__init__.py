"""Evaluation: run a model over clips (`inference`), and measure features and predictions (`metrics`).

`neighbours` finds nearest neighbours in blocks, `linear_probe` fits a linear classifier on features.
"""
