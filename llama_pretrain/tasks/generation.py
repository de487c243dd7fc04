"""Continue a prompt with an exported model."""

from pathlib import Path
from typing import Any

import torch

from llama_pretrain.checkpoint.export import quiet_transformers
from llama_pretrain.checkpoint.huggingface import load_model, load_tokenizer
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.tasks import Generate


def continue_prompt(export: Path, settings: Generate, *, seed: int, device: str = "cpu") -> str:
    """The prompt and its continuation, the same for the same seed on the same kind of device.

    Weights are in fp32 on a CPU, where 16 bits would be slower, and in the export's own precision
    on a GPU. An empty prompt begins a document.

    Raises:
        UserError: if it would be longer than the model is made for.
    """
    quiet_transformers()
    tokenizer = load_tokenizer(export)
    model = load_model(export, dtype=torch.float32 if device == "cpu" else "auto")
    model.to(device)
    ids = tokenizer(settings.prompt, return_token_type_ids=False).input_ids
    ids = ids or [tokenizer.eos_token_id]
    longest = model.config.max_position_embeddings
    if len(ids) + settings.num_tokens > longest:
        message = f"is too much after a prompt of {len(ids)} tokens: the model is made for"
        message += f" {longest} (got {settings.num_tokens})"
        problem = Problem(path="generate.num_tokens", message=message, hint="lower it")
        raise UserError([problem])
    inputs = torch.tensor([ids], device=device)
    drawn: dict[str, Any] = {"do_sample": False}
    if settings.temperature > 0:
        drawn = {"do_sample": True, "temperature": settings.temperature}
        drawn |= {"top_k": settings.top_k or 0, "top_p": settings.top_p}
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    tokens = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=settings.num_tokens,
        **drawn,
    )
    torch.set_rng_state(state)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))
