"""The environment that ranks start with: one of the two places that read ours."""

import math
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from llama_pretrain.config.compose import PROJECT_ROOT
from llama_pretrain.config.kernels import Allocator, CompiledPart
from llama_pretrain.config.launch import Device
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.run import Run
from llama_pretrain.launch.ahead import KEEP_IMPORTS

KEEP = ":".join(
    (
        f"glibc.malloc.mmap_threshold={1 << 32}",
        f"glibc.malloc.trim_threshold={1 << 42}",
        # Without it glibc before 2.38 never gives an aligned block out again: its ends, which are
        # cached, don't grow together with it.
        "glibc.malloc.tcache_count=0",
    )
)
"""glibc's tunables by which what was freed stays with the process."""


OF_A_SHELL = re.compile(r"_|PWD|OLDPWD|SHLVL|COLUMNS|LINES|TERM|PYTEST_\w+")
"""Variables that differ from command to command, and that nobody reads as modules are imported."""


def seconds_kept() -> float:
    """For how long a process with the imports of ranks waits for the next command; 0 = none does.

    Raises:
        UserError: if it is no number.
    """
    given = os.environ.get(KEEP_IMPORTS) or "0"
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        message = f"is a number of seconds (got {given})"
        raise UserError([Problem(path=KEEP_IMPORTS, message=message)])
    return seconds


def read_at_import(values: Mapping[str, str]) -> dict[str, str]:
    """The environment with these values, as far as an import may depend on it."""
    whole = {**os.environ, **values}
    return {key: value for key, value in whole.items() if OF_A_SHELL.fullmatch(key) is None}


def extensions_dir(run: Run) -> Path:
    """Where DeepSpeed's compiled operators are kept."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder = Path(run.data.cache_dir).expanduser().resolve() / "torch_extensions"
    if given is not None:
        folder = Path(given)
    # Some have a build for each device, by the same name.
    return folder / "cuda" if run.launch.device is Device.cuda else folder


def worker_environment(run: Run) -> dict[str, str]:
    """What ranks need beside our own environment."""
    paths = [str(PROJECT_ROOT), os.environ.get("PYTHONPATH", "")]
    values = {
        # ninja, which compiles operators, may lie beside the interpreter and off the PATH
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": str(run.launch.threads_per_process),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",  # everything a rank reads is a file
        "TORCH_EXTENSIONS_DIR": str(extensions_dir(run)),
        "PYTHONWARNINGS": "ignore::FutureWarning:torch.distributed.c10d_logger",
    }
    if run.launch.device is Device.cpu:
        values["DS_ACCELERATOR"] = "cpu"
        values["CUDA_VISIBLE_DEVICES"] = ""
    if run.kernels.compile is not CompiledPart.none:  # kept, as operators are
        values["TORCHINDUCTOR_CACHE_DIR"] = str(extensions_dir(run) / "inductor")
    elif run.launch.device is Device.cpu:
        # DeepSpeed compiles Muon's update: half a minute at each start, and a C++ compiler
        values["TORCHDYNAMO_DISABLE"] = "1"
    if run.launch.malloc_mmap_threshold is not None:
        values["MALLOC_MMAP_THRESHOLD_"] = str(run.launch.malloc_mmap_threshold)
    elif run.kernels.allocator is Allocator.keep:
        values["GLIBC_TUNABLES"] = ":".join(filter(None, (KEEP, os.environ.get("GLIBC_TUNABLES"))))
    return values
