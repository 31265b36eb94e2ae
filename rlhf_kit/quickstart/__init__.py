"""The embedded default: a small world, a tiny model pretrained on it, and data to align that model with."""
