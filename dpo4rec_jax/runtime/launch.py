"""Meeting the other processes of a run: where they are is told by a scheduler, or given."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo4rec_jax.config import InputError, RuntimeConfig
from dpo4rec_jax.runtime import processes
from dpo4rec_jax.runtime.processes import Processes, Store

CONNECT_SECONDS = 300


def start(config: RuntimeConfig, stop_requested: threading.Event) -> Processes:
    """Joins the other processes of this run, if there are any; before jax touches a device.

    Raises InputError where the others are not told completely or cannot be met.
    """
    told = given(config, os.environ)
    if config.processes == "off" or (not told and scheduler(os.environ) is None):
        return processes.this()
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is ours
    try:
        jax.distributed.initialize(
            **told,
            initialization_timeout=CONNECT_SECONDS,
            heartbeat_timeout_seconds=config.heartbeat_s,
        )
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"runtime.processes: cannot meet the other processes ({reason}); give the address of "
            "process 0, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or set runtime.processes: off"
        ) from None
    index, count = jax.process_index(), jax.process_count()
    if count == 1:
        return processes.this()
    return processes.join(Processes(index, count, Store(), stop_requested))


def given(config: RuntimeConfig, environment: Mapping[str, str]) -> dict[str, Any]:
    """What config and environment say of the processes; jax finds out the rest."""
    told: dict[str, Any] = {}
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    if config.processes not in ("auto", "off"):
        address = config.processes
        if not address.rpartition(":")[2].isdecimal():
            raise InputError(
                f"runtime.processes: expected auto, off or host:port, got {config.processes!r}"
            )
    if address:
        told["coordinator_address"] = address
    numbers = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    for name, variable in numbers.items():
        text = environment.get(variable)
        if text and not text.isdecimal():
            raise InputError(f"{variable}: expected a whole number, got {text!r}")
        if text:
            told[name] = int(text)
    return told


def scheduler(environment: Mapping[str, str]) -> str | None:
    """Who started several processes and lets jax find them; None for a process on its own."""

    def several(variable: str) -> bool:
        value = environment.get(variable, "")
        return value.isdecimal() and int(value) > 1

    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    if several("SLURM_NTASKS") and {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= environment.keys():
        return "slurm"
    if several("OMPI_COMM_WORLD_SIZE"):
        return "open mpi"
    if "," in hosts or several("MEGASCALE_NUM_SLICES"):
        return "gke"
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys():
        return "kubernetes"
    on_cpu = environment.get("JAX_PLATFORMS", "").startswith("cpu")
    return "cloud tpu" if not on_cpu and _tpu_attached() else None


def _tpu_attached() -> bool:
    """A machine with TPU chips: its metadata say whether it is one of several."""
    devices = Path("/dev")
    chips = [*devices.glob("accel*"), *devices.glob("vfio/[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None
