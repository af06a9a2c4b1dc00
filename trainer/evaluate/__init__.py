"""What is measured on a model: during training, and afterwards."""
