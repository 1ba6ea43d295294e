"""Sessions on disk, readers of raw files, the generated shop, and item text. Knows nothing of models or training."""

# A hub name. It stands here, where it costs no import: it is the default of text.py and of the training's Config.
DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
