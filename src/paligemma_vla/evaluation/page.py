"""One HTML file that needs nothing else: markup that escapes by itself, and the page's small parts."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable
from typing import Any

from paligemma_vla.evaluation.report_style import STYLE


class Html(str):
    """Text that is markup already; any other text is escaped where `fill` puts it in."""

    __slots__ = ()


def fill(template: str, *values: Any, **named: Any) -> Html:
    """`template.format(...)` with every value escaped unless it is `Html`. The template itself must be a literal."""
    return Html(template.format(*map(_safe, values), **{name: _safe(value) for name, value in named.items()}))


def join(parts: Iterable[Html]) -> Html:
    return Html("".join(parts))


def _safe(value: Any) -> str:
    return value if isinstance(value, Html) else html.escape(str(value), quote=True)


def data_url(data: bytes, kind: str) -> Html:
    """`data:` address of some bytes; `kind` as in `image/jpeg`."""
    return Html(f"data:{kind};base64,{base64.b64encode(data).decode()}")


def number(value: float | None) -> str:
    """A number for people: three significant digits, thousands apart; an em dash for None."""
    if value is None or math.isnan(value):
        return "—"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.1f} M"
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 1e-3:
        return f"{value:#.3g}".rstrip(".")
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def percent(rate: float) -> str:
    return f"{100 * rate:.0f}\u202f%"  # narrow, and no line break


def duration(seconds: float) -> str:
    """`48 s`, `13 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def section(title: str, lead: str, body: Html) -> Html:
    """A chapter of the page: heading, one line that says what it shows, content."""
    return fill('<section><h2>{}</h2><p class="lead">{}</p>{}</section>\n', title, lead, body)


def tiles(facts: Iterable[tuple[str, str]]) -> Html:
    """A row of (name, value), the value large."""
    cells = join(fill("<div><dt>{}</dt><dd>{}</dd></div>", name, value) for name, value in facts)
    return fill('<dl class="tiles">{}</dl>', cells)


def figure(title: str, content: Html, legend: Html | None = None, note: str = "") -> Html:
    """A titled panel around a chart."""
    return fill(
        '<figure class="panel"><figcaption><b>{}</b>{}</figcaption>{}{}</figure>',
        title,
        legend or Html(""),
        content,
        fill('<p class="note">{}</p>', note) if note else Html(""),
    )


def legend(entries: Iterable[tuple[str, str]]) -> Html:
    """(CSS class of the line, label) pairs."""
    return fill(
        '<span class="legend">{}</span>', join(fill('<span><i class="{}"></i>{}</span>', c, text) for c, text in entries)
    )


def document(title: str, body: Html) -> Html:
    """The whole page."""
    return fill(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<title>{}</title>\n<style>{}</style>\n</head>\n'
        "<body>\n<main>\n{}</main>\n</body>\n</html>\n",
        title,
        Html(STYLE),
        body,
    )
