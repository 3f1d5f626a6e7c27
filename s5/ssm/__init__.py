"""State-space models of sequences, usable without the rest: S4 (DPLR) and S4D (diagonal).

Start with `layers`: `build_ssm` returns a layer from (B, L, D) to (B, L, D). Below it, `hippo` has the matrices that a
state space starts from, `kernels` turns them into convolution kernels, beside plain references, and `convolution`
applies long kernels by FFT in tiles.
"""
