"""task=generate: continue a prompt with a finished run's model."""

from pathlib import Path

from llama_pretrain import console
from llama_pretrain.config.launch import Device
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.tasks import Generate
from llama_pretrain.plan.machine import detect_machine
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.tasks.export import export, pick_checkpoint


def generate(run: ResolvedRun, source: RunDir) -> None:
    """Print the prompt and its continuation, and nothing else, on standard output."""
    if not (source.export / "config.json").is_file():
        checkpoint = pick_checkpoint(run, source)
        export(run, source, checkpoint, source.export, say=console.note)
    device = run.launch.device
    if device is Device.cuda and not detect_machine().num_gpus:
        console.note("no GPU is present: generating on the CPU")
        device = Device.cpu
    print(continue_text(source.export, run.generate, seed=run.seed, device=device), flush=True)


def continue_text(model: Path, settings: Generate, *, seed: int, device: Device) -> str:
    """A prompt and its continuation by an exported model."""
    # torch and transformers take seconds to import
    from llama_pretrain.tasks.generation import continue_prompt

    return continue_prompt(model, settings, seed=seed, device=device.value)
