"""Subcommands of `python -m llama_pretrain`: each module adds its arguments and does its work."""
