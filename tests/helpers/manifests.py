"""What the tests of infra/ share: its YAML files, and KubeRay's schemas as jsonschema understands them."""

import yaml

from support import CRDS, ROOT, lent

INFRA = ROOT / "infra"
RAYJOBS = ("rayjob-index.yaml", "rayjob-answer.yaml", "nightly/rayjob.yaml")


def documents(name):
    return [document for document in yaml.safe_load_all((INFRA / name).read_text()) if document]


def only(name):
    (document,) = documents(name)
    return document


def job_specs():
    """The spec of every RayJob there is, by the file it stands in."""
    specs = {name: only(name)["spec"] for name in RAYJOBS}
    return specs | {"nightly/raycronjob.yaml": only("nightly/raycronjob.yaml")["spec"]["jobTemplate"]}


def pod_templates(document):
    """Every pod template below a document: whatever has a spec with containers."""
    if isinstance(document, dict):
        if "containers" in document.get("spec", {}):
            yield document
        for value in document.values():
            yield from pod_templates(value)
    elif isinstance(document, list):
        for value in document:
            yield from pod_templates(value)


def crd_schema(kind):
    """The v1 schema of a KubeRay resource, strict: a field that it does not know is an error, not pruned in silence."""
    crd = yaml.load(lent(CRDS / f"ray.io_{kind}.yaml").read_text(), yaml.CSafeLoader)
    (version,) = [version for version in crd["spec"]["versions"] if version["name"] == "v1"]
    return strict(version["schema"]["openAPIV3Schema"])


def strict(node):
    """A node of an openAPIV3Schema as JSON Schema."""
    if isinstance(node, list):
        return [strict(value) for value in node]
    if not isinstance(node, dict):
        return node
    schema = {key: strict(value) for key, value in node.items() if not key.startswith("x-kubernetes-")}
    if node.get("x-kubernetes-int-or-string") is True:
        schema |= {"type": ["integer", "string"]}
    open_ended = node.get("x-kubernetes-preserve-unknown-fields") is True or "additionalProperties" in node
    if isinstance(node.get("properties"), dict) and node.get("type") == "object" and not open_ended:
        schema["additionalProperties"] = False
    if node.get("nullable") is True:
        schema["type"] = [schema["type"], "null"]
    return schema
