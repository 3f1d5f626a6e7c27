"""Training: one loop that runs alone and on a cluster.

Start with `loop` (`TrainingLoop`); `step` takes one optimiser step, with gradients of a batch in whole or in parts.
`optim` builds AdamW and its schedule. `context` is what the loop needs of its environment, such as a log and a place
for checkpoints. `throughput` monitors speed, and `watchdog` finds loops that hang.
"""
