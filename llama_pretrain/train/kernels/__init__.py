"""Faster implementations of parts of transformers' LLaMA; config group `kernels`."""
