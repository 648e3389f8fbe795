"""The address of a cluster that is not there, and nodes that have other packages."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from actors.preflight import check_address, cluster_address, compare, describe_node
from actors.session import ray_session
from pipeline.core.config import ClusterConfig
from pipeline.core.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Ray looks for the cluster that runs on this machine."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray"


def test_the_configuration_goes_before_the_variable_and_that_before_the_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cluster_address(None) is None
    file = folder / "ray_current_cluster"
    file.write_text("10.0.0.1:6379\n")
    assert cluster_address(None) == ("10.0.0.1:6379", str(file))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert cluster_address(None) == ("10.0.0.2:6379", "RAY_ADDRESS")
    assert cluster_address("10.0.0.3:6379") == ("10.0.0.3:6379", "cluster.address")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert cluster_address(None) is None


@pytest.fixture
def nobody() -> str:
    """An address that refuses connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"127.0.0.1:{port}"


@pytest.mark.parametrize("form", ["{}", "ray://{}"])
def test_an_address_where_nothing_answers_is_refused(nobody: str, form: str) -> None:
    address = form.format(nobody)
    with pytest.raises(
        UserError, match=f"^RAY_ADDRESS names a Ray cluster at {address}, where nothing answers"
    ):
        check_address(address, "RAY_ADDRESS")


def test_the_file_that_a_dead_head_node_left_is_named(nobody: str, folder: Path) -> None:
    (folder / "ray_current_cluster").write_text(nobody)
    found = cluster_address(None)
    assert found is not None
    with pytest.raises(
        UserError, match=rf"^{folder}/ray_current_cluster names .* {nobody}, .*remove that file"
    ):
        check_address(*found)


def test_an_address_where_something_listens_is_accepted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        check_address(f"127.0.0.1:{server.getsockname()[1]}", "cluster.address")
    check_address("auto", "RAY_ADDRESS")


def test_nodes_with_the_same_packages_are_accepted() -> None:
    compare(describe_node(), [("a", describe_node()), ("b", describe_node())])


def test_nodes_with_other_packages_are_named() -> None:
    here = describe_node()
    nodes = [("a", here), ("b", here | {"torch": "1.0", "transformers": None})]
    with pytest.raises(UserError) as caught:
        compare(here, nodes)
    lines = str(caught.value).splitlines()
    assert lines[1:3] == [
        f"  b: torch 1.0, here {here['torch']}",
        f"  b: transformers missing, here {here['transformers']}",
    ]
    assert "make setup" in lines[-1]


def test_a_node_whose_vllm_would_not_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    here = describe_node()
    monkeypatch.setenv("VLLM_PORT", "tcp://10.0.0.1:8000")
    with pytest.raises(UserError, match=r"VLLM_PORT is tcp://10\.0\.0\.1:8000 on the node b"):
        compare(here, [("a", here), ("b", describe_node())])


def test_a_node_whose_kernels_could_not_be_compiled_is_named() -> None:
    here = describe_node()
    with pytest.raises(UserError, match=r"^on the node b there is no C compiler"):
        compare(here, [("a", here), ("b", here | {"compiler": "there is no C compiler"})])


@pytest.mark.component
def test_a_session_looks_at_every_node_of_the_cluster_and_leaves_it_when_one_is_not_fit() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    said: list[str] = []
    session = ray_session(ClusterConfig(address=cluster.address), said.append)
    try:
        cluster.add_node(num_cpus=1, env_vars={"VLLM_PORT": "tcp://10.0.0.1:8000"})
        with pytest.raises(UserError, match=r"VLLM_PORT is tcp://10\.0\.0\.1:8000 on the node"), session:
            pytest.fail("there is a node on which no engine would start")
        assert not ray.is_initialized()
        assert said == [f"joining the Ray cluster at {cluster.address}, which cluster.address names"]
    finally:
        cluster.shutdown()
