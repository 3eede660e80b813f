"""What is read from a page with transcripts, and when a command's output is not what the page shows."""

from pathlib import Path

import pytest

from tests.support.transcripts import Command, File, not_printed, run, steps

PAGE = """# A page

## One

```text notes.txt
a note
```

Prose, and a block that is neither:

```
$ rm -r everything
```

```console
$ cat notes.txt
a …
$ echo a \\
>   b
```

## Two

```console
$ false
```
"""


def test_files_and_commands_of_a_section_come_in_order() -> None:
    assert steps(PAGE, "One") == [
        File("notes.txt", "a note\n"),
        Command("cat notes.txt", ("a …",)),
        Command("echo a \\\n  b", ()),
    ]


def test_lines_are_looked_for_in_order_and_between_others() -> None:
    assert not_printed(("a…", "c"), "abc\nb\nc\n") is None
    assert not_printed(("c", "a…"), "abc\nb\nc\n") == "a…"
    assert not_printed(("a",), "abc\n") == "a"


def test_a_transcript_that_does_not_hold_fails(tmp_path: Path) -> None:
    for step in steps(PAGE, "One"):
        run(step, tmp_path, {"PATH": "/usr/bin:/bin"}, {})
    with pytest.raises(AssertionError, match="the page shows 'another'"):
        run(Command("cat notes.txt", ("another",)), tmp_path, {"PATH": "/usr/bin:/bin"}, {})
    with pytest.raises(AssertionError, match="false"):
        run(steps(PAGE, "Two")[0], tmp_path, {"PATH": "/usr/bin:/bin"}, {})
    run(Command("cat NAME", ("a note",)), tmp_path, {"PATH": "/usr/bin:/bin"}, {"NAME": "notes.txt"})
