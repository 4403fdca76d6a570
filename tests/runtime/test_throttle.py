"""Loops that send many programs of several CPU devices come to their end."""

from __future__ import annotations

import pytest
from process_group import on_eight_devices

# Without the throttle XLA ends each after a minute, nearly always.
STEP_OF_MANY_MICROBATCHES = """
import jax, jax.numpy as jnp, numpy as np
from dpo4rec_jax.models import llama
from dpo4rec_jax.runtime import mesh as meshes, state as training
from dpo4rec_jax.runtime.loader import Microbatch
from dpo4rec_jax.runtime.loop import Programs
from dpo4rec_jax.runtime.optimizer import adamw, learning_rate_schedule

mesh = meshes.make_mesh({"fsdp": -1})
params = llama.init(llama.LlamaConfig(96, 48, 80, 2, 4, 2, 12), jax.random.key(0))
params = meshes.place(params, meshes.shardings(params, mesh))
schedule = learning_rate_schedule(1e-2, 10)
optimizer = adamw(schedule, max_grad_norm=1.0)
state = meshes.place_state(training.create(params, optimizer, 3, figures=()), mesh)

def loss(trainable, frozen, batch, key):
    x, kernel = batch["x"], trainable["layers"]["up"]["kernel"][0]
    for _ in range(10):
        x = jnp.tanh(x @ kernel) @ kernel.T
    return training.Sums((x**2).sum(), jnp.float32(x.shape[0]), {})

programs = Programs(loss, optimizer, schedule)
rows = jax.sharding.NamedSharding(mesh, meshes.BATCH)
for number in range(1000):
    batch = {"x": jax.device_put(np.ones((256, 48), np.float32), rows)}
    microbatch = Microbatch((0,), (1, 1, 1), ends_step=number == 999)
    state, figures = programs.run(state, None, batch, microbatch)
assert int(state.microbatch) == 1000 and np.isfinite(float(figures["loss"]))
print("done")
"""

MANY_PROMPTS_BEFORE_THE_FIRST_TOKEN = """
import jax, numpy as np
from dpo4rec_jax.runtime.mesh import make_mesh, shardings
from dpo4rec_jax.sampling import plan_layout, stream
from sampling import test_sampler as t

mesh = make_mesh({"data": -1, "tensor": 2})
policy = t.tiny_policy()
params = jax.device_put(policy.params, shardings(policy.params, mesh))
prompts = np.random.default_rng(0).integers(3, 60, (256, 900)).tolist()
layout = plan_layout(t.CONFIG, [900] * 256, 1, 8, slots=256, mesh=mesh)
texts = list(stream(t.TinyPolicy(t.CONFIG, params), prompts, layout, mesh=mesh))
assert len(texts) == 256
print("done")
"""


@pytest.mark.parametrize(
    "code",
    [STEP_OF_MANY_MICROBATCHES, MANY_PROMPTS_BEFORE_THE_FIRST_TOKEN],
    ids=["microbatches", "prompts"],
)
def test_many_programs_in_a_row_do_not_hang_eight_cpu_devices(code: str) -> None:
    assert on_eight_devices(code).endswith("done\n")
