"""Models and tables of benchmarks/throughput.py."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from operator import truediv
from pathlib import Path
from statistics import median
from typing import Any

BLOCKS = {
    "defaults": ("ours", "trainer", "bare"),
    "best": ("ours_best", "trainer_compile", "bare_compile"),
}
"""The arms that take turns, ours first; ratios are to the two others."""


@dataclass(frozen=True)
class Size:
    """A model's shape."""

    base: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    warmup_steps: int
    """Steps before the first turn."""

    @property
    def overrides(self) -> list[str]:
        """Overrides that select it."""
        return f"""model={self.base} model.vocab_size={self.vocab_size}
            model.hidden_size={self.hidden_size} model.intermediate_size={self.intermediate_size}
            model.num_hidden_layers={self.num_layers} model.num_attention_heads={self.num_heads}
            model.max_position_embeddings=2048""".split()

    def flops_per_token(self, sequence_length: int) -> int:
        """Operations of forward and backward for one token: 6 N + 6 L D T.

        N is without the embedding, which is a lookup; attention is causal, so half of the 12 L D T
        of arXiv 2204.02311, appendix B.
        """
        width = self.hidden_size
        layer = 4 * width**2 + 3 * width * self.intermediate_size
        products = self.num_layers * layer + self.vocab_size * width
        return 6 * products + 6 * self.num_layers * width * sequence_length


SIZES = {
    "6m": Size("tiny", 4096, 256, 704, 4, 4, 5),
    "35m": Size("tiny", 32_000, 384, 1024, 6, 6, 5),
    "125m": Size("130m", 32_000, 768, 2048, 12, 12, 3),
    "1b": Size("tiny", 32_000, 2048, 5632, 16, 16, 3),
}


def render_table(result: Mapping[str, Any]) -> str:
    """A cell's table, as text: medians over the rounds, of ratios within a round."""
    lines = [f"{result['size']}, sequences of {result['sequence_length']}"]
    heads = ("tokens/s", "MFU", "/trainer", "/bare", "peak MiB", "1st step s")
    lines.append(f"{'arm':16}" + "".join(f"{head:>12}" for head in heads))
    for block, found in result["blocks"].items():
        arms = found["arms"]
        _, trainer, bare = BLOCKS[block]
        peaks = [1e9 * ceiling / result["flops_per_token"] for ceiling in found["ceiling_gflops"]]
        for name, arm in arms.items():
            rates = arm["tokens_per_s"]
            mfu, to_trainer, to_bare = (
                f"{median(map(truediv, rates, others)):.2f}" if others else "-"
                for others in (
                    peaks,
                    *(arms.get(o, {}).get("tokens_per_s") for o in (trainer, bare)),
                )
            )
            speed, memory = f"{median(rates):,.0f}", f"{arm['peak_bytes'] / 2**20:,.0f}"
            cells = (speed, mfu, to_trainer, to_bare, memory, f"{arm['first_step_s']:.1f}")
            lines.append(f"{name:16}" + "".join(f"{cell:>12}" for cell in cells))
    lines += [
        f"{block}: ceiling {median(found['ceiling_gflops']):,.0f} GFLOP/s (median); losses differ"
        f" by at most {found['largest_loss_difference']:.4f} (tolerance {found['tolerance']})"
        for block, found in result["blocks"].items()
    ]
    return "\n".join(lines)


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a cell's file; the blocks in it that were not run again stay."""
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))["blocks"]
        result = {**result, "blocks": {**old, **result["blocks"]}}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)
