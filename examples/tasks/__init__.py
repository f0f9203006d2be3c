"""Questions, rewards and policies of the example scripts."""
