"""Triton compiles every kernel for every architecture, without a GPU: no register spills, the main paths move 16 bytes
at a time, a lane is a thread's, and on an AMD GPU no barrier is passed by loads."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sass import Code, count

PROGRAM = Path(__file__).with_name("triton_kernels.py")
LOADS, STORES = r"LDG\.E\.(?:\w+\.)*128\S*", r"STG\.E\.(?:\w+\.)*128\S*"


def compiled(*arguments) -> str:
    """What a program prints whose kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-W", "ignore", *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def sass(tmp_path_factory):
    return json.loads(compiled(PROGRAM, tmp_path_factory.mktemp("cubins")))


def test_compaction_is_compiled_for_all_lengths_and_alignments():
    """Triton looks at no integer but for being 1: only at tensors, and at addresses, which all look alike."""
    code = (
        "from vtw_kernels.triton import compaction as c;"
        "kernels = (c.plan_kernel, c.invert_kernel, c.gather_kernel, c.move_kernel);"
        "params = [x for k in kernels for x in k.params];"
        "looks = {x.name for x in params if not (x.is_constexpr or x.do_not_specialize_on_alignment)};"
        "[(_, number, sources, targets)] = c.launches([('lanes', 16, 32), ('lanes', 2, 24)]);"
        "print(*sorted(looks), number, {x % 2 for x in sources + targets})"
    )
    tensors = "keep lengths limits plan source table inverse".split()
    assert compiled("-c", code).strip() == " ".join([*sorted([*tensors, "addresses", "sources", "targets"]), "2 {1}"])


def test_no_spills(sass):
    assert len(sass) == 21 * 5
    for name, code in sass.items():
        if name.endswith("gfx942"):
            assert re.search(r"ScratchSize: 0\b", code), name
            continue
        assert count(code, r"LDL\S*") == count(code, r"STL\S*") == 0, name


@pytest.mark.parametrize("kernel", ["gather", "move", "move_paged"])
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_compaction_moves_16_bytes_at_a_time(sass, kernel, arch):
    code = sass[f"{kernel}-{arch}"]
    assert count(code, LOADS) >= 4 and count(code, STORES) >= 4


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_logits_are_loaded_16_bytes_at_a_time(sass, dtype, arch):
    assert count(sass[f"span_{dtype}-{arch}"], LOADS) >= 2
    assert count(sass[f"gradient_{dtype}-{arch}"], LOADS) >= 2
    assert count(sass[f"gradient_{dtype}-{arch}"], STORES) >= 2


# Loads and exponentials of a tile, and the instructions that go with them.
LOOPS = {"bf16": (4, 34, 298), "fp32": (8, 34, 249)}


@pytest.mark.parametrize("dtype", LOOPS)
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_threads_exchange_nothing_before_the_end_of_a_row(sass, dtype, arch):
    loads, exponentials, budget = LOOPS[dtype]
    loop = Code.of(sass[f"span_{dtype}-{arch}"]).loop(rf"{LOADS}|MUFU\.EX2", loads + exponentials)
    assert not [name for name in loop if name.startswith("SHFL")]
    assert len(loop) <= budget


@pytest.mark.parametrize("kernel", ["move", "move_paged", *(f"move_{size}" for size in (1, 2, 4, 8))])
def test_no_load_passes_a_barrier(sass, kernel):
    """In place, what another wave may overwrite behind the barrier has arrived before it. NVIDIA's barriers see to
    that."""
    on_their_way, barriers = False, 0
    for line in sass[f"{kernel}-gfx942"].splitlines():
        name = line.strip().partition(" ")[0]
        if re.match("(global|buffer|flat)_load", name):
            on_their_way = True
        elif name == "s_waitcnt" and "vmcnt(0)" in line:
            on_their_way = False
        elif name == "s_barrier":
            barriers += 1
            assert not on_their_way
    assert barriers > 0
