"""Training of draft heads: losses, training-time test, the trainer."""
