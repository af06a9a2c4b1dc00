"""What follows the step: learning rates, other settings, and what is done to the weights around an update."""
