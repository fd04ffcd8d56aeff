import shlex

import click
import jsonschema
import pytest
import yaml
from manifests import INFRA, RAYJOBS, crd_schema, documents, job_specs, only, pod_templates

from longvlm.jobs.cli import main
from longvlm.jobs.cluster.resources import GROWTH
from support import ROOT

FILES = sorted(str(path.relative_to(INFRA)) for path in INFRA.rglob("*.yaml"))
KUSTOMIZATIONS = [name for name in FILES if name.endswith("kustomization.yaml")]
BY_HAND = {"rayjob-index.yaml", "rayjob-answer.yaml", "nightly/raycronjob.yaml"}  # as infra/README.md tells
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())


@pytest.fixture(scope="session")
def validators():
    """By kind. `jsonschema.validate` would check these large schemas themselves for every document, for seconds."""
    schemas = {"RayJob": crd_schema("rayjobs"), "RayCronJob": crd_schema("raycronjobs")}
    return {kind: jsonschema.Draft202012Validator(schema) for kind, schema in schemas.items()}


def parsed(words):
    """The options of a command line as `longvlm` understands them; raises click.UsageError where it does not."""
    assert words[0] == "longvlm"
    return main.commands[words[1]].make_context(words[1], words[2:]).params


@pytest.mark.parametrize("name", [*RAYJOBS, "nightly/raycronjob.yaml"])
def test_manifests_are_as_kuberay_defines_them(name, validators):
    document = only(name)
    validators[document["kind"]].validate(document)


def test_a_misspelt_field_would_be_noticed(validators):
    document = only("rayjob-index.yaml")
    document["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(jsonschema.ValidationError, match="volumeMount"):
        validators["RayJob"].validate(document)
    document = only("rayjob-index.yaml")
    document["spec"]["backoffLimit"] = "two"
    with pytest.raises(jsonschema.ValidationError, match="two"):
        validators["RayJob"].validate(document)


@pytest.mark.parametrize("name", job_specs())
def test_entrypoints_are_commands(name):
    words = shlex.split(job_specs()[name]["entrypoint"])
    options = parsed(words)
    assert options["store"] == "s3://my-index/store"
    assert options["ray_address"] == "auto"  # never a local Ray by mistake
    assert not set("$`;|&<>") & set(job_specs()[name]["entrypoint"])  # whichever shell reads it


def test_a_wrong_entrypoint_would_be_noticed():
    with pytest.raises(click.UsageError):
        parsed(["longvlm", "index", "s3://a", "--store", "s", "--prunes"])


def test_jobs_end_with_their_clusters_and_go_on_in_new_ones():
    for spec in job_specs().values():
        assert spec["shutdownAfterJobFinishes"] is True
        assert spec["ttlSecondsAfterFinished"] <= 300  # until then the cluster costs money
        assert spec["backoffLimit"] >= 1
        hours = parsed(shlex.split(spec["entrypoint"])).get("max_hours")
        assert hours is None or hours * 3600 < spec["activeDeadlineSeconds"]


def test_groups_scale_between_bounds_and_never_begin_without_a_gpu():
    for name, spec in job_specs().items():
        cluster = spec["rayClusterSpec"]
        assert cluster["enableInTreeAutoscaling"] is True
        assert cluster["rayVersion"] == PINS["ray"]
        assert cluster["authOptions"] == {"mode": "token"}
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
        assert list(groups) == (["answer"] if "answer" in name else ["decode", "encode"])
        for group, settings in groups.items():
            assert 1 <= settings["minReplicas"] <= settings["replicas"] < settings["maxReplicas"]
            (container,) = settings["template"]["spec"]["containers"]
            has_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
            assert has_gpu == (group != "decode")
            assert not has_gpu or settings["maxReplicas"] <= GROWTH * settings["replicas"]  # others would idle
            assert container["image"].endswith("-cuda" if has_gpu else "-cpu")


@pytest.mark.parametrize("name", FILES)
def test_every_pod_is_confined(name):
    for template in [found for document in documents(name) for found in pod_templates(document)]:
        pod = template["spec"]
        assert pod["securityContext"].items() >= {"runAsNonRoot": True, "runAsUser": 1000}.items()
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        assert all("sizeLimit" in volume["emptyDir"] for volume in volumes.values() if "emptyDir" in volume)
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert set(container["resources"]["requests"]) >= {"cpu", "memory"}
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert set(mounts) <= set(volumes)
            assert mounts["tmp"] == "/tmp"  # Ray, Python and kubectl write there, and nowhere else
            assert not any("value" in env and "SECRET" in env["name"] for env in container.get("env", []))


def test_scratch_fits_what_a_worker_may_use():
    for spec in job_specs().values():
        for template in pod_templates(spec["rayClusterSpec"]):
            (container,) = template["spec"]["containers"]
            env = {entry["name"]: entry.get("value") for entry in container["env"]}
            assert env["TMPDIR"] == "/scratch"
            sizes = [volume["emptyDir"]["sizeLimit"] for volume in template["spec"]["volumes"] if "emptyDir" in volume]
            allowed = container["resources"]["limits"]["ephemeral-storage"]
            assert sum(int(size.removesuffix("Gi")) for size in sizes) <= int(allowed.removesuffix("Gi"))


def test_images_are_those_of_this_version():
    version = next(
        line.split('"')[1] for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("version")
    )
    for name in job_specs():
        images = {
            container["image"]
            for document in documents(name)
            for template in pod_templates(document)
            for container in template["spec"]["containers"]
        }
        expected = {f"registry.example.com/longvlm-index:{version}-{kind}" for kind in ("cpu", "cuda")}
        assert images == expected


def test_both_ways_to_schedule_a_night_run_the_same_job():
    assert only("nightly/raycronjob.yaml")["spec"]["jobTemplate"] == only("nightly/rayjob.yaml")["spec"]
    cron = only("nightly/cronjob.yaml")["spec"]
    assert cron["concurrencyPolicy"] == "Forbid"
    assert cron["schedule"] == only("nightly/raycronjob.yaml")["spec"]["schedule"]


def test_the_cron_job_creates_what_the_config_map_holds_with_the_right_to_do_so():
    pod = only("nightly/cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (generator,) = only("kustomization.yaml")["configMapGenerator"]
    files = {f"/etc/longvlm/{name.rsplit('/')[-1]}" for name in generator["files"]}
    assert "--filename=/etc/longvlm/rayjob.yaml" in container["args"]
    assert "/etc/longvlm/rayjob.yaml" in files
    assert pod["volumes"][0] == {"name": "nightly", "configMap": {"name": generator["name"]}}
    words = shlex.split(only("nightly/rayjob.yaml")["spec"]["entrypoint"])
    assert parsed(words)["questions"] in files
    kinds = {(document["kind"], document["metadata"]["name"]): document for document in documents("access.yaml")}
    assert ("ServiceAccount", pod["serviceAccountName"]) in kinds
    assert kinds["Role", "longvlm-nightly"]["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}
    ]


def test_standing_questions_can_be_read():
    from longvlm.pipeline.answering.questions import read_questions

    assert len(read_questions(str(INFRA / "nightly/questions.jsonl"))) == 2


def test_what_pods_name_exists():
    names = {
        (doc["kind"], doc["metadata"].get("name")) for name in FILES for doc in documents(name) if "metadata" in doc
    }
    for spec in job_specs().values():
        for template in pod_templates(spec["rayClusterSpec"]):
            assert ("ServiceAccount", template["spec"]["serviceAccountName"]) in names
            for volume in template["spec"]["volumes"]:
                if claim := volume.get("persistentVolumeClaim"):
                    assert ("PersistentVolumeClaim", claim["claimName"]) in names


def test_kustomizations_list_every_file():
    listed = set()
    for name in KUSTOMIZATIONS:
        folder = (INFRA / name).parent
        kustomization = yaml.safe_load((INFRA / name).read_text())
        files = list(kustomization["resources"])
        files += [file for generator in kustomization["configMapGenerator"] for file in generator["files"]]
        assert all((folder / file).is_file() for file in files)
        listed |= {str((folder / file).relative_to(INFRA)) for file in files}
    present = {str(path.relative_to(INFRA)) for path in INFRA.rglob("*") if path.is_file()}
    assert present - listed - BY_HAND - set(KUSTOMIZATIONS) == {"README.md", "Dockerfile"}
