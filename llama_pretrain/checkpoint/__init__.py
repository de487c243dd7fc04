"""Checkpoints: manifest, tensors, engine state, save, load and export."""
