"""Tasks in worker processes."""

import multiprocessing
import time

from llama_pretrain.data.pool import AddProgress, run_tasks


def double(job: int, task: int, add: AddProgress) -> int:
    add(1, 1)
    return job * task


def test_only_the_workers_of_the_pool_are_killed() -> None:
    """A process that something else started, like joblib's launcher, lives on."""
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    other.start()
    try:
        results = run_tasks(double, 2, [1, 2, 3], processes=2, show=lambda *progress: None)
        next(results)
        workers = set(multiprocessing.active_children()) - {other}
        results.close()
        assert len(workers) == 2
        # The pool's own thread may have waited for a worker, but not noted that yet.
        end = time.monotonic() + 10
        while any(worker.is_alive() for worker in workers):
            assert time.monotonic() < end
            time.sleep(0.05)
        assert other.is_alive()
    finally:
        other.kill()
        other.join()
