"""python run.py: compose a run, plan it, write it down, train it. `--help` shows how."""

import contextlib
import gc
import os
import sys
import tempfile
from pathlib import Path

from llama_pretrain.launch.ahead import start_ahead
from llama_pretrain.launch.signals import Requests, catch_signals, ignore_signals, leave_at_signals


def main() -> int:
    """Do what the command line says. Returns the exit code."""
    leave_at_signals()  # before Hydra and whatever else takes a while
    argv = sys.argv[1:]
    if {"--help", "-h"} & set(argv):  # Hydra's own page takes a second to make
        from llama_pretrain.config.help import render_help

        print(render_help())
        return 0
    from llama_pretrain.cli import exit_codes as endings

    if any(word.startswith("import_deepspeed=") for word in argv):  # of files: nothing is composed
        from llama_pretrain.cli.import_deepspeed import run_command

        try:
            print(run_command(argv))
        except endings.EXPECTED as error:
            endings.tell(error)
            return 1
        return 0
    if "task=plan" in argv and plan_at_once(argv):
        return 0
    return run_hydra(argv)


def run_hydra(argv: list[str]) -> int:
    """A run or a sweep, through Hydra; every ending becomes a few lines and an exit code."""
    gc.disable()  # until the config is composed: many objects are made and few dropped
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's errors come to us, who know more to say
    ahead = start_ahead(argv)
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig

    from llama_pretrain.cli import exit_codes as endings
    from llama_pretrain.config.compose import (
        SNAPSHOT_NAME,
        read_config,
        register,
        trace_settings,
    )
    from llama_pretrain.config.rewrite import is_sweep, rewrite_argv
    from llama_pretrain.runs.phases import Phases, process_start

    began = process_start()
    failures: list[Exception] = []
    composed: list[DictConfig] = []

    @hydra.main(config_path="conf", config_name="config", version_base="1.3")
    def run(config: DictConfig) -> float | None:
        phases = Phases(None if composed else began)  # a second job has begun now
        composed.append(config)
        requests.check()
        from llama_pretrain.runs.layout import RunDir
        from llama_pretrain.tasks.run import run_task

        own = HydraConfig.get()
        folder = Path(own.runtime.output_dir)
        words = list(own.overrides.task)
        try:
            read = read_config(config)
            is_snapshot = own.job.config_name == SNAPSHOT_NAME
            requests.check()
            origins = trace_settings(words, {} if is_snapshot else own.runtime.choices)
            gc.enable()
            phases.end("compose")
            return run_task(
                read,
                run_dir=RunDir(folder),
                argv=argv,
                origins=origins,
                phases=phases,
                ahead=ahead,
            )
        except endings.EXPECTED as error:  # a sweep goes on with its next point
            endings.tell(error)
            failures.append(error)
            return None
        finally:
            with contextlib.suppress(OSError):  # Hydra makes it for task=plan and refused runs too
                folder.rmdir()

    register()
    requests = Requests()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            catch_signals(requests)  # here, where what it raises is caught
            words = rewrite_argv(argv, scratch=Path(scratch))
            if is_sweep(words):
                gc.enable()
                from llama_pretrain.sweep.command import SWEPT_TASKS, run_sweep
                from llama_pretrain.sweep.points import read_command

                command = read_command(words)
                composed.append(command.base)
                if command.base.task in SWEPT_TASKS:
                    return run_sweep(argv, command)
            sys.argv[1:] = words
            run()
        except BaseException as error:
            return endings.end(error, sys.argv[1:], composing=not composed, requests=requests)
    return 1 if failures else 0


def plan_at_once(argv: list[str]) -> bool:
    """Plan a single run with one composition, where hydra.main makes two (0.3 s of a second).

    Returns False, with nothing said, for whatever hydra.main must see to: its flags, sweeps,
    snapshots, and every mistake.
    """
    theirs = ("-", "hydra", "sweep=", "resume=", "reproduce=", "+", "~")
    if any(word.startswith(theirs) for word in argv):
        return False
    gc.disable()  # a process of a second that makes many objects and drops few
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode
    from omegaconf import open_dict

    from llama_pretrain.config.compose import (
        COMPOSE_ERRORS,
        PROJECT_ROOT,
        read_config,
        register,
        trace_settings,
    )
    from llama_pretrain.config.problems import UserError
    from llama_pretrain.runs.layout import RunDir
    from llama_pretrain.tasks.run import run_task

    register()
    try:
        with hydra.initialize_config_dir(str(PROJECT_ROOT / "conf"), version_base="1.3"):
            config = hydra.compose("config", overrides=argv, return_hydra_config=True)
        own = config.hydra
        with open_dict(config):
            del config["hydra"]
        if own.mode is RunMode.MULTIRUN:
            return False
        origins = trace_settings(argv, own.runtime.choices)
        # It says nothing before it has found everything right, and writes nothing.
        run_task(read_config(config), run_dir=RunDir(Path()), argv=argv, origins=origins)
    except (*COMPOSE_ERRORS, UserError):
        return False
    finally:
        GlobalHydra.instance().clear()
        gc.enable()
    return True


if __name__ == "__main__":
    exit_code = main()
    ignore_signals()
    sys.exit(exit_code)
