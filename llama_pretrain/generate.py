"""Continue a prompt with an exported model."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def generate_sample(export: Path, prompt: str, *, num_tokens: int, seed: int) -> str:
    """The prompt and its continuation, sampled at temperature 0.8 on the CPU."""
    tokenizer = AutoTokenizer.from_pretrained(export)
    model: Any = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    tokens = model.generate(
        **inputs, max_new_tokens=num_tokens, do_sample=True, temperature=0.8, top_k=50
    )
    torch.set_rng_state(state)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))
