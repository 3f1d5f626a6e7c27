"""What is trained: modules that own a model and its loss.

Start with `task`, the protocol that the training loop uses. `lsmcl` is pretraining (long-short masked contrastive
learning), `supervised` fine-tuning on labels, `distant` learning of written steps from narration; `augment` makes
random views of clips.
"""
