import json
import re
from pathlib import Path

import pytest
from manifests import INFRA, only

from longvlm.jobs.cluster import metrics

OURS = {series: metric for metric in metrics.ALL for series in metric.series}
RAYS = {  # of Ray itself, with the file of its source that defines them
    "ray_node_cpu_utilization": "dashboard/modules/reporter/reporter_agent.py",
    "ray_node_disk_utilization_percentage": "dashboard/modules/reporter/reporter_agent.py",
    "ray_node_gpus_utilization": "dashboard/modules/reporter/reporter_agent.py",
    "ray_resources": None,  # in its compiled core; read from a node in the test below
}
OTHERS = {"kube_cronjob_status_last_successful_time"}  # of kube-state-metrics
SCRAPED = {"namespace", "le", "ray_io_group"}  # labels that scraping and histograms bring


def rules():
    (group,) = only("monitoring/rules.yaml")["spec"]["groups"]
    return group["rules"]


def dashboard():
    return json.loads((INFRA / "monitoring" / "dashboard.json").read_text())


def expressions():
    return [rule["expr"] for rule in rules()] + [
        target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]
    ]


@pytest.mark.parametrize("expression", expressions())
def test_every_name_is_a_metric_and_every_label_one_of_its_own(expression):
    assert expression.count("(") == expression.count(")")
    named = re.findall(r"\b(?!ray_io_)((?:ray|kube|longvlm|DCGM)_\w+)(\{[^}]*\})?", expression)
    assert named
    for name, selector in named:
        assert name in OURS.keys() | RAYS.keys() | OTHERS, name
        if name in OURS:
            labels = set(re.findall(r"(\w+)\s*[=!]~?", selector))
            assert labels <= {*OURS[name].tags, *SCRAPED}, f"{name} has {OURS[name].tags}"
    known = {tag for name, _ in named if name in OURS for tag in OURS[name].tags}
    grouped = {label for by in re.findall(r"by \(([^)]*)\)", expression) for label in by.split(", ")}
    assert grouped <= known | SCRAPED


def test_rays_metrics_are_rays():
    import ray

    for name, source in RAYS.items():
        if source:
            assert f'"{name.removeprefix("ray_")}"' in (Path(ray.__file__).parent / source).read_text()


def test_every_metric_of_ours_is_shown():
    shown = " ".join(expressions())
    missing = [metric.name for metric in metrics.ALL if not any(series in shown for series in metric.series)]
    assert set(missing) <= {"longvlm_units", "longvlm_commits"}  # for questions that nobody asks every day


def test_alerts_say_what_is_wrong_and_what_to_do():
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names))
    for rule in rules():
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert set(rule["annotations"]) == {"summary", "action"}


def test_the_dashboard_shows_what_was_asked_for():
    titles = {panel["title"] for panel in dashboard()["panels"]}
    assert titles >= {
        "Videos per second",
        "Hours of video per GPU hour",
        "Failures by code",
        "Queue depth",
        "GPU utilisation",
        "Busy workers by stage",
        "Tokens per second",
    }
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(ids) == len(set(ids))


def test_prometheus_scrapes_the_port_that_the_pods_open():
    (endpoint,) = only("monitoring/podmonitor.yaml")["spec"]["podMetricsEndpoints"]
    cluster = only("rayjob-index.yaml")["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports[endpoint["port"]] == 8080
