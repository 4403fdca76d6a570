"""How far a loop may send programs ahead of the devices."""

from __future__ import annotations

from typing import Any

import jax

AHEAD = 8  # calls, each of a few programs


class Throttle:
    """Called after each dispatch of a loop that fetches nothing for long, with arrays of it.

    Of a program for several CPU devices, launches and executions share one pool of threads, and a
    launch waits there while 32 programs are in flight on its device. Then a collective's threads
    and such a launch can fill the pool, and the device that the collective waits for gets none: for
    ever (XLA ends the process after a minute). So there every `AHEAD`th call waits for the devices.
    On one device, and on others than CPUs, no call waits.
    """

    def __init__(self) -> None:
        self._sent = 0

    def __call__(self, newest: Any) -> None:
        self._sent += 1
        if self._sent % AHEAD == 0 and _on_several_cpus(jax.tree.leaves(newest)[0]):
            jax.block_until_ready(newest)


def _on_several_cpus(array: jax.Array) -> bool:
    devices = array.sharding.addressable_devices
    return len(devices) > 1 and all(device.platform == "cpu" for device in devices)
