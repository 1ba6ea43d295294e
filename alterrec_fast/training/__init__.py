"""Configuration, alternate training, evaluation and checkpoints. Builds on ops, data and model."""
