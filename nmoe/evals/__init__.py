"""What a model is worth: the held-out loss."""
