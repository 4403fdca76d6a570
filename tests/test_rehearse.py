"""The rehearsal command on 8 simulated devices, and what the compiled programs move there."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpo4rec_jax import rehearse
from dpo4rec_jax.rehearsal import theory

pytestmark = pytest.mark.slow  # every part is compiled, in processes of their own

CONFIG = """
policy: {path: tiny, tiny_width: 64, tiny_layers: 2, tiny_heads: 4, max_prompt_tokens: 48}
reason: {samples: 4, max_new_tokens: 16, slots: 32}
data: {synthetic: {users: 60, items: 40}}
encode: {encoder: hashing}
rank: {seeds: 2, epochs: 2}
prefer: {folds: 2}
align: {batch_pairs: 16, microbatch_pairs: 8}
runtime: {mesh: {data: 1, fsdp: 4, tensor: 2}}
"""


@pytest.fixture(scope="module")
def config_path(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("rehearse") / "toy.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return str(path)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: the number of simulated devices is fixed once jax has started."""
    root, tests = Path(__file__).parents[1], Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{root}:{tests}", "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=900
    )


@pytest.mark.parametrize("topology", ["v9:4x4", "v5e", "cpu:0x1", "cpu:", "h900:8", "h100"])
def test_an_unknown_topology_is_one_line_and_status_2(topology, config_path, capsys) -> None:
    assert rehearse.main(["--config", config_path, "--topology", topology]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --topology {topology}: expected v5e, v5p, v6e with a shape")
    assert error.count("\n") == 1


@pytest.fixture(scope="module")
def whole(config_path, tmp_path_factory) -> tuple[dict, str]:
    """All parts of the toy: the figures and the text."""
    output = tmp_path_factory.mktemp("figures") / "figures.json"
    arguments = ["--config", config_path, "--topology", "cpu:8", "--json", str(output)]
    done = run("-m", "dpo4rec_jax.rehearse", *arguments, "--no-search")
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text(encoding="utf-8")), done.stdout


def test_every_part_is_compiled_and_read(whole) -> None:
    figures, text = whole
    assert figures["devices"] == 8
    names = {
        name: [program["name"] for program in part["programs"]]
        for name, part in figures["parts"].items()
    }
    assert names["sampling"][-1] == "decode, a token"
    assert names["dpo"] == ["dpo accumulate", "dpo update"]
    assert names["rank"] == ["rank, an epoch of 1 steps"]
    for part in figures["parts"].values():
        assert part["fits"]
        for program in part["programs"]:
            assert program["memory"]["arguments"] > 0
            assert program["bytes_moved"] > 0
    assert "| dpo accumulate (x 2) |" in text  # two microbatches a step


def test_a_part_that_does_not_fit_ends_with_status_2_and_names_what_is_largest(config_path) -> None:
    arguments = ["--config", config_path, "--topology", "cpu:8", "--what", "dpo"]
    done = run("-m", "dpo4rec_jax.rehearse", *arguments, "--memory-gib", "0.0001", "--no-search")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "expected at most 0.00 GiB a chip" in line
    assert "the largest is" in line
    assert "lower align.microbatch_pairs (now 8)" in line


MOVES = """
import json
from dpo4rec_jax.rehearsal.chips import machine_of
machine = machine_of("cpu:8")
import jax
from dpo4rec_jax.config import Config
from dpo4rec_jax.models import llama
from dpo4rec_jax.rehearsal import costs, hlo, programs
MODEL = llama.LlamaConfig(1408, 160, 320, 4, 8, 4, 16)
def moved(part, method):
    config = Config.model_validate({
        "policy": {"max_prompt_tokens": 192}, "reason": {"max_new_tokens": 160, "slots": 32},
        "align": {"method": method, "batch_pairs": 16, "microbatch_pairs": 8},
        "runtime": {"mesh": {"data": 1, "fsdp": 4, "tensor": 2}}})
    program = programs.PARTS[part](config, MODEL, machine).programs[0 if part == "dpo" else -1]
    found = costs.costs_of(hlo.parse(program.lower().compile().as_text())).collectives
    return [{"kind": c.kind, "arrays": c.arrays, "bytes": c.bytes, "groups": c.groups,
             "times": c.times, "origin": c.origin} for c in found if c.group_size > 1]
print(json.dumps({"lora": moved("dpo", "lora"), "full": moved("dpo", "full"),
                  "decode": moved("sampling", "lora")}))
"""
# Half the vocabulary is 5.5 blocks of 128, as a quarter of Llama 3's is 250.5.
VOCABULARY, WIDTH, HIDDEN, LAYERS, FSDP, TENSOR = 1408, 160, 320, 4, 4, 2
QUERY, KEY = 8 * 16, 4 * 16
ROWS, TOKENS = 8 // FSDP, 192 + 2 * 160  # of a device


@pytest.fixture(scope="module")
def moves() -> dict[str, list[dict]]:
    done = run("-c", MOVES)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def sizes(array: str) -> list[int]:
    """Of an array written as f32[2,512,128]."""
    return [int(size) for size in array.split("[")[1].rstrip("]").split(",") if size]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_weights_are_gathered_a_layer_at_a_time_and_over_fsdp_alone(moves, method) -> None:
    gathers = [each for each in moves[method] if each["kind"] == "all-gather"]
    assert gathers
    one_table = VOCABULARY * WIDTH // TENSOR * 4
    largest_kernel = WIDTH * HIDDEN // TENSOR * 4
    for each in gathers:
        tables = each["bytes"] == one_table and each["times"] == 1
        assert tables or each["bytes"] <= largest_kernel, each
        assert [len(group) for group in each["groups"]] == [FSDP] * TENSOR, each


@pytest.mark.parametrize("method", ["lora", "full"])
def test_weights_are_gathered_no_more_than_forward_and_backward(moves, method) -> None:
    """Layers are recomputed in the backward pass, with what its products need as well."""
    projections = WIDTH * (2 * QUERY + 2 * KEY + 3 * HIDDEN)
    once = 4 * (LAYERS * projections + 2 * VOCABULARY * WIDTH) / TENSOR
    adapters = 1.2  # beside the weights
    gathered = sum(e["bytes"] * e["times"] for e in moves[method] if e["kind"] == "all-gather")
    assert gathered <= 2 * once * adapters


@pytest.mark.parametrize("part", ["lora", "full", "decode"])
def test_logits_never_travel(moves, part) -> None:
    """Their maxima and sums do. The unembedding and its gradient have the vocabulary as well."""
    for each in moves[part]:
        for array in each["arrays"]:
            shape = sizes(array)
            has_vocabulary = bool({VOCABULARY, VOCABULARY // TENSOR} & set(shape))
            table = math.prod(shape) <= VOCABULARY * WIDTH and len(shape) == 2
            assert not has_vocabulary or (part != "decode" and table), each


def tensor_parallel(moves: list[dict], shape: list[int]) -> float:
    """How often an array of this shape is summed over the tensor axis."""
    pairs = [[2 * i, 2 * i + 1] for i in range(4)]
    reduces = (e for e in moves if e["kind"] == "all-reduce" and e["groups"] == pairs)
    return sum(e["times"] * [sizes(a) for a in e["arrays"]].count(shape) for e in reduces)


def test_decoding_reduces_twice_a_layer_and_once_for_the_embedding(moves) -> None:
    """Simulated devices are of a CPU, where few rows are the right factor (`times_rows`)."""
    rows_of_device = 32 // 4
    assert tensor_parallel(moves["decode"], [WIDTH, rows_of_device]) == 2 * LAYERS
    assert tensor_parallel(moves["decode"], [rows_of_device, 1, WIDTH]) == 1


@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_sums_activations_as_often_as_theory_says(moves, method) -> None:
    """q, k and v share one sum of their input's gradient, and so do gate and up; the embedding
    takes one, forward."""
    found = tensor_parallel(moves[method], [ROWS, TOKENS, WIDTH])
    assert found == LAYERS * theory.all_reduces_of_layer(backward=True, remat=True) + 1


def test_abstract_states_lie_as_real_ones_do() -> None:
    done = run("-c", STATES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "same"


STATES = """
import dataclasses
from dpo4rec_jax.rehearsal.chips import machine_of
machine = machine_of("cpu:8")
import jax
from dpo4rec_jax.config import Config
from dpo4rec_jax.models import llama
from dpo4rec_jax.rehearsal import programs
from dpo4rec_jax.runtime import state as training
from dpo4rec_jax.runtime.mesh import make_mesh, shardings
from dpo4rec_jax.stages import align
from dpo4rec_jax.stages.tuning import Tuning
from dpo4rec_jax.weights.policy import Policy
config = Config.model_validate({"runtime": {"mesh": {"data": 1, "fsdp": 4, "tensor": 2}}})
model = llama.LlamaConfig(64, 16, 32, 2, 4, 2, 4)
mesh = make_mesh(config.runtime.mesh, machine.devices)
params = llama.init(model, jax.random.key(0))
params = jax.device_put(params, shardings(params, mesh))
for lora in (config.align.lora, None):
    tuning = Tuning(Policy(model, params, None, (), {}, {}), lora, mesh)
    optimizer = align.optimizer_of(config.align, 10)[1]
    trainable, _ = tuning.start(0)
    real = training.create(trainable, optimizer, 0, figures=align.FIGURES)
    real = tuning.place_state(real)
    like = programs._training_state(tuning, optimizer, accumulating=True)
    def compare(path, is_, should):
        assert is_.shape == should.shape and is_.dtype == should.dtype, path
        assert is_.sharding.is_equivalent_to(should.sharding, is_.ndim), (path, is_.sharding)
    jax.tree_util.tree_map_with_path(compare, like, real)
split = llama.split_layers(params)
where = programs._split(model, mesh)
jax.tree_util.tree_map_with_path(compare, where, split)
print("same")
"""


KERNELS = MOVES.partition("def moved")[0] + (
    "config = Config.model_validate({'runtime': {'mesh': {'fsdp': 4, 'tensor': 2}}, 'align':"
    "{'batch_pairs': 8}, 'policy': {'max_prompt_tokens': 128}})\n"
    "program = programs.PARTS['dpo'](config, MODEL, machine).programs[0]\n"
    "print(costs.costs_of(hlo.parse(program.lower().compile().as_text())).kernels)\n"
)
PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


def kernels_on(topology: str, sizes: str) -> str:
    """Kernels of a DPO step compiled for what is not there."""
    script = KERNELS.replace('"cpu:8"', f'"{topology}"').replace("320, 4, 8, 4, 16", sizes)
    done = run("-c", script)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs jax[tpu]")
def test_a_tpu_that_is_not_there_compiles_with_its_own_attention() -> None:
    assert "'tpu_custom_call'" in kernels_on("v5e:2x4", "320, 4, 8, 4, 128")


def plugin() -> bool:
    with contextlib.suppress(ModuleNotFoundError):
        return any(importlib.util.find_spec(name) for name in PLUGINS)
    return False


@pytest.mark.skipif(not plugin(), reason="needs jax[cuda13]")
def test_gpus_that_are_not_there_compile_with_their_own_attention() -> None:
    kernels = kernels_on("h100:8", "320, 4, 8, 4, 128, dtype='bfloat16'")
    assert "'__cudnn$fmhaSoftmaxBackward'" in kernels


def test_gpus_without_their_compiler_are_one_line(config_path) -> None:
    if plugin():
        pytest.skip("jax[cuda13] is installed")
    done = run("-m", "dpo4rec_jax.rehearse", "--config", config_path, "--topology", "h100:8")
    assert done.returncode == 2
    assert "--topology h100:8: " in done.stderr and "install jax[cuda12]" in done.stderr
