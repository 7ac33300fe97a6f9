from types import SimpleNamespace

import pytest
from peft import LoraConfig

from pipeline.config.sections import ModelConfig
from pipeline.engine.arguments import (
    build_engine_arguments,
    check_assigned_gpus,
    check_engine_arguments,
    choose_lora_rank,
    count_replica_gpus,
)
from pipeline.gpus import AssignedGpus


def test_unknown_engine_argument_is_named():
    with pytest.raises(ValueError, match="unknown configuration key model.engine.gpu_memory: "):
        check_engine_arguments(ModelConfig(name="demo", engine={"gpu_memory": 0.9}))
    check_engine_arguments(ModelConfig(name="demo", engine={"gpu_memory_utilization": 0.9, "quantization": "fp8"}))


@pytest.mark.parametrize(
    ("name", "several", "one"),
    [
        ("distributed_executor_backend", "ray", "mp"),
        ("data_parallel_backend", "ray", "mp"),
        ("data_parallel_size_local", 1, 4),
        ("data_parallel_hybrid_lb", True, False),
        ("nnodes", 2, 1),
    ],
)
def test_replica_spanning_nodes_is_refused(name, several, one):
    engine = {"data_parallel_size": 4}
    with pytest.raises(ValueError, match=f"model.engine.{name}={several}: an actor's GPUs are on one node"):
        check_engine_arguments(ModelConfig(name="demo", engine={**engine, name: several}))
    check_engine_arguments(ModelConfig(name="demo", engine={**engine, name: one}))


@pytest.mark.parametrize("size", [0, "2", 1.5, None])
def test_invalid_parallel_size_is_named(size):
    with pytest.raises(ValueError, match="model.engine.tensor_parallel_size: expected a whole number above 0, found "):
        check_engine_arguments(ModelConfig(name="demo", engine={"tensor_parallel_size": size}))


def test_replica_processes_belong_to_its_actor():
    """Left alone, vLLM asks Ray for GPUs of its own where its actor is in a placement group."""
    several = ModelConfig(name="m", engine={"tensor_parallel_size": 2, "data_parallel_size": 3})
    assert count_replica_gpus(several) == 6
    assert build_engine_arguments(several)["distributed_executor_backend"] == "mp"
    assert "distributed_executor_backend" not in build_engine_arguments(ModelConfig(name="m"))


def test_gpu_build_of_vllm_requires_an_assigned_gpu(monkeypatch):
    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(is_cuda_alike=lambda: True))
    check_assigned_gpus()  # outside of Ray nothing is assigned
    monkeypatch.setattr("pipeline.gpus.get_assigned_gpus", lambda: AssignedGpus((), 0.0))
    with pytest.raises(ValueError, match="Ray assigned no GPU to this actor: set execution.gpus_per_actor to the GPUs"):
        check_assigned_gpus()


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (4, 8), (16, 16), (24, 32), (512, 512)])
def test_lora_rank_is_rounded_up_to_one_supported_by_vllm(tmp_path, rank, served):
    LoraConfig(r=rank, target_modules=["q_proj"]).save_pretrained(tmp_path)
    assert choose_lora_rank(str(tmp_path)) == served


def test_missing_lora_adapter_is_named(tmp_path):
    with pytest.raises(ValueError, match="model.lora .*nowhere"):
        check_engine_arguments(ModelConfig(name="demo", lora=str(tmp_path / "nowhere")))
