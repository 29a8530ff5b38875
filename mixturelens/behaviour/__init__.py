"""What a checkpoint does, and what changed between two: weights, forced accuracy, the KL and accuracy splits."""
