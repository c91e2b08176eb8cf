"""Parts of a page of HTML that can be mailed: one file, nothing from elsewhere, no script.

Names and paths may hold any text, so every function escapes what it is given. Imports no torch.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def page(
    title: str, headline: str, tone: str, sentences: Sequence[str], sections: Mapping[str, str]
) -> str:
    """The whole page.

    Args:
        tone: 'good', 'bad' or 'open', the color of the headline.
        sections: heading -> HTML of the functions below.
    """
    parts = [f"<section><h2>{escape(h)}</h2>{html}</section>" for h, html in sections.items()]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}: {escape(headline)}</title><style>{STYLE}</style></head><body>\n"
        f'<header class="{escape(tone)}"><p class="soft">{escape(title)}</p>'
        f"<h1>{escape(headline)}</h1>{paragraphs(sentences)}</header>\n"
        + "\n".join([*parts, "</body></html>\n"])
    )


def paragraphs(texts: Iterable[str], kind: str = "") -> str:
    """One paragraph per text; `kind` is a class of page.css."""
    return "".join(f'<p class="{kind}">{escape(text)}</p>' for text in texts)


def table(rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table, the headings first."""
    heads = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in rows[0])
    lines = []
    for first, *others in rows[1:]:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    body = f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll"><table class="{kind}">{body}</table></div>'


def matrix(report: Mapping[str, Any]) -> str:
    """The confusion matrix of a report of metrics.report."""
    rows = report["per_class"]
    counts = {(c["class"], c["predicted"]): c["images"] for c in report["confusions"]}
    counts |= {(r["class"],) * 2: round(r["images"] * (r["acc1"] or 0) / 100) for r in rows}
    names = [row["class"] for row in rows]
    kind = "up" if max(map(len, names)) > 3 else ""
    heads = "".join(f'<th scope="col" class="{kind}">{escape(name)}</th>' for name in names)
    lines = []
    for row in rows:
        cells = []
        for name in names:
            color = "--hit" if name == row["class"] else "--miss"
            if count := counts.get((row["class"], name)):
                shade = f"rgba(var({color}),{0.08 + 0.5 * count / row['images']:.2f})"
                cells.append(f'<td style="background:{shade}">{count}</td>')
            else:
                cells.append("<td>·</td>")
        cells.append("<td></td>" if row["acc1"] is None else f"<td>{row['acc1']:.1f} %</td>")
        lines.append(f'<tr><th scope="row">{escape(row["class"])}</th>{"".join(cells)}</tr>')
    head = f"<thead><tr><th></th>{heads}<th></th></tr></thead>"
    body = f'<table class="matrix">{head}<tbody>{"".join(lines)}</tbody></table>'
    words = "Rows: the true class. Columns: the answer. At the end: the part that is right."
    return f'<div class="scroll">{body}</div>{paragraphs([words], "soft")}'


def cards(pictures: Iterable[tuple[str, bytes, str, str]], kind: str) -> str:
    """Pictures, each on a card of its own.

    Args:
        pictures: (title, content, media type, HTML below the picture).
        kind: 'drawings' or 'photos'.
    """
    parts = []
    for title, content, media, html in pictures:
        source = f"data:{media};base64,{base64.b64encode(content).decode()}"
        image = f'<img alt="{escape(title)}" title="{escape(title)}" src="{source}">'
        parts.append(f'<figure class="card">{image}<figcaption>{html}</figcaption></figure>')
    return f'<div class="{kind}">{"".join(parts)}</div>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and what they stand for."""
    parts = [f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in pairs]
    return f"<dl>{''.join(parts)}</dl>"


def commands(pairs: Iterable[tuple[str, str]]) -> str:
    """What each command does, and the command, which a click selects."""
    return "".join(f"{paragraphs([what], 'soft')}<pre>{escape(line)}</pre>" for what, line in pairs)


def folded(summary: str, html: str) -> str:
    """HTML that a click opens."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"
