"""launch/pytorchjob.yaml against the schema that Kubeflow's and Kubernetes' own clients carry."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "launch" / "pytorchjob.yaml"
training = pytest.importorskip("kubeflow.training.models", reason="pip install -e '.[cluster]'")
kubernetes = pytest.importorskip("kubernetes.client.models")
yaml = pytest.importorskip("yaml")

_SIMPLE = {"str": str, "int": int, "bool": bool, "object": object}


def _faults(value, kind: str, where: str) -> list[str]:
    """What in a value is not of a kind of the schema: unknown keys, wrong types, what is missing.
    """
    inner = re.fullmatch(r"(?:list\[(.+)\]|dict\(str, (.+)\))", kind)
    if inner and inner[1]:
        return [f"{where}: expected a list"] if not isinstance(value, list) else [
            fault for n, entry in enumerate(value)
            for fault in _faults(entry, inner[1], f"{where}[{n}]")]
    if inner:
        return [fault for key, entry in value.items()
                for fault in _faults(entry, inner[2], f"{where}.{key}")]
    if kind in _SIMPLE:
        fits = isinstance(value, _SIMPLE[kind]) and (kind != "int" or value is not True)
        # A quantity (resources) is declared as text and may be a number.
        return [] if fits or "limits" in where else [f"{where}: {value!r} is not {kind}"]
    model = getattr(training, kind, None) or getattr(kubernetes, kind)
    fields = {name: (attribute, model.openapi_types[attribute])
              for attribute, name in model.attribute_map.items()}
    faults = [f"{where}.{key} is unknown" for key in value if key not in fields]
    for key, entry in value.items():
        if key in fields:
            faults += _faults(entry, fields[key][1], f"{where}.{key}")
    try:  # what is required, and what values are allowed
        model(**{fields[key][0]: entry for key, entry in value.items() if key in fields})
    except ValueError as error:
        faults.append(f"{where}: {error}")
    return faults


def _job() -> dict:
    return yaml.safe_load(FILE.read_text())


def test_the_example_fits_the_schema():
    job = _job()
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert _faults(job, "KubeflowOrgV1PyTorchJob", "job") == []


@pytest.mark.parametrize(("change", "fault"), [
    (lambda job: job["spec"].update(nprocPerNod="8"), "spec.nprocPerNod is unknown"),
    (lambda job: job["spec"].update(nprocPerNode=8), "nprocPerNode: 8 is not str"),
    (lambda job: job["spec"].pop("pytorchReplicaSpecs"), "pytorch_replica_specs"),
    (lambda job: _container(job).pop("name"), "`name`"),
    (lambda job: _container(job).update(command="torchrun"), "command: expected a list"),
])
def test_a_wrong_one_does_not(change, fault):
    job = _job()
    change(job)
    assert any(fault in found for found in _faults(job, "KubeflowOrgV1PyTorchJob", "job"))


def _container(job: dict) -> dict:
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    return worker["template"]["spec"]["containers"][0]
