"""What the CUDA compiler says of the kernels, without a GPU and without torch: they compile for every architecture, no
register spills, the main paths move 16 bytes at a time, and with no more instructions and registers than today. Needs
nvcc."""

import functools
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from sass import Code, count, cuda_tool, sass_of

ROOT = Path(__file__).parents[1]
ARCHS = ("80", "90", "100", "120")
NVCC = cuda_tool("nvcc")


@dataclass(frozen=True)
class Header:
    """A header of kernels: what instantiates all of them as its binding does, and how many 16-byte loads and stores the
    widest path of a kernel has in flight. Mangled names begin with their length."""

    uses: str
    loads: dict[str, int]
    stores: dict[str, int]


LOGITS = ("float", "__half", "__nv_bfloat16", "double")
HEADERS = {
    "compaction": Header(
        "auto* use = &gather; auto* used = &plan; auto* uses = &invert; using Zeros = unsigned* (*)(int64_t);"
        "template void vtw::cuda::move(std::vector<Lanes>, const Plan&, const DenseRows&, Zeros&&, cudaStream_t);"
        "template void vtw::cuda::move(std::vector<Lanes>, const Plan&, const PagedRows&, Zeros&&, cudaStream_t);",
        loads={"GatheredRows": 4, "DenseRows": 8, "PagedRows": 8},
        stores={"GatheredRows": 4, "DenseRows": 8, "PagedRows": 8},
    ),
    "kl_divergence": Header(
        "".join(
            f"template void kl::forward<{T}>(const kl::Forward<{T}>&, cudaStream_t);"
            f"template void kl::backward<{T}>(const kl::Backward<{T}>&, cudaStream_t);"
            f"template void kl::forward_backward<{T}>(kl::ForwardBackward<{T}>, cudaStream_t);"
            f"template void kl::scale<{T}>({T}*, int64_t, const kl::Real<{T}>*, const kl::Device&, cudaStream_t);"
            for T in LOGITS
        )
        + "auto* a = &kl::merge_states<float>; auto* b = &kl::merge_states<double>;"
        "auto* c = &kl::from_state<float>; auto* d = &kl::from_state<double>;",
        loads={"14forward_kernel": 16, "15backward_kernel": 16, "23forward_backward_kernel": 2, "12scale_kernel": 1},
        stores={"15backward_kernel": 2, "23forward_backward_kernel": 1, "12scale_kernel": 1},  # of one gradient
    ),
}
# A cold build on two cores; measured: half a minute.
BUILD_SECONDS = 120


@functools.cache
def compiled(header: str, arch: str, folder: Path) -> tuple[dict[str, str], str]:
    source, cubin = folder / f"{header}.cu", folder / f"{header}_{arch}.cubin"
    source.write_text(f'#include "cuda/{header}.cuh"\nusing namespace vtw::cuda;\n{HEADERS[header].uses}\n')
    command = [NVCC, "-std=c++17", "-O3", f"-arch=sm_{arch}", f"-I{ROOT / 'csrc'}", "-cubin", "-Xptxas=-v"]
    done = subprocess.run([*command, "-o", cubin, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return sass_of(cubin), done.stderr


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    if NVCC is None:
        pytest.skip("there is no nvcc")
    return tmp_path_factory.mktemp("cubins")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("header", HEADERS)
def test_no_spills(folder, header, arch):
    sass, report = compiled(header, arch, folder)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) == len(sass) > 0
    assert set(spills) == {("0", "0", "0")}, report
    for name, code in sass.items():
        assert count(code, r"LDL\S*") == count(code, r"STL\S*") == 0, name


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("header", HEADERS)
def test_16_byte_accesses(folder, header, arch):
    sass, _ = compiled(header, arch, folder)
    # Loads go to registers or, asynchronously, to shared memory.
    for expected, instruction in (
        (HEADERS[header].loads, r"(?:LDG|LDGSTS)\.E\.(?:\w+\.)*128\S*"),
        (HEADERS[header].stores, r"STG\.E\.(?:\w+\.)*128\S*"),
    ):
        for kernel, least in expected.items():
            found = [code for name, code in sass.items() if kernel in name]
            assert found, kernel
            for code in found:
                assert count(code, instruction) >= least, kernel


WIDE, EXPONENTIAL = r"(?:LDG|LDGSTS|LDS|STG)\.(?:\w+\.)*128\S*", r"MUFU\.EX2"
# Of compaction: all that is loaded, and stored where others see it; and of that, rows and where they are.
ACCESS, WAYS = r"(?:LDG|STG|STS)\S*", r"(?:LDG|STG|STS)\S*\.128\S*"


@dataclass(frozen=True)
class Budget:
    """What a kernel may cost on its main path, on any architecture: a loop, or the way through a kernel without one.
    benchmarks/roofline.md says what follows from it.

    Args:
        header, kernel: where it is, and what its mangled name contains.
        matches: what the path is known by: so many instructions that match.
        moved: bytes that a warp moves on it, read and written.
        instructions: at most, of a warp; and no more than four fifths of what an H200 could issue while it moves them.
        registers: at most, of a thread; threads: of a block.
        blocks: at least, that registers leave room for on a multiprocessor.
    """

    header: str
    kernel: str
    matches: tuple[str, int]
    moved: int
    instructions: int
    registers: int
    threads: int
    blocks: int
    loop: bool = True


def pairs(wide: int, exponentials: int) -> tuple[str, int]:
    return f"{WIDE}|{EXPONENTIAL}", wide + exponentials


FORWARD, BACKWARD = "14forward_kernelI{}E", "15backward_kernelI{}Lb0ELb1EE"
FUSED = "23forward_backward_kernelI{}Lb0ELb1EE"
H200_BYTES, H200_INSTRUCTIONS = 4.3e12, 132 * 4 * 1.98e9  # per second; copies that were measured, and warps
BF16, FP32 = "13__nv_bfloat16", "f"
BUDGETS = {
    "gather": Budget("compaction", "ILi80ENS0_12GatheredRowsELb0E", (ACCESS, 11), 4096, 231, 40, 256, 6, loop=False),
    "move": Budget("compaction", "ILi80ENS0_9DenseRowsELb0E", (ACCESS, 19), 8192, 255, 64, 256, 4, loop=False),
    "move, paged": Budget("compaction", "ILi80ENS0_9PagedRowsELb0E", (ACCESS, 21), 8192, 314, 64, 256, 4, loop=False),
    "move, in turns": Budget("compaction", "ILi80ENS0_9DenseRowsELb1E", (WAYS, 18), 8192, 335, 64, 256, 4),
    "move, paged, in turns": Budget("compaction", "ILi80ENS0_9PagedRowsELb1E", (WAYS, 18), 8192, 339, 64, 256, 4),
    "forward, bf16": Budget("kl_divergence", FORWARD.format(BF16), pairs(4, 16), 1024, 140, 64, 256, 4),
    "forward, fp32": Budget("kl_divergence", FORWARD.format(FP32), pairs(4, 8), 1024, 84, 56, 256, 4),
    "gradient of q, bf16": Budget("kl_divergence", BACKWARD.format(BF16), pairs(5, 16), 1536, 110, 48, 256, 4),
    "gradient of q, fp32": Budget("kl_divergence", BACKWARD.format(FP32), pairs(5, 8), 1536, 64, 48, 256, 4),
    # At once: the logits are loaded, summed, and read again for the gradients.
    "loads, bf16": Budget("kl_divergence", FUSED.format(BF16), pairs(2, 0), 1024, 19, 64, 512, 2),
    "sums, bf16": Budget("kl_divergence", FUSED.format(BF16), pairs(2, 16), 1024, 115, 64, 512, 2),
    "gradients of q, bf16": Budget("kl_divergence", FUSED.format(BF16), pairs(3, 16), 1536, 87, 64, 512, 2),
}


def cost(name: str, arch: str, folder: Path) -> tuple[int, int]:
    """Instructions of a warp on the main path, and registers of a thread."""
    budget = BUDGETS[name]
    sass, report = compiled(budget.header, arch, folder)
    (kernel,) = (kernel for kernel in sass if budget.kernel in kernel)
    code = Code.of(sass[kernel])
    path = (code.loop if budget.loop else code.path)(*budget.matches)
    assert path, f"{name}: there is no such path"
    (registers,) = re.findall(rf"entry function '{kernel}'.*?Used (\d+) registers", report, re.DOTALL)
    return len(path), int(registers)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", BUDGETS)
def test_budget(folder, name, arch):
    budget = BUDGETS[name]
    instructions, registers = cost(name, arch, folder)
    assert instructions <= budget.instructions
    assert instructions / budget.moved * H200_BYTES <= 0.8 * H200_INSTRUCTIONS
    assert registers <= budget.registers
    assert 65536 // (-(-registers // 8) * 8 * budget.threads) >= budget.blocks


@pytest.mark.parametrize("arch", ARCHS)
def test_compaction_only_moves_bytes(folder, arch):
    sass, _ = compiled("compaction", arch, folder)
    assert all(count(code, r"(?:FADD|FMUL|FFMA|DADD|DMUL|DFMA)\S*") == 0 for code in sass.values())


def test_the_whole_extension_builds_and_loads(tmp_path, folder):
    """Against the torch that is there, which may well have no CUDA itself."""
    environment = os.environ | {"VTW_KERNELS_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    build = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path / "temp"]
    begin = time.monotonic()
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    seconds = time.monotonic() - begin
    assert done.returncode == 0, done.stdout + done.stderr
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'vtw_kernels')!r});"
        "import torch, _C, _build_info; print(_build_info.build_info()['cuda_archs']);"
        "names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith('vtw_kernels::')];"
        "print(sorted(x for x in names if torch._C._dispatch_has_kernel_for_dispatch_key(x, 'CUDA')))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    archs, ops = loaded.stdout.splitlines()
    assert archs == "['9.0']"
    for op in (
        "plan_compaction",
        "compact",
        "compact_",
        "expand",
        "compact_paged_",
        "plan_packed_",
        "kl_divergence_with_state",
    ):
        assert f"'vtw_kernels::{op}'" in ops
    assert seconds < BUILD_SECONDS
