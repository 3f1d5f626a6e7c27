"""S5 and LSMCL in plain PyTorch: models, losses, clips and the training loop. Knows nothing of Ray or MLflow."""
