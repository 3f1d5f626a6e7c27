"""Checkpoints of a training run: their format, saving them while training continues, and resuming from them.

Start with `checkpoint`, the format: what a checkpoint's folder holds, how it is verified and loaded (`read_model`).
`writer` saves checkpoints in a thread, from the copies in `host_buffer`, to a `backend`: a local folder here, an object
store in `pipelines.storage`. `history` decides which checkpoints are retained and which one a run resumes from.
"""
