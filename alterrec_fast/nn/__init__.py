"""What a person puts into a training loop of their own: losses as modules, and a sampler of hard negatives."""
