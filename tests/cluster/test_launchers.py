"""The cluster launcher's files: Ray's own schema and checks, AWS's own model of an instance, and what they start."""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from tests.conftest import ROOT

FILES = {name: ROOT / "cluster" / f"{name}.yaml" for name in ("aws", "gcp")}
SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
TYPE_FIELDS = set(next(iter(SCHEMA["properties"]["available_node_types"]["patternProperties"].values()))["properties"])
# What Ray's schema leaves open: of a cloud's own, what there is in Google's API for an instance.
GOOGLE = {
    "machineType": str, "disks": list, "scheduling": dict, "guestAccelerators": list, "metadata": dict,
    "networkInterfaces": list, "labels": dict, "serviceAccounts": list,
}  # fmt: skip
GOOGLE_SCHEDULING = {"provisioningModel", "instanceTerminationAction", "onHostMaintenance", "automaticRestart"}


def read(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(FILES[name].read_text())
    return loaded


def check(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` does with a file before it asks a cloud for anything.

    Raises:
        jsonschema.ValidationError: a field or a value that Ray does not take.
        ValueError: parts that do not fit together.
    """
    jsonschema.validate(config, SCHEMA)
    for node in config["available_node_types"].values():
        # Ray's schema lets a node type have any fields.
        assert set(node) <= TYPE_FIELDS, set(node) - TYPE_FIELDS
    prepared: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("name", FILES)
def test_ray_takes_the_file(name: str) -> None:
    prepared = check(read(name))
    head, workers = prepared["available_node_types"]["head"], prepared["available_node_types"]["gpu"]
    assert head["max_workers"] == 0 and workers["max_workers"] == prepared["max_workers"]


@pytest.mark.parametrize(
    "path, value",
    [
        (("idle_timeout_minute",), 5),
        (("max_workers",), "eight"),
        (("available_node_types", "gpu", "max_worker"), 8),
        (("available_node_types", "gpu", "resources", "CPU"), -1),
        (("head_node_type",), "master"),
        (("available_node_types", "gpu", "min_workers"), 9),
        (("provider", "availability_zone"), ["a", "b"]),
    ],
)
@pytest.mark.parametrize("name", FILES)
def test_what_is_wrong_is_found(name: str, path: tuple[str, ...], value: Any) -> None:
    wrong = read(name)
    at = wrong
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, ValueError, AssertionError)):
        check(wrong)


def test_amazon_takes_the_nodes() -> None:
    """Against botocore's model of RunInstances, with what Ray adds to it."""
    import botocore.session
    from botocore.validate import ParamValidator

    model = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    types = read("aws")["available_node_types"]

    def errors(node_config: dict[str, Any]) -> str:
        return str(ParamValidator().validate({**node_config, "MinCount": 1, "MaxCount": 1}, model).generate_report())

    for node in types.values():
        assert errors(node["node_config"]) == ""
    assert "InstanceTyp" in errors({**types["gpu"]["node_config"], "InstanceTyp": "g5.2xlarge"})
    assert types["gpu"]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert "InstanceMarketOptions" not in types["head"]["node_config"], "the head is on demand"


def test_ray_launches_the_nodes_of_amazon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own code for AWS, from the file to instances that run, with a stand-in for the cloud."""
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    for name, value in {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-west-2",
                        "MOTO_IAM_LOAD_MANAGED_POLICIES": "true", "HOME": str(tmp_path)}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    (tmp_path / ".ssh").mkdir()
    with mock_aws():
        iam, ec2 = boto3.client("iam"), boto3.client("ec2")
        # Ray makes it itself, and waits 15 seconds then.
        ray_role = "ray-autoscaler-v1"
        iam.create_role(RoleName=ray_role, AssumeRolePolicyDocument="{}")
        iam.create_instance_profile(InstanceProfileName=ray_role)
        iam.add_role_to_instance_profile(InstanceProfileName=ray_role, RoleName=ray_role)
        config = check(read("aws"))
        for node in config["available_node_types"].values():
            assert re.fullmatch(r"ami-0{17}", node["node_config"]["ImageId"]), "to be filled in"
            node["node_config"]["ImageId"] = ec2.describe_images()["Images"][0]["ImageId"]
        config = AWSNodeProvider.fillout_available_node_types_resources(bootstrap_aws(config))
        resources = {name: node["resources"] for name, node in config["available_node_types"].items()}
        assert resources["head"] == {"CPU": 0} and resources["gpu"]["GPU"] == 1 and resources["gpu"]["CPU"] == 8
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        for name, node in config["available_node_types"].items():
            provider.create_node(dict(node["node_config"]), {"ray-user-node-type": name}, 1)
        listed = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
        assert {i["InstanceType"]: i.get("InstanceLifecycle") for i in listed} == {
            "m5.xlarge": None, "g5.2xlarge": "spot"}  # fmt: skip


def test_google_takes_the_nodes() -> None:
    types = read("gcp")["available_node_types"]
    for node in types.values():
        for field, value in node["node_config"].items():
            assert isinstance(value, GOOGLE[field])
        (disk,) = node["node_config"]["disks"]
        assert disk["boot"] and re.fullmatch(
            r"projects/[\w-]+/global/images/family/[\w-]+", disk["initializeParams"]["sourceImage"]
        )
    scheduling = types["gpu"]["node_config"]["scheduling"]
    assert set(scheduling) <= GOOGLE_SCHEDULING and scheduling["provisioningModel"] == "SPOT"
    assert scheduling["onHostMaintenance"] == "TERMINATE", "a machine with a GPU cannot be moved"
    assert "scheduling" not in types["head"]["node_config"], "the head is on demand"


def started(command: str) -> dict[str, Any]:
    """The options of the ``ray start`` in a line, parsed by Ray."""
    words = shlex.split(command)
    return start.make_context("start", words[words.index("start") + 1 :], parent=click.Context(start)).params


@pytest.mark.parametrize("name", FILES)
def test_the_head_offers_nothing_and_its_dashboard_is_for_itself(name: str) -> None:
    config = read(name)
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
    head = started(config["head_start_ray_commands"][-1])
    assert head["head"] and head["num_cpus"] == 0 and head["dashboard_host"] == "127.0.0.1"
    assert head["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
    worker = started(config["worker_start_ray_commands"][-1])
    assert worker["address"] == f"$RAY_HEAD_IP:{head['port']}" and not worker["head"]


@pytest.mark.parametrize("name", FILES)
def test_what_is_installed_is_what_was_tested(name: str) -> None:
    config = read(name)
    installs = [c for c in config["setup_commands"] if " install " in c and "pip" in c]
    assert all("-c ~/metadist/constraints.txt" in c for c in installs)
    assert installs[0].endswith(" torch"), "PyTorch first, by itself"
    assert any("~/metadist" in word and "constraints" not in word for word in installs[1].split())
    user, sent = config["auth"]["ssh_user"], config["file_mounts"]
    assert {f"/home/{user}/metadist/{source}": source for source in sent.values()} == sent
    assert all((ROOT / source).exists() for source in sent.values())
    assert {"constraints.txt", "pyproject.toml", "README.md", "LICENSE", "metadist", "configs"} == set(sent.values())


@pytest.mark.parametrize("name", FILES)
def test_shell_lines_are_sound(name: str, tmp_path: Path) -> None:
    config = read(name)
    kinds = ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    script = tmp_path / "lines.sh"
    script.write_text("\n".join(["#!/bin/bash", *(c for kind in kinds for c in config[kind])]))
    # SC1091: the file is on the node. SC2102: extras in brackets are no glob. SC2086: an address is one word.
    command = [str(Path(sys.executable).parent / "shellcheck"), "--exclude=SC1091,SC2102,SC2086,SC1090", str(script)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
