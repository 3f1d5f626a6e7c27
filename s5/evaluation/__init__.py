"""Evaluation: run a model over clips (`inference`), and measure features and predictions (`metrics`).

`neighbours` finds nearest neighbours in blocks, `linear_probe` fits a linear classifier on features. `prediction` says
what a single video of any length shows; `streaming` runs its clips in one pass over the file.
"""
