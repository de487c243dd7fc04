"""One rank: model, optimizer, engine, loop. Started by llama_pretrain.launch, reads a run directory."""
