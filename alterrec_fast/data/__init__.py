"""Sessions on disk, readers of raw files, the generated shop, and item text. Knows nothing of models or training."""
