"""The page of ``edge-llm report --html``: one file that needs nothing from elsewhere and runs nothing."""

from collections.abc import Sequence
from html import escape

from edge_daemon.report import Summary, Table, duration, headline, quantile

# Nothing may be fetched or run, whatever a device has called itself.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --paper: #f6f7f9; --card: #ffffff; --ink: #1d2733; --soft: #5c6b7a; --line: #d9dfe5;
  --good: #2e9e6b; --bad: #d1495b; --first: #2f6fb3; --second: #d98a1f; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #12171d; --card: #1b222b; --ink: #e3e8ee; --soft: #9aa8b6; --line: #36414d;
    --good: #4cc38a; --bad: #f0717f; --first: #6aa9ea; --second: #f0ad4e; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; }
h2 { font-size: 1.1rem; margin: 0 0 0.5rem; }
p { margin: 0.25rem 0; color: var(--soft); overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(7rem, 1fr)); gap: 0.75rem; margin: 1rem 0; }
.figures div, section { background: var(--card); border: 1px solid var(--line); border-radius: 0.5rem;
  padding: 0.75rem; }
.figures b { display: block; font-size: 1.5rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.figures span { color: var(--soft); font-size: 0.9rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 0.75rem; }
section { margin-bottom: 0.75rem; min-width: 0; }
.plots section { margin: 0; padding: 0.5rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
.tables { margin-top: 0.75rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
"""


def page(summary: Summary, tables: Sequence[Table], svgs: Sequence[str] | None) -> str:
    """The whole page; ``svgs`` are the plots, None when they could not be drawn."""
    head, *notes = headline(summary)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>edge-llm report</title><style>{STYLE}</style></head><body>",
        "<h1>edge-llm report</h1>",
        *(f"<p>{escape(line)}</p>" for line in (head, *notes)),
        _figures(summary),
        _plots(svgs),
        '<div class="tables">',
        *(_table(table) for table in tables),
        "</div></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _figures(summary: Summary) -> str:
    """What one wants to see first."""
    waits = sorted(wait for tally in summary.priorities.values() for wait in tally.wait_s)
    models = summary.models.values()
    told = [(f"{summary.task_count:,}", "tasks")]
    if waits:
        told += [
            (f"{100 * summary.states['succeeded'] / summary.task_count:.1f} %", "succeeded"),
            (duration(quantile(waits, 0.5)), "median wait"),
            (duration(quantile(waits, 0.95)), "95 % waited less"),
        ]
    told += [
        (f"{sum(len(model.load_s) for model in models):,}", "model loads"),
        (f"{sum(model.swaps for model in models):,}", "of them swaps"),
    ]
    cells = (f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in told)
    return f'<div class="figures">{"".join(cells)}</div>'


def _plots(svgs: Sequence[str] | None) -> str:
    if svgs is None:
        return f"<p>{escape(NO_PLOTS)}</p>"
    return f'<div class="plots">{"".join(f"<section>{svg}</section>" for svg in svgs)}</div>'


NO_PLOTS = (
    "No plots: matplotlib is missing. With the Debian package: sudo apt install python3-matplotlib. "
    "With pip, in a clone: pip install '.[report]'"
)


def _table(table: Table) -> str:
    headers = "".join(f"<th>{escape(header)}</th>" for header in table.headers)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    return (
        f'<section><h2>{escape(table.title)}</h2><div class="wide"><table>'
        f"<thead><tr>{headers}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )
