"""The parts of an HTML page: whatever they are given is escaped here."""

import math
import shlex
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

Points = Sequence[tuple[float, float]]

STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #667080; --line: #e3e6ea;
  --paper: #ffffff; --panel: #f6f7f9; --c0: #0a66c2; --c1: #d1590a; --c2: #08875f;
  --c3: #a64d87; --c4: #8a6d00; --c5: #3d8fc4; --c6: #7a5195; --c7: #5b6670; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #98a2b0; --line: #2d333b;
  --paper: #14171c; --panel: #1c2027; --c0: #6cb2ff; --c1: #ffa05c; --c2: #4fd1a1;
  --c3: #e39ac8; --c4: #e0c24f; --c5: #9ad1f5; --c6: #bfa0dd; --c7: #a9b3bf; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 3rem 1.5rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 3rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p { margin: .4rem 0; max-width: 46rem; } .soft, figcaption, th { color: var(--soft); }
.soft, figcaption { font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem;
  margin: 1.75rem 0 0; }
.card { background: var(--panel); border-radius: .6rem; padding: .9rem 1.1rem; }
.card b { display: block; font-size: 1.6rem; font-weight: 600; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .93rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem 1.4rem .32rem 0; text-align: right; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 500; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; min-width: 7rem; }
.text td { text-align: left; overflow-wrap: anywhere; }
.text td:first-child { color: var(--soft); white-space: nowrap; }
pre { background: var(--panel); border-radius: .6rem; padding: .9rem 1.1rem; margin: .5rem 0;
  font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  overflow-x: auto; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 2rem; }
figure { margin: 0 0 1.25rem; }
.row { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: .5rem; }
.row img { display: block; width: 100%; border-radius: .3rem; }
figcaption { margin-top: .35rem; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; font: 11px system-ui, sans-serif; }
svg text { fill: var(--soft); } svg .grid { stroke: var(--line); }
svg .curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.key { display: inline-block; margin-right: 1rem; } .key i { display: inline-block; width: .9rem;
  height: .2rem; border-radius: .1rem; margin-right: .4rem; vertical-align: middle; }
details summary { cursor: pointer; color: var(--soft); margin-top: .75rem; }
"""


def document(title: str, body: Iterable[str]) -> str:
    """A whole page around HTML that the other functions made."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def element(tag: str, text: Any, kind: str = "") -> str:
    """An element with text in it; `kind` is its class."""
    return f"<{tag}{f' class={kind!r}' if kind else ''}>{escape(str(text))}</{tag}>"


def command(words: Iterable[str], width: int = 88) -> str:
    """A command to copy, in lines of whole words."""
    lines = [""]
    for word in map(shlex.quote, words):
        if lines[-1] and len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return element("pre", " \\\n    ".join(lines))


def table(rows: Sequence[Sequence[Any]], header: Sequence[str] = (), kind: str = "") -> str:
    """A table of texts and numbers; '' without rows. Numbers line up on the right."""
    if not rows:
        return ""
    head = "".join(element("th", cell) for cell in header)
    lines = ["".join(element("td", cell) for cell in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in [*([head] if header else []), *lines])
    return f'<div class="wide"><table class="{escape(kind)}">\n{body}\n</table></div>'


def folded(title: str, inside: str) -> str:
    """HTML that is shown after a click."""
    return f"<details><summary>{escape(title)}</summary>\n{inside}\n</details>" if inside else ""


def cards(values: Iterable[tuple[str, str]]) -> str:
    """Large figures, each with what it is."""
    made = (f'<div class="card"><b>{escape(v)}</b>{element("span", k, "soft")}</div>'
            for k, v in values)  # fmt: skip
    return f'<div class="cards">{"".join(made)}</div>'


def pictures(data: dict[str, str], caption: str) -> str:
    """Pictures side by side that are part of the page: what each shows → a data URI of a JPEG."""
    if not all(uri.startswith("data:image/jpeg;base64,") for uri in data.values()):
        return element("p", f"{caption}: its pictures cannot be read", "soft")
    made = (f'<img src="{escape(uri)}" alt="{escape(what)}" title="{escape(what)}">'
            for what, uri in data.items())  # fmt: skip
    return (
        f'<figure><div class="row">{"".join(made)}</div>{element("figcaption", caption)}</figure>'
    )


def chart(title: str, curves: dict[str, Points], top: float | None = None, most: int = 500) -> str:
    """Curves over the steps as an SVG with a key.

    Args:
        title: What the vertical axis shows.
        curves: Name → (step, value), in order.
        top: End of the vertical axis; by default above the largest value.
        most: Points of a curve; of a longer one some are left out, evenly.
    """
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return ""
    width, height, left, right, above, below = 460, 250, 46, 12, 12, 34
    last = max(points[-1][0] for points in curves.values()) or 1
    highest = top or max(0, *(value for points in curves.values() for _, value in points)) or 1
    tick = _round(highest / 4)
    highest = top or tick * math.ceil(highest / tick)

    def x(step: float) -> float:
        return round(left + (width - left - right) * step / last, 1)

    def y(value: float) -> float:
        share = min(max(value / highest, 0), 1)
        return round(height - below - (height - above - below) * share, 1)

    parts = []
    for n in range(round(highest / tick) + 1):
        at = y(n * tick)
        line = f'<line class="grid" x1="{left}" x2="{width - right}" y1="{at}" y2="{at}"/>'
        label = f'<text x="{left - 8}" y="{at + 4}" text-anchor="end">{n * tick:g}</text>'
        parts += [line, label]
    for step in sorted({round(last * n / 4) for n in range(5)}):
        anchor = {0: "start", last: "end"}.get(step, "middle")
        at = height - below + 18
        parts.append(f'<text x="{x(step)}" y="{at}" text-anchor="{anchor}">{step}</text>')
    keys = []
    for n, (name, points) in enumerate(curves.items()):
        stride = -(-len(points) // most)
        thinned = [*points[:-1][::stride], points[-1]]
        path = " ".join(f"{x(step)},{y(value)}" for step, value in thinned)
        colour = f"var(--c{n % 8})"
        parts.append(f'<polyline class="curve" style="stroke:{colour}" points="{path}"/>')
        if len(points) < 20:
            dots = (f'<circle cx="{x(s)}" cy="{y(v)}" r="2.6" style="fill:{colour}"/>'
                    for s, v in thinned)  # fmt: skip
            parts += dots
        keys.append(f'<span class="key"><i style="background:{colour}"></i>{escape(name)}</span>')
    svg = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
    return (
        f"<figure>{svg}{''.join(parts)}</svg><figcaption>{escape(title)}"
        f"<br>{''.join(keys) if len(keys) > 1 else ''}</figcaption></figure>"
    )


def _round(value: float) -> float:
    """The nearest of 1, 2, 5 times a power of ten."""
    power = 10 ** math.floor(math.log10(value))
    return min((1, 2, 5, 10), key=lambda factor: abs(factor * power - value)) * power
