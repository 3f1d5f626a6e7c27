"""What is learned: LSMCL pretraining and supervised fine-tuning."""
