"""README.md of an export: what the model is, from the files of its run."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_pretrain.checkpoint.manifest import METRICS, Manifest
from llama_pretrain.config.run import Run
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import read_metrics
from llama_pretrain.runs.provenance import PACKAGES

Row = dict[str, Any]


def render_card(
    run: Run, run_dir: RunDir, checkpoint: Path, manifest: Manifest, *, difference: float
) -> str:
    """The model card. Facts that a file doesn't tell are left out.

    Args:
        difference: between the export's logits and the training engine's, over the largest or 1.
    """
    rows = read_metrics(checkpoint / METRICS)
    plan, provenance = _load(run_dir.plan), _load(run_dir.provenance)
    facts = list(_facts(run, manifest, rows, plan, provenance))
    facts.append(("exported", f"logits within {difference:.2g} of the training engine's"))
    table = "\n".join(f"| {name} | {value} |" for name, value in facts)
    again = shlex.join(["python", "run.py", f"reproduce={run_dir.path.resolve()}"])
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {run_dir.path.resolve().name}

A LLaMA, pretrained with llama-pretrain.

| | |
|---|---|
{table}

## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("DIR")  # this folder
model = AutoModelForCausalLM.from_pretrained("DIR", dtype="auto")
```

## Train it again

```bash
{again}
```

The settings of the run are in its `snapshot.yaml`. `export.json` has the hashes of all files.
"""


def _load(path: Path) -> Row:
    """A JSON file's mapping; empty where there is no file."""
    values: Row = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return values


def _facts(
    run: Run, manifest: Manifest, rows: list[Row], plan: Row, provenance: Row
) -> Iterator[tuple[str, str]]:
    """Name and text of each fact, as rows of a table."""
    yield "model", run.model.name
    size = plan.get("parameters", {})
    if size:
        yield "parameters", f"{size['decayed'] + size['not_decayed']:,}"
    rows_seen, length = manifest.consumed_samples, run.data.sequence_length
    yield "step", f"{manifest.step:,}"
    yield "tokens seen", f"{rows_seen * length:,} in rows of {length:,}"
    names = [source["name"] for source in (plan.get("corpus") or {}).get("sources", [])]
    of = f" ({', '.join(names)})" if len(names) > 1 else ""
    digest = f", hash {run.data.hash}" if run.data.hash is not None else ""
    yield "data", f"{run.data.name.value}{of}{digest}"
    autocast = run.precision.torch_autocast
    casts = f", autocast to {autocast.dtype.value}" if autocast.enabled else ""
    yield "precision", f"{run.precision.name.value}{casts}"
    schedule = f"{run.schedule.name.value} from {run.optim.learning_rate:g}"
    yield (
        "optimizer",
        f"{run.optim.name.value}, {schedule}, weight decay {run.optim.weight_decay:g}",
    )
    yield "rows of a step", f"{manifest.global_batch_size:,}"
    yield "ranks", f"{manifest.world_size:,}, ZeRO stage {manifest.zero_stage}"
    yield "seed", str(run.seed)
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    if losses:
        yield "training loss", f"{losses[-1]:.4f} at this step"
    evaluation = next((row for row in reversed(rows) if "eval_loss" in row), None)
    if evaluation is not None:
        at, loss = evaluation["step"], evaluation["eval_loss"]
        more = f"perplexity {evaluation['perplexity']:.4g}"
        more += f", {evaluation['bits_per_byte']:.4f} bits per byte"
        yield "held-out loss", f"{loss:.4f} at step {at:,} ({more})"
    noted = provenance.get("packages", {})
    packages = {"python": provenance.get("python")}
    packages |= {name: noted.get(name) for name in PACKAGES}
    versions = [f"{name} {version}" for name, version in packages.items() if version]
    if versions:
        yield "versions", ", ".join(versions)
    if provenance.get("git_commit"):
        changed = ", with changed files" if provenance.get("git_changed_files") else ""
        yield "code", f"{provenance['git_commit']}{changed}"
