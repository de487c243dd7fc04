"""Turn a plan into worker processes on this machine, and supervise them."""
