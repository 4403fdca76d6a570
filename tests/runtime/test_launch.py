"""Which surroundings mean several processes, and what is said of incomplete ones."""

from __future__ import annotations

import threading

import pytest

from dpo4rec_jax.config import InputError, RuntimeConfig
from dpo4rec_jax.runtime import launch
from dpo4rec_jax.runtime.processes import this

SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "node[1-4]"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (SLURM, "slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, None),  # an interactive shell
        ({"SLURM_NTASKS": "4"}, None),  # the batch script itself, outside srun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "open mpi"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "gke"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"MEGASCALE_NUM_SLICES": "2", "TPU_WORKER_HOSTNAMES": "a"}, "gke"),
        (KUBERNETES, "kubernetes"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod that is no part of a job
    ],
)
def test_several_processes_are_told_by_their_scheduler(
    environment: dict[str, str], expected: str | None
) -> None:
    assert launch.scheduler(environment | {"JAX_PLATFORMS": "cpu"}) == expected


def test_a_process_on_its_own_stays_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    assert launch.start(RuntimeConfig(), threading.Event()) is this()
    assert this().count == 1


def test_off_keeps_a_process_alone_whatever_surrounds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert launch.start(RuntimeConfig(processes="off"), threading.Event()).count == 1


def test_config_comes_before_the_environment() -> None:
    environment = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2"}
    assert launch.given(RuntimeConfig(processes="host:2"), environment) == {
        "coordinator_address": "host:2",
        "num_processes": 2,
    }


def test_a_number_that_is_none_is_named() -> None:
    with pytest.raises(InputError, match="JAX_PROCESS_ID: expected a whole number, got 'one'"):
        launch.given(RuntimeConfig(), {"JAX_PROCESS_ID": "one"})


def test_an_address_without_a_port_is_refused() -> None:
    with pytest.raises(InputError, match="expected auto, off or host:port, got 'host'"):
        launch.given(RuntimeConfig(processes="host"), {})
