"""docs/configuration.md, made from the schema and the YAML files of conf/ and sweeps/.

python -m llama_pretrain.config.document > docs/configuration.md
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llama_pretrain.config.validate import flatten

ROOT = Path(__file__).resolve().parents[2]
SCHEMA_FILES = [
    Path(__file__).with_name(f"{name}.py") for name in ("fields", "deepspeed", "data", "schema")
]
OVERLAYS = {"experiment": "conf", "sweep": "sweeps", "debug": "conf"}
"""Groups that set values all over the config, and the folder that holds each."""

INTRODUCTION = """\
# Configuration

This page is made from `llama_pretrain/config/schema.py`, `data.py` and `deepspeed.py`, `conf/` and
`sweeps/` by `python -m llama_pretrain.config.document > docs/configuration.md`. Edit those files,
not this one; a test compares the two.

## How a run is composed

A run is one tree of settings. [Hydra](https://hydra.cc) composes it in this order; what comes
later wins:

1. The schema gives every setting a type and a default.
2. Each group contributes one option, a file `conf/GROUP/OPTION.yaml`. `conf/config.yaml` names the
   default options.
3. `conf/config.yaml` sets a few values itself.
4. The overlays `experiment`, `sweep` and `debug` apply in that order. An overlay may set values in
   every group and choose other options. None is on by default.
5. The command line has the last word.

| on the command line | meaning |
|---|---|
| `zero=stage3` | choose an option of a group |
| `optim.learning_rate=1e-3` | set a value |
| `train.max_steps=null` | set no value, where the type allows `null` |
| `train.max_tokens=50_000_000` | integers may have underscores; an integer setting refuses `5e7` |
| `'data.paths=[a.txt,b/*.jsonl]'` | a list; the quotes are for the shell |
| `+zero.extra.KEY=VALUE` | add a key to one of the two open mappings |
| `'+data.sources={NAME:{name:text,paths:[FILES]}}'` | add a source to a mixture |
| `debug=smoke`, `'debug=[smoke,profile]'` | apply one overlay, or several of one group in order |
| `-m zero=stage1,stage2 seed=1,2` | a run for each combination, one after another |
| `hydra.run.dir=DIR` | choose the run directory; `hydra.sweep.dir=DIR` for the parent with `-m` |

`python run.py --help` lists the groups. `python run.py --cfg job` prints the composed tree and
stops. `python run.py task=plan` prints the tree, the plan and the DeepSpeed JSON and stops.

## What the machine decides

Some settings may be left open. The launching process decides them before anything starts and
writes the decision into `snapshot.yaml`:

| setting | left open as | decided as |
|---|---|---|
| `launch.device` | `auto` | `cuda` if torch was built for CUDA and a GPU is there, or if \
`task=plan` plans several machines, else `cpu` |
| `launch.num_processes` | `null` | the number of GPUs; on a CPU 2, or 1 if there is a single core |
| `launch.threads_per_process` | `null` | the cores divided by the processes, at least 1 |
| `launch.bind_cores` | `null` | `true` on a CPU where ranks and their threads take all cores |
| `launch.device_memory` | `null` | the GPU's memory (80 GiB where none is here); on a CPU a \
rank's share of the host's |
| `batch` | all four `null` | 16 rows a step, or the next number that the ranks divide |
| `precision.name` | `auto` | `bf16` where it is native, else `fp32`; `fp32` with `torch_autocast` |
| `optim.name` | `adamw` | `cpu_adam` where optimizer state is offloaded, else `torch_adamw` |
| `optim.name` | `lion` | `cpu_lion` where optimizer state is offloaded or there is no GPU, else \
`fused_lion` |
| `kernels.attention` | `auto` | `blocked` in bf16 on a CPU that isn't Intel's, \
`flash_attention_2` on CUDA where it is installed, else `sdpa` |
| `kernels.loss` | `auto` | `chunked`, but `plain` for fp16 and autocast |
| `kernels.rms_norm`, `rotary`, `swiglu` | `auto` | `fused` on a CPU, `liger` on CUDA where it is \
installed; `plain` with `kernels.compile` and autocast |
| `kernels.matmul` | `auto` | `fp32` on a CPU that is slow in 16 bits, else `plain` |
| `kernels.allocator` | `auto` | `keep` on a CPU |
| `checkpoint.asynchronous` | `null` | where there are saves before the last step, and room for \
the copy |
| `train.gradient_clipping` | `null` | 1.0, but 0 with `optim=muon` |
| `zero.reduce_scatter` | `null` | `true`, but for `optim=muon` at stage 3 |
| `zero.reduce_bucket_size` | `null` | hidden_size^2 at stage 3, else 500,000,000 |
| `zero.stage3_prefetch_bucket_size` | `null` | 0.9 * hidden_size^2 |
| `zero.stage3_param_persistence_threshold` | `null` | 10 * hidden_size |
| `zero.zero_hpz_partition_size` | `null` | the processes of a machine |

With `model.path` the shape of the model is read from the checkpoint's `config.json`.

## Mistakes

Every problem that the config alone shows is told at once, each with its dotted path, what was
seen, and what to do. The exit code is 1 and nothing is started:

```text
$ python run.py precision=fp16 batch.global_batch_size=15 optim.lr=1 launch.device=cpu
3 problems, nothing was started:
  optim.lr: there is no such setting (got optim.lr=1); did you mean optim.eps?
  precision: DeepSpeed has no fp16 on a CPU (got fp16); add precision=bf16 or precision=fp32
  batch.global_batch_size: does not divide by 2 ranks (got 15); nearest global = micro x \
accumulation x ranks: 14 = 7 x 1 x 2, 16 = 8 x 1 x 2
```

A key added with `+` is checked too. Text is read only after the config is found sound, so problems
of the data are told on their own. With `-m`, a point that these checks refuse or whose ranks fail
is reported, the others run, and the exit code is 1. A point that Hydra itself cannot compose (an
unknown key, a wrong type) ends the whole command before its first run.

## Snapshots: resume and reproduce

Each run directory holds `snapshot.yaml`: the whole tree, every value resolved. Ranks read it, and
it can start a run:

- `python run.py resume=DIR` goes on in `DIR` from its newest complete checkpoint. Settings may be
  added, for example `train.max_steps=400`. Refused is a change of `model`, `optim`, `seed`,
  `precision`, `zero.stage`, `data.sequence_length`, of the number of ranks, and of the global batch
  size. Whatever else decides which tokens a position has (the text itself, the tokenizer, weights,
  the document mask) is refused by name, unless `resume.allow_data_change=true`.
- `python run.py reproduce=DIR` starts a new run with the same settings in a directory of its own,
  says what has drifted since, and at the end how far the two are equal (docs/reproduce.md).
  Settings may be added.

After both, options of groups may be chosen too: `zero=stage3`. A snapshot that contains a `hydra`
section, `_target_` or `${` is refused before Hydra sees it, because such a file could run code.

## Settings that have no field here

Two open mappings pass keys on to DeepSpeed. Both need `+` on the command line.

- `+zero.extra.KEY=VALUE` adds to the `zero_optimization` section.
- `+deepspeed.extra.KEY=VALUE` adds a top-level key.

Accepted are the keys that DeepSpeed 0.19 knows and that have no setting here. The value `auto` is
refused, because DeepSpeed would take its own default without a word.

## Groups

The column *default* is the schema's. *Default run* is what plain `python run.py` has instead: its
options and `conf/config.yaml` set it; `${oc.env:NAME,VALUE}` is the environment variable `NAME`, or
`VALUE` where it is not set. For an option, *sets* lists all that its file says.
"""


@dataclass(frozen=True, kw_only=True)
class FieldDoc:
    """One field of a schema class, as its source says it."""

    name: str
    annotation: ast.expr
    default: ast.expr | None
    text: str
    """The string under the field; empty where there is none."""


@dataclass(frozen=True, kw_only=True)
class ClassDoc:
    """One schema class."""

    text: str
    fields: list[FieldDoc]


@dataclass(frozen=True, kw_only=True)
class SchemaDoc:
    """What the schema's files define."""

    classes: dict[str, ClassDoc]
    enums: dict[str, dict[str, str]]
    """Enum name -> member name -> value."""
    aliases: dict[str, ast.expr]
    """Named types such as PositiveInt, and named marks such as SHARDED."""


def render_reference() -> str:
    """The text of docs/configuration.md."""
    schema = read_schema(read_sources())
    root_fields = schema.classes["Run"].fields
    defaults = _default_options()
    changed = _default_values(defaults)
    parts = [INTRODUCTION]
    own = [item for item in root_fields if _name(item.annotation) not in schema.classes]
    parts.append("### Of no group\n\n" + _table_of_fields(schema, own, "", changed))
    for item in root_fields:
        kind = schema.classes.get(_name(item.annotation))
        if kind is None:
            continue
        text = f"### `{item.name}`\n\n{kind.text}\n\n"
        text += _table_of_fields(schema, kind.fields, f"{item.name}.", changed)
        options = sorted((ROOT / "conf" / item.name).glob("*.yaml"))
        if options:
            text += "\n" + _table_of_options(item.name, options, defaults.get(item.name))
        parts.append(text)
    parts.append("## Overlays\n\nEach sets values in other groups.\n")
    for group, folder in OVERLAYS.items():
        options = sorted((ROOT / folder / group).glob("*.yaml"))
        parts.append(f"### `{group}`\n\n" + _table_of_options(group, options, None))
    return "\n".join(parts)


def read_sources() -> str:
    """The text of the schema's files, as if they were one."""
    return "\n".join(file.read_text(encoding="utf-8") for file in SCHEMA_FILES)


def read_schema(source: str) -> SchemaDoc:
    """Collect classes marked `@schema`, enums, named types and marks from the schema's text."""
    classes: dict[str, ClassDoc] = {}
    enums: dict[str, dict[str, str]] = {}
    aliases: dict[str, ast.expr] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            if any(_name(decorator) == "schema" for decorator in node.decorator_list):
                text = " ".join((ast.get_docstring(node) or "").split())
                bases = [classes[_name(base)] for base in node.bases]
                fields = [item for base in bases for item in base.fields]
                classes[node.name] = ClassDoc(text=text, fields=[*fields, *_fields(node)])
            elif any(_name(base) == "Enum" for base in node.bases):
                enums[node.name] = {
                    _name(item.targets[0]): str(ast.literal_eval(item.value))
                    for item in node.body
                    if isinstance(item, ast.Assign)
                }
        elif (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and _name(node.value.func) == "Enum"
        ):
            enums[_name(node.targets[0])] = ast.literal_eval(node.value.args[1])
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript | ast.Call):
            aliases[_name(node.targets[0])] = node.value
    return SchemaDoc(classes=classes, enums=enums, aliases=aliases)


def _fields(node: ast.ClassDef) -> Iterator[FieldDoc]:
    following = [*node.body[1:], None]
    for item, after in zip(node.body, following, strict=True):
        if not isinstance(item, ast.AnnAssign):
            continue
        text = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            text = " ".join(str(after.value.value).split())
        yield FieldDoc(
            name=_name(item.target), annotation=item.annotation, default=item.value, text=text
        )


def _name(node: ast.expr) -> str:
    """`Enum` for both `Enum` and `enum.Enum`; empty for what has no name."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _table_of_fields(
    schema: SchemaDoc, fields: Sequence[FieldDoc], prefix: str, changed: Mapping[str, str]
) -> str:
    rows = [
        (
            f"`{path}`",
            render_type(schema, item.annotation),
            f"`{default}`",
            f"`{changed[path]}`" if changed.get(path, default) != default else "",
            item.text,
        )
        for path, item in _leaves(schema, fields, prefix)
        for default in [_render_default(schema, item.default)]
    ]
    return _table(("setting", "type", "default", "default run", "meaning"), rows)


def _leaves(
    schema: SchemaDoc, fields: Sequence[FieldDoc], prefix: str
) -> Iterator[tuple[str, FieldDoc]]:
    for item in fields:
        inner = schema.classes.get(_name(item.annotation))
        if inner is None:
            yield f"{prefix}{item.name}", item
        else:
            yield from _leaves(schema, inner.fields, f"{prefix}{item.name}.")


def render_type(schema: SchemaDoc, node: ast.expr) -> str:
    """A type as a reader wants it: `int > 0 or null`, or the values of an enum."""
    if isinstance(node, ast.BinOp):  # X | None
        return f"{render_type(schema, node.left)} or {render_type(schema, node.right)}"
    if isinstance(node, ast.Constant) and node.value is None:
        return "`null`"
    name = _name(node)
    if name in schema.aliases:
        return render_type(schema, schema.aliases[name])
    if name in schema.enums:
        return ", ".join(f"`{value}`" for value in schema.enums[name].values())
    if isinstance(node, ast.Subscript) and _name(node.value) == "Annotated":
        assert isinstance(node.slice, ast.Tuple)
        kind, *limits = node.slice.elts
        texts = [_render_limit(schema.aliases.get(_name(limit), limit)) for limit in limits]
        return " ".join([render_type(schema, kind), *texts])
    if isinstance(node, ast.Subscript):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if _name(node.value) == "dict":
            return "mapping"
        return f"{_name(node.value)} of {', '.join(render_type(schema, item) for item in inner)}"
    if not name:
        raise ValueError(f"no way to write the type {ast.unparse(node)}")
    return name


def _render_limit(node: ast.expr) -> str:
    """`> 0` for `Gt(0)`; `>= 0, <= 1` for an interval; `(2 items)`, `(stages 1, 2)` for marks."""
    assert isinstance(node, ast.Call)
    signs = {"Gt": ">", "Ge": ">=", "Lt": "<", "Le": "<="}
    kind = _name(node.func)
    values = [ast.unparse(value) for value in node.args]
    if kind in signs:
        return f"{signs[kind]} {values[0]}"
    if kind == "Interval":
        limits = {item.arg or "": ast.unparse(item.value) for item in node.keywords}
        return ", ".join(f"{signs[name.title()]} {value}" for name, value in limits.items())
    if kind == "Len" and len(set(values)) == 1:
        return f"({values[0]} items)"
    if kind == "Stages":
        stages = ast.literal_eval(node.args[0])
        return f"(stage{'s' * (len(stages) > 1)} {', '.join(str(stage) for stage in stages)})"
    raise ValueError(f"no way to write the limit {ast.unparse(node)}")


def _render_default(schema: SchemaDoc, node: ast.expr | None) -> str:
    if node is None:
        return "???"
    if isinstance(node, ast.Attribute):  # a member of an enum
        return schema.enums[_name(node.value)][node.attr]
    if isinstance(node, ast.Subscript):  # one whose name is a word of Python
        return schema.enums[_name(node.value)][ast.literal_eval(node.slice)]
    if isinstance(node, ast.Call):  # field(default_factory=...)
        factory = next(item.value for item in node.keywords if item.arg == "default_factory")
        if isinstance(factory, ast.Lambda):
            return _plain(ast.literal_eval(factory.body))
        return {"list": "[]", "dict": "{}"}[_name(factory)]
    return _plain(ast.literal_eval(node))


def _plain(value: Any) -> str:
    """A value as YAML writes it."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{', '.join(_plain(item) for item in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value >= 10_000:
        return f"{value:_}"
    return str(value) or '""'


def _default_options() -> dict[str, str]:
    """The option of each group that conf/config.yaml names."""
    entries = _load(ROOT / "conf" / "config.yaml")["defaults"]
    return {
        group: option
        for entry in entries
        if isinstance(entry, dict)
        for group, option in entry.items()
        if option is not None
    }


def _default_values(options: Mapping[str, str]) -> dict[str, str]:
    """What the default options and conf/config.yaml set, by dotted path and as YAML writes it."""
    values: dict[str, Any] = {}
    for group, option in options.items():
        file = ROOT / "conf" / group / f"{option}.yaml"
        if not group.startswith("override "):
            values |= dict(flatten(_load(file), f"{group}."))
    own = _load(ROOT / "conf" / "config.yaml")
    own = {key: value for key, value in own.items() if key not in ("defaults", "hydra")}
    values |= dict(flatten(own))
    texts = {path: _plain(value) for path, value in values.items()}
    # A reference to another setting, such as ${model.vocab_size}, is followed once.
    return {path: texts.get(text[2:-1], text) for path, text in texts.items()}


def _table_of_options(group: str, files: Sequence[Path], default: str | None) -> str:
    rows = [
        (
            f"`{group}={file.stem}`" + (" (default)" if file.stem == default else ""),
            read_comment(file.read_text(encoding="utf-8")),
            ", ".join(f"`{text}`" for text in _settings_of(file)),
        )
        for file in files
    ]
    return _table(("option", "meaning", "sets"), rows)


def _settings_of(file: Path) -> Iterator[str]:
    for key, value in _load(file).items():
        if key == "defaults":
            for entry in value:
                for group, option in entry.items():
                    yield f"{group.removeprefix('override /')}={option}"
        elif key == "hydra":
            for path, choices in value.get("sweeper", {}).get("params", {}).items():
                yield f"{path}={choices}"
        else:
            for path, item in flatten({key: value}):
                yield f"{path}: {_plain(item)}"


def read_comment(text: str) -> str:
    """The comment that a YAML file begins with; a line indented further is a command."""
    words: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        content = line.removeprefix("#")
        if content.startswith(" @package"):
            continue
        indented = content.startswith("   ")
        words.append(f"`{content.strip()}`" if indented else _escape(content.strip()))
    return " ".join(words)


def _load(file: Path) -> dict[str, Any]:
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    return values if isinstance(values, dict) else {}


def _escape(text: str) -> str:
    """Keep globs such as `*.txt` from turning into emphasis."""
    return text.replace("*", r"\*")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table without the columns that are empty throughout."""
    used = [index for index in range(len(head)) if any(row[index] for row in rows)]
    lines = [head, ["---"] * len(head), *rows]
    text = ""
    for line in lines:
        text += "| " + " | ".join(line[index].replace("|", r"\|") for index in used) + " |\n"
    return text


if __name__ == "__main__":
    print(render_reference(), end="")
