"""Compiles every kernel of Triton for architectures that need not be there; prints their machine code as JSON.

Run as a program by test_triton_compile.py, because kernels that are interpreted in the process of the tests can't be
compiled there: python triton_kernels.py FOLDER
"""

import json
import sys
from pathlib import Path

import triton.language as tl
from sass import sass_of
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vtw_kernels.triton import compaction, kl_divergence, packed

TARGETS = [GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)] + [GPUTarget("hip", "gfx942", 64)]
ADDRESSES = ("i64",) * compaction.GROUP

# Arguments that keep their Python value, by name, and the types of all others. A list of KV tensors is what the
# launches look like.
WIDE = {"ELEMENT": tl.uint64, "VECTOR": 16, "PER_VECTOR": 2}
PLAN = {"plan": "*i32", "plan_batch": "i64", "rows": "i32"}
GEOMETRY = {"columns": "i32", "limit": "i32", "count": "i32", "size_0": "i32"}
STEPS = dict.fromkeys(compaction.STEPS, "i32") | dict.fromkeys(("from_batch", "to_batch"), "i64")
STRIDES = dict.fromkeys(compaction.STRIDES, "i32") | {"lanes_batch": "i64"}
TABLE = {"table": "*i32", "table_batch": "i64", "table_columns": "i32", "page_size": "i32"}
ONES = {"batch": 1, "plan_row": 1, "size_1": 1}
MOVE_TILE = WIDE | ONES | {"table_column": 1, "LANES": 1, "ROWS": 64, "COLUMNS": 16, "SCAN": 1024}
NARROW = {1: tl.uint8, 2: tl.uint16, 4: tl.uint32, 8: tl.uint64}


def logits(dtype: str, *pointers: str) -> dict:
    types = {"p_ptr": f"*{dtype}", "q_ptr": f"*{dtype}"} | dict.fromkeys(pointers, "*fp32")
    return types | {"p_step": "i32", "q_step": "i32", "vocabulary": "i32", "inverse_bits": "i64"}


def tile(vector: int) -> dict:
    lanes = {"VECTOR": vector, "LANES": kl_divergence.LANES, "ENTRIES": kl_divergence.ENTRIES[vector]}
    return lanes | {"sizes": (), "p_strides": ("i64",), "q_strides": ("i64",)}


KERNELS = {
    "plan": (
        compaction.plan_kernel,
        {"keep": "*u8", "keep_batch": "i64", "limits": "*i32", "tokens": "i32", "rows": "i32", "source": "*i32"}
        | {"lengths": "*i32"},
        {"keep_token": 1, "limit_stride": 1, "PAD_LEFT": False, "LIMITED": True, "TILE": compaction.PLAN_TILE},
    ),
    "invert": (
        compaction.invert_kernel,
        PLAN | {"length": "i32", "inverse": "*i32", "tiles": "i32"},
        {"plan_row": 1, "TILE": compaction.PLAN_TILE},
    ),
    "pack": (
        packed.pack_kernel,
        dict.fromkeys(("query_start", "seq_lens", "visual", "visual_start", "table"), "*i32")
        | dict.fromkeys(packed.OF_STEP, "i32")
        | dict.fromkeys(("source", "text_start", "text_lens"), "*i32")
        | {"slots": "*i64"},
        {"TILE": packed.TILE, "SEQUENCES": packed.SEQUENCES},
    ),
    "gather": (
        compaction.gather_kernel,
        PLAN | GEOMETRY | STEPS | {"sources": ADDRESSES, "targets": ADDRESSES},
        WIDE | ONES | {"POSITIONS": 64, "COLUMNS": 16},
    ),
    **{
        name: (
            compaction.move_kernel,
            PLAN | GEOMETRY | STRIDES | TABLE | {"addresses": ADDRESSES},
            MOVE_TILE | {"PAGED": name == "move_paged"},
        )
        for name in ("move", "move_paged")
    },
    **{
        f"move_{size}": (
            compaction.move_kernel,
            PLAN | GEOMETRY | STRIDES | {"addresses": ADDRESSES, "page_size": "i32"},
            MOVE_TILE
            | dict.fromkeys(("table", "table_batch", "table_columns"), 1)
            | {"PAGED": False, "ELEMENT": element, "VECTOR": size, "PER_VECTOR": 1},
        )
        for size, element in NARROW.items()
    },
    **{
        f"span_{dtype}": (
            kl_divergence.span_kernel,
            logits(dtype, "state_ptr", "kl_ptr") | {"spans": "i32", "span": "i32"},
            tile(vector),
        )
        for dtype, vector in (("bf16", 8), ("fp16", 8), ("fp32", 4))
    },
    **{
        f"gradient{name}_{dtype}": (
            kl_divergence.gradient_kernel,
            logits(dtype, "state_ptr", "slope_ptr")
            | dict.fromkeys(("grad_p_ptr", "grad_q_ptr"), f"*{dtype}")
            | {"tiles": "i32"},
            tile(vector) | {"OF_DIVERGENCE": name == ""},
        )
        for dtype, vector in (("bf16", 8), ("fp16", 8), ("fp32", 4))
        for name in ("", "_of_state")
    },
    "scale": (
        kl_divergence.scale_kernel,
        {"ptr": "*bf16", "count": "i32", "tiles": "i32", "factor_ptr": "*fp32"},
        {"TILE": kl_divergence.SCALED},
    ),
    "merge": (
        kl_divergence.merge_kernel,
        dict.fromkeys(("parts_ptr", "state_ptr", "kl_ptr"), "*fp32") | {"parts": "i32", "inverse_bits": "i64"},
        {"MERGED": kl_divergence.MERGED, "PART_UNIT": 1.0},
    ),
}
OF_LOGITS = ("span", "gradient", "scale")
THREADS = {"merge": kl_divergence.MERGED, "plan": 128, "invert": 128}
THREADS |= {name: kl_divergence.LANES for name in KERNELS if name.startswith(OF_LOGITS)}


def machine_code(name: str, target: GPUTarget, folder: Path) -> str:
    kernel, types, values = KERNELS[name]
    if kernel is compaction.move_kernel:
        values = values | {"WAIT": target.backend == "hip"}
    signature, constants, multiples = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in types or isinstance(values.get(argument), tuple):
            type_ = signature[argument] = types.get(argument, values.get(argument))
            # Where Triton looks, it finds multiples of 16: tensors, and the strides of logits whose rows are whole
            # vectors.
            looks = not (kernel.params[i].do_not_specialize or kernel.params[i].do_not_specialize_on_alignment)
            if isinstance(type_, str) and looks:
                multiples[i,] = [["tt.divisibility", 16]]
            elif isinstance(type_, tuple) and type_ is not ADDRESSES:
                multiples |= {(i, j): [["tt.divisibility", 16]] for j in range(len(type_))}
        else:
            signature[argument], constants[i,] = "constexpr", values[argument]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=multiples)
    warps = max(1, THREADS.get(name, compaction.THREADS) // target.warp_size)
    compiled = compile_kernel(source, target=target, options={"num_warps": warps, "enable_fp_fusion": True})
    if target.backend == "hip":
        return compiled.asm["amdgcn"]
    cubin = folder / f"{name}_{target.arch}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    (code,) = sass_of(cubin).values()
    return code


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    print(json.dumps({f"{name}-{x.arch}": machine_code(name, x, folder) for name in KERNELS for x in TARGETS}))
