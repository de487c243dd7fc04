"""The entry point of a rank: `python -m llama_pretrain.train.worker RUN_DIR [CHECKPOINT]`.

It takes everything that it trains with from the run directory.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from llama_pretrain.files import open_regular
from llama_pretrain.process import Heartbeat, StopRequest, die_with_parent, ignore_lost_output
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.phases import read_phases


def begin(arguments: Sequence[str]) -> NoReturn:
    """Run a rank, in a fresh interpreter or in a forked process, and exit.

    Args:
        arguments: the run directory and, optionally, the checkpoint to load.
    """
    # Before slow imports: a signal must find its handler.
    die_with_parent()
    stop = StopRequest()
    stop.install()
    run_dir, index = RunDir(Path(arguments[0])), int(os.environ["RANK"])
    phases = read_phases(run_dir)
    phases.end("spawn")
    checkpoint = Path(arguments[1]) if len(arguments) > 1 else None
    redirect_output(run_dir.rank_log(index))
    ignore_lost_output()  # a full disk must not end the training
    node, slot = int(os.environ["GROUP_RANK"]), int(os.environ["LOCAL_RANK"])
    heartbeat = Heartbeat(run_dir.heartbeats(node), slot)
    code = 1
    try:
        # Imports torch, which takes a second: after the handlers and the log are in place.
        from torch.distributed.elastic.multiprocessing.errors import record

        def work() -> None:
            # Here, so that a failed import of a library is recorded too.
            from llama_pretrain.train.rank import run_rank

            run_rank(run_dir, checkpoint, stop, heartbeat, phases)

        record(work)()  # writes an error to the file where the launcher looks for it
        code = 0
        heartbeat.finish()
    except BaseException:
        traceback.print_exc()
    finally:
        # At the interpreter's exit, Gloo's threads abort some processes and NCCL's wait for other
        # ranks. Everything is written by now: exit without it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def redirect_output(log: Path) -> None:
    """Redirect all output, including that of C++ libraries, to this rank's log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = open_regular(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


if __name__ == "__main__":
    begin(sys.argv[1:])
