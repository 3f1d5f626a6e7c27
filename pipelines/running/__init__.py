"""What every stage shares: its run, and the cluster's resources."""
