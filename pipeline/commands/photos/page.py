"""report.html of a project: one page that needs no network. Names of files and classes are data, and escaped."""

import base64
import io
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from jinja2 import Environment

from heba.clip.preprocess import decode
from pipeline.commands.photos.results import Line, Results, hardest, pairs
from pipeline.core.params import Params
from pipeline.report import figures
from pipeline.report.render import SCRIPT

MATRIX = 30  # classes, at most, of a matrix that is shown whole
MOST_PAIRS, MOST_HARD, SIDE = 20, 24, 96  # confused pairs; hard images, and their longer side in pixels

PAGE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ name }}: which method?</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child, td.text { text-align: left }
.sortable th { cursor: pointer }
.matrix td { min-width: 1.6rem; text-align: center }
.wide { overflow-x: auto }
.advice { background: #e8f3ec; padding: .6rem 1rem; border-left: 4px solid #2d7d4f }
.warning { background: #fff3cd; padding: .6rem 1rem; border-left: 4px solid #d9a400 }
.note { color: #555; font-size: 13px }
.images { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 0; width: 9rem; font-size: 13px; overflow-wrap: anywhere }
figure img { image-rendering: auto; max-width: 100% }
pre { white-space: pre-wrap; overflow-wrap: anywhere }
svg { max-width: 100%; height: auto }
</style>
<h1>{{ name }}: which method?</h1>
{% if warning %}
<p class="warning">{{ warning }}</p>
{% endif %}
<p class="advice">{{ advice }}</p>
<p>{{ about }}</p>
<h2>Methods</h2>
<div class="wide"><table class="sortable">
<thead><tr><th>Method</th><th>Accuracy, %</th><th>95 % interval</th><th>Seconds of a training</th>
<th>Confuses most</th></tr></thead><tbody>
{% for line in lines %}
<tr><td>{% if line.method == advised %}<b>{{ line.title }}</b>{% else %}{{ line.title }}{% endif %}</td>
<td>{{ "%.1f"|format(line.accuracy) }}</td><td>{{ "%.1f to %.1f"|format(line.low, line.high) }}</td>
<td>{% if line.seconds is not none %}{{ "%.2f"|format(line.seconds) }}{% endif %}</td>
<td class="text">{{ line.confused }}</td></tr>
{% endfor %}
</tbody></table></div>
{% for note in notes %}
<p class="note">{{ note }}</p>
{% endfor %}
{% if curves %}
<h2>Accuracy over shots</h2>
{{ curves|safe }}
{% endif %}
<h2>What {{ title }} confuses</h2>
<p class="note">Rows are the true classes; tests of all splits and samples.</p>
{% if matrix %}
<div class="wide"><table class="matrix"><thead><tr><th></th>
{% for one in names %}<th>{{ one }}</th>{% endfor %}</tr></thead><tbody>
{% for row in matrix %}
<tr><th>{{ names[loop.index0] }}</th>
{% for count, shade in row %}
<td style="background: rgba(0, 114, 178, {{ "%.2f"|format(shade) }})">{{ count or "" }}</td>
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% else %}
<table><thead><tr><th>Class</th><th>Taken for</th><th>Tests</th></tr></thead><tbody>
{% for of, taken, count in confused %}
<tr><td>{{ of }}</td><td class="text">{{ taken }}</td><td>{{ count }}</td></tr>
{% endfor %}
</tbody></table>
{% endif %}
<h2>Accuracy by class, %</h2>
<div class="wide"><table class="sortable"><thead><tr><th>Class</th><th>Test images</th>
{% for line in lines %}<th>{{ line.title }}</th>{% endfor %}</tr></thead><tbody>
{% for one, n, values in classes %}
<tr><td>{{ one }}</td><td>{{ n }}</td>{% for value in values %}<td>{{ "%.1f"|format(value) }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
<h2>The hardest test images</h2>
<p class="note">Those that {{ title }} gets wrong most often; in brackets, how many of the {{ lines|length }}
methods took the image for that.</p>
<div class="images">
{% for file, name, taken, picture in hard %}
<figure>{% if picture %}<img src="{{ picture }}" alt="">{% endif %}
<figcaption><b>{{ name }}</b>, taken for {{ taken }}<br>{{ file }}</figcaption></figure>
{% endfor %}
</div>
<h2>The images</h2>
{% for finding in findings %}
<pre>{{ finding }}</pre>
{% else %}
<p>No problems found.</p>
{% endfor %}
<h2>Settings</h2>
{% for line in settings %}
<p>{{ line }}</p>
{% else %}
<p>The defaults of each method.</p>
{% endfor %}
<p class="note">{{ versions }}</p>
<script>{{ script|safe }}</script>
</html>
"""
)


def render(
    results: Results,
    params: Params,
    images: Path,
    about: str,
    notes: list[str],
    findings: list[str],
    settings: list[str],
    versions: str,
    warning: str,
) -> str:
    """The page. `about`: how it was tested; `notes`: sentences under the table; `findings`: of the images;
    `settings`: what was chosen; `versions`: of what made it."""
    method = results.advice.method
    matrix = results.confusion(method)
    whole = len(results.names) <= MATRIX
    return PAGE.render(
        name=images.name,
        warning=warning,
        advice=results.advice.text,
        advised=method,
        title=_line(results, method).title,
        about=about,
        lines=results.lines,
        notes=notes,
        curves=curves(results, params),
        names=results.names,
        matrix=[[(int(c), c / max(1, row.sum())) for c in row] for row in matrix] if whole else [],
        confused=[(results.names[t], results.names[p], count) for t, p, count in pairs(matrix, MOST_PAIRS)],
        classes=by_class(results),
        hard=[(*one, thumbnail(images / one[0])) for one in hardest(results, MOST_HARD)],
        findings=findings,
        settings=settings,
        versions=versions,
        script=SCRIPT,
    )


def _line(results: Results, method: str) -> Line:
    return next(line for line in results.lines if line.method == method)


def curves(results: Results, params: Params) -> str:
    """A figure of the mean accuracy over shots; nothing of one number of shots."""
    if len(params.few_shot.shots) < 2:
        return ""
    right = results.tests.assign(accuracy=100.0 * (results.tests["label"] == results.tests["predicted"]))
    runs = right.groupby(["method", "shots", "split", "seed"])["accuracy"].mean()
    table = runs.groupby(["method", "shots"]).agg(accuracy="mean", std="std").reset_index().assign(dataset="all")
    with mpl.rc_context(figures.STYLE):
        drawn = figures.curves(table, [line.method for line in results.lines], embedded=False)
    return next(iter(drawn.values()))


def by_class(results: Results) -> list[tuple[str, int, list[float]]]:
    """Of each class its name, different test images, and the accuracy of each method in percent."""
    right = results.tests[results.tests["shots"] == results.shots]
    right = right.assign(right=right["label"] == right["predicted"])
    shares: pd.DataFrame = right.groupby(["label", "method"])["right"].mean().unstack()
    counts = right.groupby("label")["file"].nunique()
    order = [line.method for line in results.lines]
    return [
        (results.names[int(label)], int(counts[label]), [100 * float(shares.loc[label, m]) for m in order])
        for label in shares.index
    ]


def thumbnail(path: Path) -> str:
    """A small picture as an address of its own content; nothing where the file cannot be read any more."""
    try:
        image = decode(path, as_seen=True)
    except ValueError:
        return ""
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
