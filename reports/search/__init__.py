"""Whether the ceiling that the search predicts is the true one."""
