"""python run.py: compose a run, plan it, write it down, train it. `--help` shows how."""

import sys

from llama_pretrain.cli.main import main
from llama_pretrain.launch.signals import ignore_signals

if __name__ == "__main__":
    exit_code = main()
    ignore_signals()
    sys.exit(exit_code)
