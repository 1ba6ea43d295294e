"""Item encoders, session encoders, and the networks made of them. Knows nothing of training."""
