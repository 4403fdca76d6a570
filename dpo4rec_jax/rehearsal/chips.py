"""The chips that a rehearsal can compile for: what their vendors publish, and how they are wired.

Peaks are of bfloat16 products in dense matrices. Sources, read in 2025:
- v5e, v5p, v6e: https://cloud.google.com/tpu/docs/v5e, /v5p and /v6e, "System architecture" (peak
  compute, HBM capacity and bandwidth, inter-chip interconnect bandwidth a chip, all links in one
  direction).
- Wrap-around links: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm: v5e and v6e close
  a dimension of 16 to a ring, v5p one that is a multiple of 4.
- H100 SXM, H200: NVIDIA's data sheets (NVLink 900 GB/s a GPU, both directions together; memory as
  nvidia-smi shows it), and that of DGX H100 for the network (400 Gb/s a GPU). Of the memory jax
  takes three quarters unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable
from typing import Any

from dpo4rec_jax.config import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one device: FLOP/s and bytes/s, bytes. `hbm` is what the compiler may fill.

    None where a machine has no published peaks (simulated devices): nothing is estimated then.
    """

    name: str
    flops: float | None
    hbm: float
    hbm_bandwidth: float | None
    link_bandwidth: float | None  # of one link, one direction
    ring: int = 0  # a dimension of a multiple of so many chips is closed to a ring; 0: none
    host: str = ""  # topology of the chips of one host
    network_bandwidth: float | None = None  # of a GPU, to other hosts, one direction


# What the compiler for v5e and v6e leaves a program of 16 and 32 GiB; of v5p's 95 GB.
CHIPS = {
    "v5e": Chip("TPU v5e", 197e12, 15.75 * GIB, 819e9, 1600e9 / 8 / 4, 16, "2x2"),
    "v5p": Chip("TPU v5p", 459e12, 95.74 * GIB, 2765e9, 4800e9 / 8 / 6, 4, "2x2x1"),
    "v6e": Chip("TPU v6e", 918e12, 31.25 * GIB, 1640e9, 3584e9 / 8 / 4, 16, "2x2"),
}
_GPU_SHARE, _MIB = 0.75, 2**20
GPUS = {
    "h100": Chip(
        "H100 SXM", 989e12, 81559 * _MIB * _GPU_SHARE, 3350e9, 450e9, network_bandwidth=50e9
    ),
    "h200": Chip("H200", 989e12, 143771 * _MIB * _GPU_SHARE, 4800e9, 450e9, network_bandwidth=50e9),
}
_TOPOLOGY = re.compile(r"(v\w+):(\d+x\d+(?:x\d+)?)|cpu:(\d+)|(h\d+):(?:(\d+)x)?(\d+)")
# What XLA asks of a card to compile for it. Both chips are alike but for their memory.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f} device_memory_size: {memory:.0f}
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "NVIDIA {name}"
"""


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices to compile for, without their being there; `host` are those of one process."""

    topology: str
    chip: Chip
    devices: list[Any]
    host: list[Any]

    @property
    def platform(self) -> str:
        return self.devices[0].platform

    def axis_bandwidth(self, members: Iterable[Any]) -> float | None:
        """Bytes/s, one direction, into each chip of a group that exchanges data in rings: two
        links for each dimension of the torus that the group spans, one where it is open."""
        link = self.chip.link_bandwidth
        if link is None:
            return None
        if self.chip.network_bandwidth is not None:
            hosts = {device.process_index for device in members}
            return link if len(hosts) == 1 else self.chip.network_bandwidth
        spanned = list(zip(*(device.coords for device in members), strict=True))
        whole = list(zip(*(device.coords for device in self.devices), strict=True))
        links = 0
        for here, there in zip(spanned, whole, strict=True):
            length = max(there) + 1
            closed = self.chip.ring and length % self.chip.ring == 0 and len(set(here)) == length
            links += 0 if len(set(here)) == 1 else 2 if closed else 1
        return link * max(links, 1)


def machine_of(topology: str, memory_gib: float | None = None) -> Machine:
    """The machine of a name such as v5e:16x16, v5p:4x4x4, h100:8 (GPUs of one host), h100:4x8
    (four hosts of eight) or cpu:8 (simulated devices).

    `memory_gib` stands in for the memory of a chip. Must come before anything else initialises
    jax. Raises InputError for a name that is none and for a compiler that is not installed.
    """
    found = _TOPOLOGY.fullmatch(topology)
    if not found or found.group(1) not in (None, *CHIPS) or found.group(4) not in (None, *GPUS):
        raise InputError(
            f"--topology {topology}: expected {', '.join(CHIPS)} with a shape (v5e:4x4, "
            f"v5p:4x4x4), {' or '.join(GPUS)} with a number of GPUs (h100:8, or h100:4x8 for four "
            "hosts), or cpu:N for N simulated devices"
        )
    if found.group(3):
        machine = _simulated(topology, int(found.group(3)))
    elif found.group(4):
        machine = _gpus(topology, GPUS[found.group(4)], int(found.group(5) or 1), found.group(6))
    else:
        machine = _tpus(topology, CHIPS[found.group(1)])
    if memory_gib is None:
        return machine
    return dataclasses.replace(
        machine, chip=dataclasses.replace(machine.chip, hbm=memory_gib * GIB)
    )


def _simulated(topology: str, count: int) -> Machine:
    import jax

    if not 1 <= count <= 512:
        raise InputError(f"--topology {topology}: expected 1 to 512 simulated devices")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / count
    devices = jax.devices()
    return Machine(
        topology, Chip("simulated CPU device", None, memory, None, None), devices, devices
    )


def _tpus(topology: str, chip: Chip) -> Machine:
    # libtpu would ask a cloud's metadata server which machine this is.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # Its lock is for a chip, and there is none: several rehearsals may run at once.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")

    def devices(name: str) -> list[Any]:
        try:
            return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
        except Exception as error:  # jax has no one type for it: no libtpu, a shape that is none
            reason = " ".join(str(error).split())[:160]
            raise InputError(
                f"--topology {topology}: {reason}; install jax[tpu], whose compiler needs no TPU, "
                "or take another shape"
            ) from None

    generation = topology.split(":")[0]
    whole = devices(topology)
    if math.prod(int(n) for n in chip.host.split("x")) > len(whole):
        return Machine(topology, chip, whole, whole)
    return Machine(topology, chip, whole, devices(f"{generation}:{chip.host}"))


def _gpus(topology: str, chip: Chip, hosts: int, a_host: str) -> Machine:
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    target = _HOPPER.format(
        bandwidth=chip.hbm_bandwidth, memory=chip.hbm / _GPU_SHARE, name=chip.name
    )
    try:
        whole = topologies.get_topology_desc(
            platform="cuda",
            topology_name=chip.name,
            topology=f"1x{hosts}x{a_host}",
            target_config=target,
        ).devices
    except Exception as error:  # no plugin, or one that takes another description
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"--topology {topology}: {reason}; install jax[cuda12] or jax[cuda13], whose compiler "
            "needs no GPU"
        ) from None
    return Machine(topology, chip, list(whole), list(whole[: int(a_host)]))
