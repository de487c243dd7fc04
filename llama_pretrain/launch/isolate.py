"""Detach multiprocessing's forkserver from the terminal, and bind its life to the launcher's.

The server imports this first: its interface is that a module does its work when it is imported.
"""

import os
import signal

from llama_pretrain.process import PARENT, SAVE, STOPPING, die_with_parent

die_with_parent()
os.environ[PARENT] = str(os.getpid())  # for ranks
os.setsid()  # a terminal's Ctrl-C is for the launcher, which tells the ranks
for number in (*STOPPING, SAVE):  # a scheduler may send them to every process
    signal.signal(number, signal.SIG_IGN)
null = os.open(os.devnull, os.O_RDWR)
for descriptor in (0, 1, 2):  # a rank has its own log
    os.dup2(null, descriptor)
os.close(null)
