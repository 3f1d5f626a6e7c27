"""Diagonal and DPLR state spaces: matrices, kernels, long convolution, layers. Usable alone."""
