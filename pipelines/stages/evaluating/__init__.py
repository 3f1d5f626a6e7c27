"""What an evaluation says of a model: a fine-tuned one, or a pretrained encoder."""
