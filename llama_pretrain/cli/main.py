"""The command: start the workers' imports, read the command line, and return an exit code."""

import contextlib
import sys
from collections.abc import Sequence

from llama_pretrain.launch.signals import leave_at_signals


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says. Returns the exit code."""
    leave_at_signals()  # before Hydra and everything else that takes time
    words = list(sys.argv[1:] if argv is None else argv)
    # Imports here take from 0.1 s to 0.5 s: after the workers' have begun, or not at all.
    if {"--help", "-h"} & set(words):
        from llama_pretrain.cli.help import render_help

        with contextlib.suppress(BrokenPipeError):  # the reader has seen enough
            print(render_help(), flush=True)
        return 0
    if any(word.startswith("import_deepspeed=") for word in words):
        from llama_pretrain.cli.import_deepspeed import run_import

        return run_import(words)
    from llama_pretrain.launch.server import may_train, start_server

    if may_train(words):
        start_server()
    from llama_pretrain.cli.hydra_app import run_command

    return run_command(words)
