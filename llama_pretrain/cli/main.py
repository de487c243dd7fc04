"""The command: start the workers' imports, read the command line, and return an exit code."""

import sys
from collections.abc import Sequence

from llama_pretrain.cli.help import render_help
from llama_pretrain.launch.server import may_train, start_server
from llama_pretrain.launch.signals import leave_at_signals
from llama_pretrain.process import ignore_lost_output


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says. Returns the exit code."""
    if argv is None:  # in a process of its own
        ignore_lost_output()
    leave_at_signals()  # before Hydra and everything else that takes time
    words = list(sys.argv[1:] if argv is None else argv)
    if {"--help", "-h"} & set(words):
        print(render_help())
        return 0
    if may_train(words):
        start_server()
    # Hydra takes 0.5 s to import: after the workers' imports have begun.
    from llama_pretrain.cli import hydra_app, import_deepspeed

    if any(word.startswith(import_deepspeed.COMMAND) for word in words):
        return import_deepspeed.run_import(words)
    return hydra_app.run_command(words)
