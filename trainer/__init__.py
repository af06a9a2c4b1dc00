"""What happens in which order: the loop, the model, the processes, the record."""
