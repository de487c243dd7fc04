"""The environment that ranks start with."""

import os
from pathlib import Path

from llama_pretrain.config.kernels import Allocator, CompiledPart
from llama_pretrain.config.launch import Device
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.launch.server import import_environment


def extensions_dir(run: ResolvedRun) -> Path:
    """The cache of DeepSpeed's compiled operators."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder = Path(run.data.cache_dir).expanduser().resolve() / "torch_extensions"
    if given is not None:
        folder = Path(given)
    # Some operators have a build for each device, of the same name.
    return folder / "cuda" if run.launch.device is Device.cuda else folder


def worker_environment(run: ResolvedRun) -> dict[str, str]:
    """What ranks need beside the environment of the command."""
    compiling = run.kernels.compile is not CompiledPart.none
    threshold = run.launch.malloc_mmap_threshold
    values = {
        **import_environment(
            on_gpu=run.launch.device is Device.cuda,
            keep_memory=run.kernels.allocator is Allocator.keep and threshold is None,
            compiling=compiling,
        ),
        "OMP_NUM_THREADS": str(run.launch.threads_per_process),
        "TORCH_EXTENSIONS_DIR": str(extensions_dir(run)),
    }
    if compiling:  # cached as operators are
        values["TORCHINDUCTOR_CACHE_DIR"] = str(extensions_dir(run) / "inductor")
    if threshold is not None:
        values["MALLOC_MMAP_THRESHOLD_"] = str(threshold)
    return values
