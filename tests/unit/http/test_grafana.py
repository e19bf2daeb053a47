"""examples/grafana: the dashboard names metrics and labels that /metrics has, and leaves out none without a reason."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from http_front import FakeFront, chunks

from engine.http.app import ROUTES
from engine.http.metrics import Metrics
from engine.messages.control import WorkerReady
from engine.messages.questions import ExpertCounts

pytestmark = pytest.mark.anyio
FOLDER = Path(__file__).parents[3] / "examples" / "grafana"
BOARD: dict[str, Any] = json.loads((FOLDER / "engine.json").read_text())
SCRAPED = {"job", "instance"}  # labels that Prometheus adds
FUNCTIONS = {"sum", "max", "min", "rate", "increase", "changes", "histogram_quantile", "by"}
NOT_SHOWN = {
    "engine_cache_hit_ratio",  # of all time; the panel has that of the last minutes
    "engine_expert_choices",  # thousands of series, and only once they are asked for
}


def panels() -> list[dict[str, Any]]:
    return [panel for panel in BOARD["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[str]:
    """All PromQL on the dashboard."""
    for panel in panels():
        yield from (target["expr"] for target in panel["targets"])
    yield from (each["expr"] for each in BOARD["annotations"]["list"] if "expr" in each)


def named(expression: str) -> tuple[set[str], set[str], set[str]]:
    """The metrics that an expression names, the labels it selects by, and those it groups by."""
    text = re.sub(r"\[[^\]]*\]", "", expression)
    selectors = re.findall(r"\{([^}]*)\}", text)
    selected = {name for inside in selectors for name in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", inside)}
    text = re.sub(r"\{[^}]*\}", "", text)
    grouped = {name.strip() for inside in re.findall(r"by \(([^)]*)\)", text) for name in inside.split(",")}
    text = re.sub(r"by \([^)]*\)", "", text)
    return set(re.findall(r"[A-Za-z_:][\w:]*", text)) - FUNCTIONS, selected, grouped


@pytest.fixture
async def samples() -> dict[str, set[str]]:
    """The labels of each sample on a page of /metrics on which everything has happened, by its name."""
    front = FakeFront()
    front.info = WorkerReady(100, 16, 8, 2048, 2048, 1000, 1024, "cpu", "torch", {})
    metrics = Metrics(front, "fake")  # type: ignore[arg-type]
    metrics.experts.counted = ExpertCounts(True, (0,), b"\0" * 8)
    metrics.count_error(400)

    async def reply() -> Any:
        for chunk in chunks("a", "b"):
            yield chunk

    async for _ in metrics.watch(reply(), "chat"):
        pass
    return {sample.name: set(sample.labels) for family in metrics.registry.collect() for sample in family.samples}


async def test_every_metric_and_label_exists(samples: dict[str, set[str]]) -> None:
    for expression in expressions():
        metrics, selected, grouped = named(expression)
        assert metrics, expression
        for metric in metrics:
            assert metric in samples, f"{expression} names {metric}, which /metrics does not have"
            assert selected | grouped <= samples[metric] | SCRAPED, f"{expression}: {metric} has {samples[metric]}"


async def test_every_metric_is_shown(samples: dict[str, set[str]]) -> None:
    shown = {metric for expression in expressions() for metric in named(expression)[0]}
    suffix = re.compile(r"_(total|bucket|count|sum|created)$")
    families = {suffix.sub("", name) for name in samples}
    assert families - {suffix.sub("", name) for name in shown} == NOT_SHOWN


def test_counters_are_shown_as_rates_and_legends_name_labels() -> None:
    for panel in panels():
        for target in panel["targets"]:
            for metric in re.findall(r"engine_\w+_(?:total|bucket)", target["expr"]):
                assert re.search(rf"(rate|increase)\({metric}", target["expr"])
            _, _, grouped = named(target["expr"])
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) == grouped - {"le"}


def test_the_tests_find_what_is_wrong() -> None:
    expression = 'sum by (status, le) (rate(a_total{job=~"$job", x!="y}"}[5m])) / b'
    assert named('max(engine_no{job="$job"})') == ({"engine_no"}, {"job"}, set())
    assert named(expression.replace("y}", "y")) == ({"a_total", "b"}, {"job", "x"}, {"status", "le"})


def test_the_dashboard_can_be_imported() -> None:
    assert re.fullmatch(r"[a-zA-Z0-9\-_]{1,40}", BOARD["uid"])
    assert BOARD["schemaVersion"] == 39 and BOARD["title"] and "id" not in BOARD
    variables = {each["name"]: each for each in BOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    text = (FOLDER / "engine.json").read_text()
    used = set(re.findall(r"\$\{?(\w+)", text)) - {"__rate_interval", "__range", "__all"}
    assert used == set(variables)
    prometheus = {"type": "prometheus", "uid": "${datasource}"}
    for panel in panels():
        assert panel["datasource"] == prometheus and panel["title"] and panel["description"].endswith(".")
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])


def test_panels_do_not_cover_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert max(x for x, _ in cells) < 24 and not taken & cells, panel["title"]
        taken |= cells


def test_the_readme_scrapes_what_is_served_without_a_key() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    (job,) = yaml.safe_load(block)["scrape_configs"]
    path = job.get("metrics_path", "/metrics")
    assert [route.open for route in ROUTES if route.path == path] == [True]
    assert job["static_configs"] == [{"targets": ["127.0.0.1:8000"]}]
