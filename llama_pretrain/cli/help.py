"""The page of `python run.py --help`: ten commands, the groups, and where to read on."""

import textwrap

from llama_pretrain.config.compose import PROJECT_ROOT

COMMANDS = (
    ("python run.py", "train a small model on what is here"),
    ("python run.py debug=smoke", "a few steps through every station"),
    ("python run.py task=plan model=llama2_7b zero=stage3", "plan, start nothing"),
    ("python run.py zero=stage3 optim=cpu_adam launch.num_processes=2", ""),
    ("python run.py model=60m data=text data.paths=[corpus/*.txt]", "your own text"),
    ("python run.py model=pretrained model.path=DIR tokenizer=pretrained tokenizer.path=DIR", ""),
    ("python run.py train.max_steps=null train.max_tokens=2_000_000 optim.learning_rate=1e-3", ""),
    ("python run.py hydra.run.dir=runs/first", "choose the run directory"),
    ("python run.py resume=runs/first", "resume from its newest checkpoint"),
    ("python run.py -m zero=stage1,stage2,stage3 batch.micro_batch_size=2,4,8", "a sweep"),
)


def list_options() -> dict[str, list[str]]:
    """Every group of conf/ and sweeps/ with the names of its options."""
    files = [*(PROJECT_ROOT / "conf").glob("*/*.yaml"), *(PROJECT_ROOT / "sweeps").glob("*/*.yaml")]
    groups: dict[str, list[str]] = {}
    for path in sorted(files):
        groups.setdefault(path.parent.name, []).append(path.stem)
    return dict(sorted(groups.items()))


def render_help() -> str:
    """The page, at most 100 columns wide."""
    lines = [
        "Pretrain a LLaMA with DeepSpeed: config -> plan -> a trained, reproducible run.",
        "",
        "python run.py [GROUP=OPTION]... [SETTING=VALUE]...",
        "",
        "Ten useful commands",
    ]
    lines += [f"  {command:<52}  {meaning}".rstrip() for command, meaning in COMMANDS]
    lines += ["", "Groups and their options (GROUP=OPTION)"]
    for group, options in list_options().items():
        text = f"{group}: {', '.join(options)}"
        lines += textwrap.wrap(text, 98, initial_indent="  ", subsequent_indent="    ")
    lines += [
        "",
        "Settings: docs/configuration.md, or python run.py --cfg job. A sweep needs -m.",
        "Our settings for a DeepSpeed JSON of yours: python run.py import_deepspeed=FILE",
        "Hydra's own flags: python run.py --hydra-help.",
        'Tab completion in bash: eval "$(python run.py -sc install=bash)"',
    ]
    return "\n".join(lines)
