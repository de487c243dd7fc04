"""The section `provenance`: what a run records about its origin, and who may read it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llama_pretrain.config.fields import schema
from llama_pretrain.config.problems import Problem

if TYPE_CHECKING:
    from llama_pretrain.config.run import Run


@schema
class Provenance:
    """What a run records about its origin, and who may read its directory."""

    include_untracked: bool = False
    """Copy files that git does not track, with secrets redacted; `false` records their names,
    sizes and hashes only."""
    directory_mode: str = "700"
    """Permissions of a new run directory, in octal; 750 lets the group read it."""


def validate_provenance(run: "Run") -> Iterator[Problem]:
    """The permissions are three octal digits that let the owner write."""
    mode = run.provenance.directory_mode
    if len(mode) != 3 or not set(mode) <= set("01234567") or mode[0] != "7":
        yield Problem(
            path="provenance.directory_mode",
            message=f"must be three octal digits, the first of them 7 (got {mode})",
            hint="Set provenance.directory_mode='750' to let the group read",
        )
