"""README.md of an export: what the model is, from the files of its run."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_pretrain.checkpoint.manifest import METRICS, Manifest
from llama_pretrain.config.precision import Precision
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.files import read_json
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import EvaluationRow, Row, last, last_value, read_metrics
from llama_pretrain.runs.provenance import PACKAGES

Values = dict[str, Any]
CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

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

## Reproduce it

```bash
{reproduce}
```

The settings of the run are in its `snapshot.yaml`. `export.json` has the hashes of all files.
"""


def render_card(
    run: ResolvedRun, run_dir: RunDir, checkpoint: Path, manifest: Manifest, *, difference: float
) -> str:
    """The model card. Facts whose file is missing are left out.

    Args:
        difference: of the export's logits from the training engine's, over the largest or 1.
    """
    rows = read_metrics(checkpoint / METRICS)
    plan, provenance = read_json(run_dir.plan) or {}, read_json(run_dir.provenance) or {}
    facts = [*_run_facts(run, manifest, plan), *_result_facts(rows, provenance)]
    facts.append(("exported", f"logits within {difference:.2g} of the training engine's"))
    path = run_dir.path.resolve()
    return CARD.format(
        name=path.name,
        table="\n".join(f"| {name} | {value} |" for name, value in facts),
        reproduce=shlex.join(["python", "run.py", f"reproduce={path}"]),
    )


def describe_precision(precision: Precision) -> str:
    """`bf16`, or `fp32 with autocast to bfloat16`."""
    autocast = precision.torch_autocast
    suffix = f" with autocast to {autocast.dtype.value}" if autocast.enabled else ""
    return f"{precision.name.value}{suffix}"


def _run_facts(run: ResolvedRun, manifest: Manifest, plan: Values) -> Iterator[tuple[str, str]]:
    yield "model", run.model.name
    if size := plan.get("parameters"):
        yield "parameters", f"{size['decayed'] + size['not_decayed']:,}"
    yield "step", f"{manifest.step:,}"
    length = run.data.sequence_length
    yield "tokens seen", f"{manifest.consumed_samples * length:,} in sequences of {length:,}"
    names = [source["name"] for source in (plan.get("corpus") or {}).get("sources", [])]
    sources = f" ({', '.join(names)})" if len(names) > 1 else ""
    digest = f", hash {run.data.hash}" if run.data.hash is not None else ""
    yield "data", f"{run.data.name.value}{sources}{digest}"
    yield "precision", describe_precision(run.precision)
    schedule = f"{run.schedule.name.value} from {run.optim.learning_rate:g}"
    decay = f"weight decay {run.optim.weight_decay:g}"
    yield "optimizer", f"{run.optim.name.value}, {schedule}, {decay}"
    yield "global batch size", f"{manifest.global_batch_size:,}"
    yield "ranks", f"{manifest.world_size:,}, ZeRO stage {manifest.zero_stage}"
    yield "seed", str(run.seed)


def _result_facts(rows: list[Row], provenance: Values) -> Iterator[tuple[str, str]]:
    loss = last_value(rows, "loss")
    if loss is not None:
        yield "training loss", f"{loss:.4f} at this step"
    found = last(rows, EvaluationRow)
    if found is not None:
        more = f"perplexity {found.perplexity:.4g}, {found.bits_per_byte:.4f} bits per byte"
        yield "held-out loss", f"{found.eval_loss:.4f} at step {found.step:,} ({more})"
    packages = {"python": provenance.get("python")}
    packages |= {name: provenance.get("packages", {}).get(name) for name in PACKAGES}
    if versions := [f"{name} {version}" for name, version in packages.items() if version]:
        yield "versions", ", ".join(versions)
    if commit := provenance.get("git_commit"):
        changed = ", with changed files" if provenance.get("git_changed_files") else ""
        yield "code", f"{commit}{changed}"
