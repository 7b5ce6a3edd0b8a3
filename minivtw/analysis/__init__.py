"""What is measured about the model: operations, bytes, attention."""
