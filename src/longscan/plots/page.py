"""Pages of HTML that need nothing but themselves: text is escaped, figures lie inside, scripts and the network are off.

Parts are made by the functions below, which take plain text and escape it; only they make :data:`Html`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NewType

Html = NewType("Html", str)

_STYLE = """
:root { --ink: #1d2733; --faint: #5d6b7a; --line: #dde3ea; --shade: #f5f7f9; --accent: #1f6fb4; color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem; color: var(--ink);
  background: white; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 3rem 0 .75rem; padding-bottom: .3rem; border-bottom: 2px solid var(--accent);
  overflow-wrap: anywhere; }
p { margin: .5rem 0; overflow-wrap: anywhere; }
.faint, figcaption { color: var(--faint); font-size: .875rem; white-space: pre-line; }
.title { font-weight: 600; font-size: .875rem; margin-top: 1.25rem; }
nav ul { columns: 20rem; padding-left: 1.2rem; }
a { color: var(--accent); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .75rem; margin: 1rem 0; }
dl > div { background: var(--shade); border-radius: .4rem; padding: .6rem .8rem; }
dt { color: var(--faint); font-size: .8rem; }
dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
figure { margin: 1.25rem 0; }
img { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; margin: .5rem 0 1.25rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { border-bottom-color: var(--faint); }
th.left, td.left { text-align: left; }
tbody tr:hover { background: var(--shade); }
details { margin: 1rem 0; }
summary { cursor: pointer; color: var(--accent); }
pre { background: var(--shade); border-radius: .4rem; padding: 1rem; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; font: .85rem/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
@media print { details > * { display: block; } h2 { break-after: avoid; } figure, tr { break-inside: avoid; } }
"""

# A browser that obeys it fetches nothing and runs nothing, whatever the page says.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True)
class Section:
    """A part of a page with a heading of its own."""

    heading: str
    parts: Sequence[Html]


def page(title: str, sections: Sequence[Section], note: str = "") -> str:
    """A whole document; several sections get a list of contents.

    Args:
        title: of the window and on top.
        sections: one after the other.
        note: a line below the title.
    """
    body = [f"<h1>{escape(title)}</h1>"]
    if note:
        body.append(f'<p class="faint">{escape(note)}</p>')
    if len(sections) > 1:
        entries = (
            f'<li><a href="#section-{number}">{escape(section.heading)}</a></li>'
            for number, section in enumerate(sections, 1)
        )
        body.append(f"<nav><ul>{''.join(entries)}</ul></nav>")
    for number, section in enumerate(sections, 1):
        parts = "\n".join(section.parts)
        # A page of one thing has its name on top already.
        heading = "" if section.heading == title else f"<h2>{escape(section.heading)}</h2>\n"
        body.append(f'<section id="section-{number}">\n{heading}{parts}\n</section>')
    head = (
        '<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>"
    )
    return '<!DOCTYPE html>\n<html lang="en">\n<head>\n{}\n</head>\n<body>\n{}\n</body>\n</html>\n'.format(
        head, "\n".join(body)
    )


def paragraph(text: str) -> Html:
    """A paragraph of text."""
    return Html(f"<p>{escape(text)}</p>")


def preformatted(text: str) -> Html:
    """Text in its own lines."""
    # HTML drops a line break that comes first.
    return Html(f"<pre>\n{escape(text)}</pre>")


def facts(values: Mapping[str, str]) -> Html:
    """Names and what they are, in boxes; what is empty is left out."""
    boxes = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in values.items() if value)
    return Html(f"<dl>{''.join(boxes)}</dl>")


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str = "",
    caption: str = "",
    left: Sequence[int] = (0,),
) -> Html:
    """A table that scrolls where it is wider than the page.

    Args:
        head: names of the columns.
        rows: cells.
        title, caption: above it.
        left: the columns that are no figures.
    """

    def line(tag: str, cells: Sequence[str]) -> str:
        sides = (' class="left"' if index in left else "" for index in range(len(cells)))
        return f"<tr>{''.join(f'<{tag}{side}>{escape(cell)}</{tag}>' for side, cell in zip(sides, cells))}</tr>"  # noqa: B905

    # No <caption>: it would be as narrow as the table.
    above = f'<p class="title">{escape(title)}</p>' if title else ""
    above += f'<p class="faint">{escape(caption)}</p>' if caption else ""
    return Html(
        f'{above}<div class="scroll"><table>'
        f"<thead>{line('th', head)}</thead><tbody>{''.join(line('td', row) for row in rows)}</tbody></table></div>"
    )


def folded(summary: str, parts: Iterable[Html]) -> Html:
    """What is shown on request."""
    return Html(f"<details><summary>{escape(summary)}</summary>\n{''.join(parts)}\n</details>")


def figure(drawn: Any, caption: str) -> Html:
    """A matplotlib Figure, inside the page.

    Args:
        drawn: the Figure.
        caption: below it, and for those who do not see it.
    """
    written = io.BytesIO()
    drawn.savefig(written, format="png", dpi=110)
    data = base64.b64encode(written.getvalue()).decode("ascii")
    words = escape(caption)
    return Html(
        f'<figure><img alt="{words}" src="data:image/png;base64,{data}"><figcaption>{words}</figcaption></figure>'
    )
