"""python run.py: compose a run, plan it, write it down, train it. `--help` shows how."""

import contextlib
import os
import signal
import sys
import tempfile
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from llama_pretrain.config.compose import read_config, register, rewrite_argv
from llama_pretrain.config.help import render_help


def main() -> int:
    """Run, and turn every ending into a few lines and an exit code."""
    if {"--help", "-h"} & set(sys.argv[1:]):  # Hydra's own page takes a second to make
        print(render_help())
        return 0
    from llama_pretrain import endings  # after Hydra's own flags have had their quick answer

    argv = sys.argv[1:]
    if any(word.startswith("import_deepspeed=") for word in argv):  # of files: nothing is composed
        from llama_pretrain.plan.import_deepspeed import run_command

        try:
            print(run_command(argv))
        except endings.EXPECTED as error:
            endings.tell(error)
            return 1
        return 0
    failures: list[Exception] = []
    composed: list[DictConfig] = []

    @hydra.main(config_path="conf", config_name="config", version_base="1.3")
    def run(config: DictConfig) -> float | None:
        composed.append(config)
        from llama_pretrain.runs.rundir import RunDir
        from llama_pretrain.tasks import run_task

        folder = Path(HydraConfig.get().runtime.output_dir)
        try:
            return run_task(read_config(config), run_dir=RunDir(folder), argv=argv)
        except endings.EXPECTED as error:  # a sweep goes on with its next point
            endings.tell(error)
            failures.append(error)
            return None
        finally:
            with contextlib.suppress(OSError):  # Hydra makes it for task=plan and refused runs too
                folder.rmdir()

    register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's errors come to us, who know more to say
    signal.signal(signal.SIGTERM, endings.stop)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            sys.argv[1:] = rewrite_argv(argv, scratch=Path(scratch))
            run()
        except BaseException as error:
            return endings.end(error, sys.argv[1:], composing=not composed)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
