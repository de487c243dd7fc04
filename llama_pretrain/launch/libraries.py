"""Import everything that a rank would import, in the server that ranks are forked from.

If anything fails, the server skips this module and continues: ranks become fresh interpreters,
whose logs show the error.
"""

import gc

gc.disable()  # imports create many objects and drop few: a sixth of their time
try:
    import deepspeed  # noqa: F401
    from torch.distributed.elastic.multiprocessing.errors import record  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    import llama_pretrain.train.rank  # noqa: F401
except Exception as error:  # the server expects no other
    raise ImportError("the libraries of a rank") from error
# A collection in a rank would write to the pages of these objects, and so copy them.
gc.freeze()
gc.enable()
