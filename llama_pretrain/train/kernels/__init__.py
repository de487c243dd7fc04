"""Faster forms of what transformers' LLaMA computes; config group `kernels`."""
