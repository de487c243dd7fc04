"""What is printed may come from a file or a user: it is text and nothing else."""

import io

from rich.table import Table

from llama_pretrain.console.output import PlainConsole, styled

HOSTILE = "a[/b] [red]x[/] :smile: \x1b[2J\x1b]0;title\x07 \x9b31m \r\x08 end"
PLAIN = "a[/b] [red]x[/] :smile: ?[2J?]0;title? ?31m ?? end"


def test_markup_and_escapes_are_text() -> None:
    file = io.StringIO()
    console = PlainConsole(file=file, width=200, highlight=False, force_terminal=True)
    table = Table(title=HOSTILE, box=None)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE, style="red")
    console.print(HOSTILE)
    console.print(table)
    console.print(styled(HOSTILE, "bold"))
    printed = file.getvalue()
    assert printed.count(PLAIN) == 5
    assert not set(printed) & set("\x07\x08\r\x9b")
    assert "\x1b[2J" not in printed
