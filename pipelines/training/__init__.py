"""Ray Train around the training loop; the only room that imports ray.train."""
