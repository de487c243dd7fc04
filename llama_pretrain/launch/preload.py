"""Isolate multiprocessing's forkserver, and import what ranks need. Only the server imports this:
its interface is that a module does its work when it is imported."""

import gc
import os
import signal

from llama_pretrain.process import PARENT, STOPPING, die_with_parent


def isolate() -> None:
    """Detach the server from the terminal, and bind its life to the launcher's."""
    die_with_parent()
    os.environ[PARENT] = str(os.getpid())  # for ranks
    os.setsid()  # a terminal's Ctrl-C is for the launcher, which tells the ranks
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # a rank has its own log
        os.dup2(null, descriptor)
    os.close(null)


def import_libraries() -> None:
    """Import everything that a rank would import.

    Raises:
        ImportError: if anything fails. The server continues, and ranks become fresh interpreters,
            whose logs show the error.
    """
    gc.disable()  # imports create many objects and drop few: a sixth of their time
    try:  # imported here because `isolate` comes first
        import deepspeed  # noqa: F401
        from torch.distributed.elastic.multiprocessing.errors import record  # noqa: F401
        from transformers import LlamaForCausalLM  # noqa: F401

        import llama_pretrain.train.rank  # noqa: F401
    except Exception as error:
        raise ImportError("the libraries of a rank") from error
    # A collection in a rank would write to the pages of these objects, and so copy them.
    gc.freeze()
    gc.enable()


isolate()
import_libraries()
