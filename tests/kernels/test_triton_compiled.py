"""Every Triton kernel compiles ahead of time for every kind of GPU in the table, and fits its shared memory.

No GPU is needed: Triton's compiler and ptxas come with it. Nothing is run, so this says nothing about results or speed.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mfext_kernels.tuning import NARROW, Config, Op, pick

FILES = (
    "stickbreaking.triton",
    "stickbreaking.wide_heads",
    "grouped_linear.triton",
    "fused_linear_cross_entropy.triton",
    "cross_entropy.triton",
)
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10}
CONFIG_OF: dict[str, Op] = {
    "forward_kernel": "attention_forward",
    "sticks_kernel": "attention_backward",
    "grad_queries_kernel": "attention_backward",
    "grad_keys_kernel": "attention_backward",
    "decode_kernel": "attention_decode",
    "join_kernel": "attention_decode",
    "wide_forward_kernel": "wide_forward",
    "wide_backward_kernel": "wide_backward",
    "tiles_kernel": "rows",
    "rows_kernel": "rows",
    "back_kernel": "back",
    "weights_kernel": "weights",
    "cross_entropy_kernel": "cross_entropy",
    "loss_kernel": "cross_entropy",
    "grad_logits_kernel": "cross_entropy",
}
FLOATS = {
    "sticks",
    "sums",
    "parts",
    "lefts",
    "grad_k",
    "grad_v",
    "grad_gates",
    "losses",
    "scores",
    "grads",
    "totals",
    "share",
}
LONGS = {"starts", "ends", "tokens", "order", "left_tokens", "right_tokens", "targets"}
INTEGERS = {"first_tiles", "tiles", "bounds"}
INPUTS = {"q", "k", "v", "out", "grad_out", "grad_q", "x", "weight", "gates", "hidden", "grad", "own_rows", "gated"}
MULTIPLES = {"k_batch", "k_key", "k_head", "v_batch", "v_key", "v_head", "x_stride", "grad_stride", "expert_stride"}
MULTIPLES |= {"depth_stride", "column_stride", "left_stride", "right_stride", "row_stride"}
MULTIPLES |= {"depth", "num_columns", "num_rows"}
MULTIPLES |= {"weights_stride"}
INPUTS |= {"product", "left", "right", "logits", "weights", "grad_logits"}


@pytest.fixture(scope="module", autouse=True)
def _own_compiler_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.fail("TRITON_INTERPRET=1 leaves nothing to compile; unset it")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def module_of(file: str) -> ModuleType:
    return importlib.import_module(f"mfext_kernels.{file}")


def kernel_of(name: str) -> Any:
    (found,) = [vars(module_of(file))[name] for file in FILES if name in vars(module_of(file))]
    return found


def type_of(name: str, dtype: str) -> str:
    if name in FLOATS:
        return "*fp32"
    if name in LONGS or name in INTEGERS:
        return "*i64" if name in LONGS else "*i32"
    return f"*{dtype}" if name in INPUTS else "fp32" if name.startswith("scale") else "i32"


def constants(config: Config, width: int, bare: bool) -> dict[str, object]:
    values = {"CHOSEN": 2, "WIDTH": width, "PADDED": width, "ROWS": config.rows, "COLUMNS": config.columns}
    values |= {"KEYS": config.columns, "DEPTH": config.depth, "PRECISION": "ieee", "TILES": 4, "EXPERTS": 32}
    values |= {"ADD": not bare, "ACTIVATE": not bare, "GRADIENT": not bare, "KEEP": not bare}
    if bare:  # every tensor that may be absent is
        values |= dict.fromkeys(("starts", "ends", "tokens", "hidden", "gated", "left_tokens", "right_tokens", "gates"))
    return values


def compiled(
    name: str, capability: int, dtype: str, width: int = NARROW, bare: bool = False, op: Op | None = None
) -> Any:
    """With the blocks of `op`, the kernel's own unless given; decoding has sizes of 1, which a launch compiles in."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = kernel_of(name)
    config = pick(f"sm_{capability}", op or CONFIG_OF[name], 4 if dtype == "fp32" else 2, width)
    known = constants(config, width, bare)
    if name == "back_kernel" and bare:
        del known["gates"]
    if op == "wide_decode":
        known |= dict.fromkeys(("CHOSEN", "heads", "length", "num_rows"), 1)
    if not bare:  # what a launch finds out by itself: side by side, and lengths and strides in multiples of 16
        known |= {"column_stride": 1}
    signature = {each: "constexpr" if each in known else type_of(each, dtype) for each in kernel.arg_names}
    given = {each: known[each] for each in kernel.arg_names if each in known}
    aligned = [
        number
        for number, (each, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and not bare and each in MULTIPLES)
    ]
    attributes = {(number,): [["tt.divisibility", 16]] for number in aligned}
    return compile_kernel(
        ASTSource(kernel, signature, given, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": config.warps, "num_stages": config.stages},
    )


def test_every_kernel_is_named_here() -> None:
    names = {name for file in FILES for name in vars(module_of(file)) if name.endswith("_kernel")}
    assert names == set(CONFIG_OF)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", CONFIG_OF)
def test_bf16_kernels_compile_and_fit(name: str, capability: int) -> None:
    built = compiled(name, capability, "bf16")
    assert f".target sm_{capability}" in built.asm["ptx"]
    assert len(built.asm["cubin"]) > 1000
    assert built.metadata.shared <= SHARED_BYTES[capability]


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIG_OF)
def test_fp32_kernels_with_nothing_optional_compile_and_fit_a_card_outside_the_table(name: str) -> None:
    built = compiled(name, 86, "fp32", bare=True)
    assert built.metadata.shared <= SHARED_BYTES[86]
    assert "tf32" not in built.asm["ptx"], "fp32 inputs must be multiplied in fp32"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward_kernel", "grad_queries_kernel", "grad_keys_kernel", "decode_kernel"])
def test_attention_kernels_fit_with_wide_heads(name: str) -> None:
    built = compiled(name, 80, "bf16", width=128)
    assert built.metadata.shared <= SHARED_BYTES[80]


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype", "bare"), [(80, "bf16", True), (90, "bf16", False), (86, "fp32", True)])
def test_decoding_of_wide_heads_compiles_and_fits(capability: int, dtype: str, bare: bool) -> None:
    built = compiled("wide_forward_kernel", capability, dtype, bare=bare, op="wide_decode")
    assert built.metadata.shared <= SHARED_BYTES[capability]


def test_no_kernel_uses_atomics() -> None:
    """The order of every sum is fixed, so two runs give the same bits."""
    for name in FILES:
        file = module_of(name).__file__
        assert file is not None
        assert not any("tl.atomic" in path.read_text() for path in Path(file).parent.glob("*.py"))
