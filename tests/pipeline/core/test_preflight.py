"""What would only fail later is refused, mended or warned of beforehand."""

from __future__ import annotations

import getpass
import json
import resource
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma2Config

import pipeline
from pipeline.core import preflight
from pipeline.core.config import LearnerConfig, LoraConfig, ModelConfig, RolloutConfig, StorageConfig
from pipeline.core.errors import UserError
from pipeline.core.models import model_size, write_checksums
from pipeline.core.plan.memory import Device
from pipeline.core.policies import PolicySpec
from pipeline.core.preflight import check_machine, check_models, check_run, lacks_to_compile

GB = 10**9


@pytest.fixture(autouse=True)
def _free_of_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


# ---------------------------------------------------------------- this machine


def test_a_sound_machine_is_left_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    environment = {"USER": "someone", "VLLM_PORT": "8000"}
    check_machine(starts_ray=True, environment=environment, cwd=tmp_path)
    assert environment == {"USER": "someone", "VLLM_PORT": "8000"}
    assert [record for record in caplog.records if "VLLM_PORT" in record.message] == []


@pytest.mark.parametrize(
    ("variable", "length", "starts_ray", "refused"),
    [
        ("TMPDIR", 30, True, False),
        ("TMPDIR", 60, True, True),
        ("TMPDIR", 60, False, False),
        ("TMPDIR", 90, False, True),
        ("RAY_TMPDIR", 60, True, True),
        ("RAY_TMPDIR", 60, False, False),
    ],
)
def test_a_temporary_folder_too_deep_for_sockets(
    tmp_path: Path, variable: str, length: int, starts_ray: bool, refused: bool
) -> None:
    def check() -> None:
        check_machine(starts_ray=starts_ray, environment={variable: "/" + "x" * (length - 1)}, cwd=tmp_path)

    if not refused:
        check()
        return
    with pytest.raises(
        UserError, match=f"^{variable} is /x+: .* bytes too long .* set {variable} to a shorter"
    ):
        check()


@pytest.mark.parametrize("name", ["pipeline", "actors", "retriever_service"])
@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.with_suffix(".py").touch()])
def test_a_working_directory_that_hides_our_packages_from_workers(
    tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    make(tmp_path / name)
    with pytest.raises(
        UserError, match=f"has a {name} of its own .*; start the command in another directory"
    ):
        check_machine(starts_ray=True, environment={}, cwd=tmp_path)


def test_a_package_that_python_took_for_ours_already_is_refused_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pipeline").mkdir()
    monkeypatch.setattr(pipeline, "__file__", str(tmp_path / "pipeline/__init__.py"))
    with pytest.raises(UserError, match="has a pipeline of its own"):
        check_machine(starts_ray=True, environment={}, cwd=tmp_path)


def test_the_checkout_itself_hides_nothing() -> None:
    home = Path(preflight.__file__).resolve().parents[2]
    check_machine(starts_ray=True, environment={}, cwd=home)


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], list[tuple[int, int]]]:
    """Open files as (soft, hard); gives what they are set to."""

    def install(soft: int, hard: int) -> list[tuple[int, int]]:
        made: list[tuple[int, int]] = []
        monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
        monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: made.append(limits))
        return made

    return install


@pytest.mark.parametrize(
    ("soft", "hard", "made"),
    [(256, 524_288, [(65_536, 524_288)]), (1024, 8192, [(8192, 8192)]), (1 << 20, 1 << 20, [])],
)
def test_few_open_files_are_raised_to_what_is_allowed(
    tmp_path: Path, limits: Any, soft: int, hard: int, made: list[tuple[int, int]]
) -> None:
    set_to = limits(soft, hard)
    check_machine(starts_ray=True, environment={}, cwd=tmp_path)
    assert set_to == made


def test_too_few_open_files_are_refused(tmp_path: Path, limits: Any) -> None:
    limits(256, 256)
    with pytest.raises(UserError, match=r"may open 256 files here \(ulimit -Hn\)"):
        check_machine(starts_ray=True, environment={}, cwd=tmp_path)


def test_a_user_without_a_passwd_entry_gets_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(getpass, "getuser", nobody)
    environment: dict[str, str] = {}
    check_machine(starts_ray=True, environment=environment, cwd=tmp_path)
    assert environment["USER"].startswith("uid")


def test_the_address_of_a_service_is_no_port_of_vllm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    environment = {"VLLM_PORT": "tcp://10.0.0.1:8000"}
    check_machine(starts_ray=True, environment=environment, cwd=tmp_path)
    assert "VLLM_PORT" not in environment
    assert "VLLM_PORT is tcp://10.0.0.1:8000" in caplog.text and "enableServiceLinks" in caplog.text


@pytest.fixture
def headers(tmp_path: Path) -> Path:
    (tmp_path / "include").mkdir()
    (tmp_path / "include/Python.h").touch()
    return tmp_path / "include"


def test_a_compiler_and_the_header_files_of_python_are_all_that_kernels_need(headers: Path) -> None:
    assert lacks_to_compile({"CC": "cc", "PATH": ""}, headers) == ""


def test_without_a_compiler_kernels_cannot_be_compiled(tmp_path: Path, headers: Path) -> None:
    environment = {"PATH": str(tmp_path / "bin")}
    assert "no C compiler (gcc, clang or $CC)" in lacks_to_compile(environment, headers)

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/clang").touch(0o755)
    assert lacks_to_compile(environment, headers) == ""


def test_without_the_header_files_of_python_kernels_cannot_be_compiled(headers: Path) -> None:
    (headers / "Python.h").unlink()
    assert f"{headers} has no Python.h" in lacks_to_compile({"CC": "cc"}, headers)


def test_engines_on_this_machines_gpus_are_refused_without_a_compiler(tmp_path: Path) -> None:
    nothing = {"PATH": str(tmp_path)}
    with pytest.raises(UserError, match="no C compiler"):
        check_machine(starts_ray=True, on_gpus=True, environment=dict(nothing), cwd=tmp_path)
    check_machine(starts_ray=False, on_gpus=True, environment=dict(nothing), cwd=tmp_path)
    check_machine(starts_ray=True, on_gpus=False, environment=dict(nothing), cwd=tmp_path)


def test_little_shared_memory_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_free(monkeypatch, total=64 << 20)
    check_machine(starts_ray=True, environment={}, cwd=tmp_path)
    assert "/dev/shm has 67.1 MB" in caplog.text and "--shm-size" in caplog.text


# ---------------------------------------------------------------- models


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """An offline cache of the hub with a snapshot of somebody/model of the given files; gives the snapshot."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def make(*names: str) -> Path:
        folder = tmp_path / "models--somebody--model"
        snapshot = folder / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(snapshot.name)
        for name in names:
            (snapshot / name).write_text("{}")
        return snapshot

    return make


def test_a_whole_snapshot_is_accepted_offline(hub: Any) -> None:
    hub("config.json", "model.safetensors", "tokenizer.json")
    check_models(["somebody/model"])


def test_an_incomplete_snapshot_is_refused_offline(hub: Any) -> None:
    hub("config.json", "tokenizer.json")
    with pytest.raises(UserError, match=r"has no weights .*out of reach \(HF_HUB_OFFLINE\): fetch it"):
        check_models(["somebody/model"])


def test_a_snapshot_that_lacks_one_of_its_weights_is_refused_offline(hub: Any) -> None:
    snapshot = hub("config.json", "tokenizer.json", "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(UserError, match=r"lacks 1 of its files of weights \(model-00002-of-00002"):
        check_models(["somebody/model"])


def test_a_model_that_is_not_in_the_cache_is_refused_offline(hub: Any) -> None:
    with pytest.raises(
        UserError, match=r"somebody/model is no directory here, nor in the cache .*hf download somebody/model"
    ):
        check_models(["somebody/model"])


def test_what_can_be_downloaded_is_left_to_that(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub("config.json")
    check_models(["somebody/model"])


def test_a_package_that_the_learner_would_miss_behind_the_first_sampling_is_missed_at_once(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = PolicySpec(
        "searcher",
        ModelConfig(path=str(model)),
        RolloutConfig(),
        LearnerConfig(attention="flash_attention_2"),
    )
    with_free(monkeypatch, 100 * GB)
    found = {"flash_attn": None}
    monkeypatch.setattr("pipeline.core.preflight.find_spec", found.__getitem__)
    with pytest.raises(
        UserError, match=r"^learner\.attention: .* needs the package flash-attn, which is not"
    ):
        check_run(tmp_path, [spec], StorageConfig(), versions_to_come=1, tokens=0, device="gpu")
    found["flash_attn"] = object()  # type: ignore[assignment]
    check_run(tmp_path, [spec], StorageConfig(), versions_to_come=1, tokens=0, device="gpu")


def test_a_model_that_packed_rows_would_compute_otherwise_is_refused_before_anything_starts(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, 100 * GB)
    Gemma2Config(num_hidden_layers=2).save_pretrained(model)

    def check(**learner: Any) -> None:
        spec = PolicySpec("a", ModelConfig(path=str(model)), RolloutConfig(), LearnerConfig(**learner))
        check_run(tmp_path, [spec], StorageConfig(), versions_to_come=1, tokens=0, device="gpu")

    with pytest.raises(
        UserError, match=r"^learner\.attention: packed .* softcap; set learner\.attention=eager"
    ):
        check()
    check(attention="eager")


# ---------------------------------------------------------------- disk


def with_free(monkeypatch: pytest.MonkeyPatch, free: int = 0, total: int = 1000 * GB) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(total, total - free, free)
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory whose weights say that they are a billion parameters of two bytes."""
    path = tmp_path / "model"
    path.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (path / name).write_text("{}")
    header = json.dumps(
        {"a": {"dtype": "BF16", "shape": [1000, 1_000_000], "data_offsets": [0, 2 * GB]}}
    ).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2 * GB)  # holes
    return path


def policy(model: Path, lora: LoraConfig | None = None) -> PolicySpec:
    return PolicySpec("searcher", ModelConfig(path=str(model)), RolloutConfig(), LearnerConfig(lora=lora))


def test_a_model_is_measured_without_reading_its_weights(model: Path) -> None:
    size = model_size(model)
    assert (size.parameters, round(size.bytes, -6)) == (GB, 2 * GB)


def test_a_model_that_a_run_exported_is_read_through(model: Path) -> None:
    (model / "tokenizer.json").write_text("{} ")
    check_models([str(model)])
    write_checksums(model)
    check_models([str(model)])
    (model / "tokenizer.json").write_text("{}\n")
    with pytest.raises(UserError, match=r"tokenizer\.json was changed since it was written"):
        check_models([str(model)])


def test_a_disk_too_small_for_the_next_version_is_refused(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, 15 * GB)
    with pytest.raises(
        UserError, match=r"15.0 GB free, .* writes 16.0 GB .*checkpoint 12.0 GB at 12 bytes a par"
    ):
        check_run(
            tmp_path / "runs" / "new",
            [policy(model)],
            StorageConfig(),
            versions_to_come=3,
            tokens=0,
            device="cpu",
        )


def test_what_a_training_that_was_cut_off_will_write_over_counts_as_room(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lies(path: str, size: int) -> None:
        file = tmp_path / "run/iterations" / path
        file.parent.mkdir(parents=True)
        with file.open("wb") as opened:
            opened.truncate(size)  # holes

    def check() -> None:
        check_run(
            tmp_path / "run", [policy(model)], StorageConfig(), versions_to_come=1, tokens=0, device="cpu"
        )

    with_free(monkeypatch, 3 * GB)
    lies("0001/searcher/learner/a/rank_0.safetensors", 12 * GB)
    with pytest.raises(UserError, match=r"3.0 GB free, and a training step writes 16.0 GB more"):
        check()
    lies("0001/searcher/learner/b/rank_0.safetensors", 12 * GB)
    with pytest.raises(UserError, match=r"3.0 GB free, and a training step writes 4.0 GB more"):
        check()
    lies("0001/searcher/.model.new/model.safetensors", 1 * GB)
    check()
    (tmp_path / "run/iterations/0001/searcher/train.json").write_text("{}")
    with pytest.raises(UserError, match=r"writes 15.0 GB more"):
        check()


def test_adapters_need_no_checkpoint_of_the_whole_model(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, 17 * GB)
    check_run(
        tmp_path, [policy(model, LoraConfig())], StorageConfig(), versions_to_come=3, tokens=0, device="cpu"
    )


def test_a_disk_too_small_for_the_whole_run_is_warned_of(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_free(monkeypatch, 49 * GB)
    check_run(tmp_path, [policy(model)], StorageConfig(), versions_to_come=3, tokens=10**6, device="cpu")
    assert caplog.text == ""
    check_run(tmp_path, [policy(model)], StorageConfig(), versions_to_come=3, tokens=10**8, device="cpu")
    assert "49.0 GB free, and the run may come to 49.8 GB: 3 models, 3 checkpoints" in caplog.text


def test_models_and_checkpoints_count_as_many_as_stay(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_free(monkeypatch, 60 * GB)
    storage = StorageConfig(keep_last=1, keep_states=1)
    check_run(tmp_path, [policy(model)], storage, versions_to_come=50, tokens=0, device="cpu")
    assert caplog.text == ""
    check_run(
        tmp_path, [policy(model)], StorageConfig(keep_states=2), versions_to_come=50, tokens=0, device="cpu"
    )
    assert "may come to 248.0 GB: 50 models, 4 checkpoints" in caplog.text


@pytest.mark.parametrize("versions", [0, -1])
def test_a_run_that_trains_nothing_more_needs_no_room(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, versions: int
) -> None:
    with_free(monkeypatch, 0)
    check_run(tmp_path, [policy(model)], StorageConfig(), versions_to_come=versions, tokens=0, device="cpu")


@pytest.mark.parametrize(("float32", "warns"), [(0.05, True), (0.005, False)])
def test_bfloat16_on_a_processor_that_is_slow_at_it_is_warned_of(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    float32: float, warns: bool,
) -> None:  # fmt: skip
    speeds = {"bfloat16": 0.01, "float32": float32}
    monkeypatch.setattr("pipeline.core.preflight.core_tflops", speeds.__getitem__)
    spec = policy(model)
    in_bfloat16 = replace(spec, rollout=RolloutConfig(dtype="bfloat16"))

    def look(spec: PolicySpec, device: Device) -> str:
        caplog.clear()
        check_run(tmp_path, [spec], StorageConfig(), versions_to_come=0, tokens=0, device=device)
        return caplog.text

    assert look(spec, "cpu") == look(in_bfloat16, "gpu") == ""
    said = "rollout.dtype: bfloat16, which this processor multiplies 5.0 times as slowly as float32"
    assert (said in look(in_bfloat16, "cpu")) == warns


def test_a_run_in_the_upload_of_a_job_is_refused(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = tmp_path / "ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1"
    upload.mkdir(parents=True)
    monkeypatch.chdir(upload)
    with pytest.raises(UserError, match=r"--run runs/a is .* in the upload of this job, which Ray removes"):
        check_run(
            Path("runs/a"), [policy(model)], StorageConfig(), versions_to_come=1, tokens=0, device="cpu"
        )
    check_run(
        tmp_path / "runs/a", [policy(model)], StorageConfig(), versions_to_come=1, tokens=0, device="cpu"
    )


def test_weights_that_were_cut_off_are_refused(tmp_path: Path, model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(UserError, match="is cut off or no safetensors file"):
        check_run(tmp_path, [policy(model)], StorageConfig(), versions_to_come=1, tokens=0, device="cpu")
