"""Pretraining of LLaMA models with DeepSpeed, from a Hydra config to a reproducible run."""

__version__ = "0.1.0"
