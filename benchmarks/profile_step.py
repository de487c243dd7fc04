"""Where the time of a step goes, by what it is spent on.

    python benchmarks/profile_step.py [--sizes 6m 35m 125m] [--rows 512 2048]

Each is `python run.py ... train.profile_steps=2`, with kernels=plain and with the default ones; of
torch's trace of rank 0 each operator's own time is added to the part of the step that it belongs
to. Waiting for the other rank counts as communication.
"""

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import train_alone, write_record
from benchmarks.throughput_report import SIZES
from benchmarks.turns import TOKENS_PER_STEP

STEPS = 2
PARTS: dict[str, tuple[str, ...]] = {
    "attention": ("scaled_dot_product", "blocked_attention"),
    "loss": ("LinearCrossEntropy", "log_softmax", "LogSoftmax", "nll_loss", "NllLoss"),
    "norms": ("RmsNorm",),
    "rotary": ("Rotate",),
    "swiglu": ("SwiGlu", "aten::silu", "SiluBackward"),
    "optimizer": ("_fused_adamw_", "Optimizer.step"),
    "communication": ("gloo:", "c10d::", "record_param_comms"),
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::matmul"),
}
"""Names of operators by part; the outermost that is named decides, and the first part wins."""
REST = "elementwise, copies, rest"


def part_of(name: str) -> str | None:
    """The part that an operator belongs to by its name alone."""
    for part, names in PARTS.items():
        if any(text in name for text in names):
            return part
    return None


def own_times(events: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """Part and own microseconds of each operator of one thread.

    An operator's own time is its time less that of those that it calls.
    """
    stack: list[tuple[float, str, float, float]] = []  # end, part, length, length of the called

    def leave(until: float) -> Iterator[tuple[str, float]]:
        while stack and stack[-1][0] <= until:
            _, part, length, called = stack.pop()
            yield part, length - called
            if stack:
                end, outer, outer_length, outer_called = stack[-1]
                stack[-1] = (end, outer, outer_length, outer_called + length)

    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        yield from leave(event["ts"])
        outer = stack[-1][1] if stack else REST
        part = outer if outer != REST else part_of(event["name"]) or REST
        stack.append((event["ts"] + event["dur"], part, event["dur"], 0.0))
    yield from leave(float("inf"))


def read_trace(path: Path) -> dict[str, float]:
    """Milliseconds of a step by part, from a trace of STEPS steps."""
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    threads: dict[Any, list[Any]] = defaultdict(list)
    for event in events:
        timed = event.get("ph") == "X" and event.get("cat") in ("cpu_op", "user_annotation")
        if timed and not event["name"].startswith("ProfilerStep"):
            threads[event["tid"]].append(event)
    spent: dict[str, float] = defaultdict(float)
    for own in threads.values():
        for part, microseconds in own_times(own):
            spent[part] += microseconds / 1000 / STEPS
    return dict(spent)


def measure(size: str, row: int, kernels: str) -> dict[str, float]:
    """Milliseconds of a step by part.

    Raises:
        SystemExit: if the run fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        train_alone(
            run_dir,
            *SIZES[size].words,
            f"kernels={kernels}",
            f"data.sequence_length={row}",
            f"batch.global_batch_size={TOKENS_PER_STEP['cpu'] // row}",
            "train.max_steps=6",
            f"train.profile_steps={STEPS}",
        )
        (trace,) = (run_dir / "profile").glob("*.json")
        return read_trace(trace)


def main() -> None:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rows", nargs="+", type=int, default=[512, 2048])
    options = parser.parse_args()
    found = []
    parts = [*PARTS, REST]
    print(f"{'ms a step':28}" + "".join(f"{part[:12]:>14}" for part in parts) + f"{'all':>10}")
    for size in options.sizes:
        for row in options.rows:
            for kernels in ("plain", "auto"):
                spent = measure(size, row, kernels)
                found.append({"size": size, "row": row, "kernels": kernels, "ms": spent})
                name = f"{size}, rows of {row}, {kernels}"
                cells = "".join(f"{spent.get(part, 0.0):>14,.0f}" for part in parts)
                print(f"{name:28}{cells}{sum(spent.values()):>10,.0f}", flush=True)
    write_record("profile", {"profiles": found}, packages=("torch", "transformers", "deepspeed"))


if __name__ == "__main__":
    main()
