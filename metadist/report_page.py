"""The report's page: one HTML file that fetches nothing, for phones and desks, by day and by night."""

from __future__ import annotations

from typing import Any

_PARTS = {
    "data": "waiting for episodes",
    "compute": "adapting, and the meta-gradient",
    "transfer": "weights and gradients on their way",
    "wait": "nothing to do, or waiting for other workers",
    "update": "making the next weights",
}

# The head of any page of ours, open for more style; ``title`` is filled in.
HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }} · metadist</title>
<style>
:root { --paper: #f4f6fa; --card: #ffffff; --ink: #1d2433; --quiet: #5c667a; --line: #e3e7ee;
  --before: #b4622f; --after: #2f6fde;
  --data: #c98a1b; --compute: #2f6fde; --transfer: #8a63d2; --wait: #9aa3b2; --update: #2e9e5b; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0f1218; --card: #171b24; --ink: #d8deea; --quiet: #97a1b5; --line: #2c3342;
    --before: #e0965f; --after: #6ea2ff;
    --data: #e0b04f; --compute: #6ea2ff; --transfer: #b194ec; --wait: #68738a; --update: #59c486; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 52rem; margin: 0 auto; padding: 1.25rem 1rem 3rem; }
h1 { font-size: 1.6rem; margin: .5rem 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 0 0 .75rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1rem;
  margin: 0 0 1rem; }
.hero { display: flex; flex-wrap: wrap; gap: .25rem 2rem; margin-bottom: 1rem; }
.hero div { min-width: 0; }
.hero span { display: block; color: var(--quiet); font-size: .85rem; }
.hero b { font-size: 1.75rem; font-weight: 650; }
.before { color: var(--before); } .after { color: var(--after); }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .5rem .35rem 0; border-top: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; font-weight: 400; }
tr:first-child > * { border-top: 0; }
th { color: var(--quiet); overflow-wrap: normal; }
.facts th { width: 8.5rem; }
img { display: block; width: 100%; height: auto; border-radius: 6px; }
.paper { background: #ffffff; padding: .25rem; }
.scroll { overflow-x: auto; font-size: .8rem; margin-top: .5rem; }
.scroll * { white-space: nowrap; overflow-wrap: normal; }
.scroll :is(th, td) { padding-right: .6rem; }
.bar { display: flex; height: 1.25rem; border-radius: 6px; overflow: hidden; background: var(--line); }
.bar i, .key i { background: var(--c); } .bar i { display: block; }
.key { margin: .6rem 0 0; } .key :is(th, td) { white-space: nowrap; }
.key td:last-child { white-space: normal; width: 100%; }
.key i { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .4em; }
pre, code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .82rem; }
pre { margin: .75rem 0 0; overflow-x: auto; } code { overflow-wrap: anywhere; }
summary { cursor: pointer; font-weight: 600; }
footer { color: var(--quiet); font-size: .85rem; }
"""

_PAGE = (
    HEAD
    + """</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<section>
<h2>Result</h2>
{% if result %}
<div class="hero">
<div><span>{{ result.metric }} before adaptation</span><b class="before">{{ result.before }}</b></div>
<div><span>after adaptation, with 95 % interval</span><b class="after">{{ result.after }}</b></div>
</div>
{% else %}
<p>The final evaluation has not been made yet.</p>
{% endif %}
<table class="facts">
{% if result %}
<tr><th>episodes</th><td>{{ result.episodes }}</td></tr>
<tr><th>BatchNorm</th><td>{{ result.batchnorm }}</td></tr>
{% endif %}
{% for label, value in facts %}
<tr><th>{{ label }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table>
</section>
<section>
<h2>Learning curve</h2>
<picture>
<source media="(prefers-color-scheme: dark)" srcset="{{ curves.dark }}">
<img src="{{ curves.light }}" alt="Query loss and the task's metric by outer step, before and after adaptation">
</picture>
</section>
{% if instances %}
<section>
<h2>Accuracy by instance</h2>
<picture>
<source media="(prefers-color-scheme: dark)" srcset="{{ instances.dark }}">
<img src="{{ instances.light }}" alt="Accuracy when a class is shown for the first time, the second, and so on">
</picture>
</section>
{% endif %}
{% if episodes %}
<section>
<h2>Episodes</h2>
<img class="paper" src="{{ episodes }}" alt="Some episodes: support and query examples with predictions">
</section>
{% endif %}
{% if steps %}
<section>
<h2>Adaptation, step by step</h2>
<table>
<tr><th>inner steps</th>{% for name in steps.columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in steps.rows %}
<tr>{% for value in row %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</table>
</section>
{% endif %}
{% if time %}
<section>
<h2>Where the time of a step goes</h2>
<div class="bar">
{% for part, share in time %}
<i style="width: {{ '%.2f' | format(100 * share) }}%; --c: var(--{{ part }})"></i>
{% endfor %}
</div>
<table class="key">
{% for part, share in time %}
<tr><th><i style="--c: var(--{{ part }})"></i>{{ part }}</th><td>{{ '%.1f' | format(100 * share) }} %</td>
<td>{{ parts[part] }}</td></tr>
{% endfor %}
</table>
</section>
{% endif %}
{% if events %}
<section>
<h2>Restarts and releases</h2>
<table>
{% for label, value in events %}
<tr><th>{{ label }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table>
</section>
{% endif %}
{% if evaluations %}
<section>
<details open>
<summary>Evaluations</summary>
<div class="scroll">
<table>
<tr><th>step</th><th>split</th><th>before</th><th>after</th><th>episodes</th></tr>
{% for row in evaluations %}
<tr><td>{{ row.step }}</td><td>{{ row.split }}</td><td>{{ row.before }}</td><td>{{ row.after }}</td>
<td>{{ row.episodes }}</td></tr>
{% endfor %}
</table>
</div>
</details>
</section>
{% endif %}
<section>
<details>
<summary>Config</summary>
<pre>{{ config }}</pre>
</details>
</section>
{% if sha256 %}
<footer>sha256 of the meta-parameters: <code>{{ sha256 }}</code></footer>
{% endif %}
</main>
</body>
</html>
"""
)


def render_page(**contents: Any) -> str:
    """The page as text; every value is escaped.

    Args:
        contents: ``title``; ``result`` (``metric, before, after, episodes, batchnorm``) or None; ``facts`` and
            ``events``, pairs of label and value; ``curves``, data URLs ``light`` and ``dark``; ``instances``, the same
            or None; ``episodes``, a data URL or None; ``steps`` (``columns``, and ``rows`` of texts that begin with the
            number of inner steps) or None; ``time``, pairs of a part and its share; ``evaluations``, rows of ``step,
            split, before, after, episodes``; ``config``, text; ``sha256`` or None.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_PAGE).render(parts=_PARTS, **contents)
