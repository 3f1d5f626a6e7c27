"""From annotations and videos to batches: manifest, clip order, decode tasks, feature cache."""
