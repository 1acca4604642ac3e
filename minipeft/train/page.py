"""One HTML page that needs no other file and no network: for a phone and a desk, in the light and in the dark."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from minipeft.files import write_text

_STYLE = """
:root{color-scheme:light dark;--line:#8886}
body{font:15px/1.5 system-ui,sans-serif;max-width:64em;margin:2em auto;padding:0 1em}
.wide{overflow-x:auto}table{border-collapse:collapse}
td,th{padding:.2em 1em .2em 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
svg{max-width:100%;height:auto}svg text{fill:currentColor}code{font-size:.95em}
"""


def write_page(file: Path, title: str, parts: Iterable[str]) -> None:
    """Write the page.

    Args:
        parts: HTML, below the title. What a user named has gone through `html.escape`.
    """
    name, body = html.escape(title), "\n".join(parts)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{name}</title>'
    text = f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>'
    write_text(file, f"{text}<body>\n<h1>{name}</h1>\n{body}\n</body></html>\n")


def table(rows: Iterable[Sequence[str]], header: Sequence[str] = (), numbers: Iterable[int] = ()) -> str:
    """A table of plain texts; `numbers` are the columns that are set to the right."""

    right = set(numbers)

    def line(cells: Sequence[str], tag: str) -> str:
        marks = ("" if i not in right else ' class="number"' for i in range(len(cells)))
        return "".join(f"<{tag}{m}>{html.escape(cell)}</{tag}>" for m, cell in zip(marks, cells, strict=True))

    head = f"<tr>{line(header, 'th')}</tr>" if header else ""
    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table>{head}{body}</table></div>'
