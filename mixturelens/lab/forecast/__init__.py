"""What RL will do, from S and the reward alone; and how right that was."""
