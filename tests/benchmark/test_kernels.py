"""What is read from a trace of the profiler: kernels, copies and fills alone, and how long any of them ran."""

import json

import pytest

from benchmark.kernels import Kernel, busy_ms, read_kernels, summarise


def test_annotations_and_calls_of_the_host_are_no_kernels(tmp_path):
    events = [
        {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 10.0, "dur": 5.5},
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 20.0, "dur": 1.0},
        {"ph": "X", "cat": "gpu_memset", "name": "Memset", "ts": 30.0, "dur": 1.0},
        {"ph": "X", "cat": "gpu_user_annotation", "name": "Optimizer.step#AdamW.step", "ts": 0.0, "dur": 100.0},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 5.0, "dur": 3.0},
        {"ph": "X", "cat": "cuda_sync", "name": "Context Sync", "ts": 5.0, "dur": 90.0},
        {"ph": "i", "name": "Record Window End", "ts": 100.0},
    ]
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps({"traceEvents": events}))
    assert read_kernels(trace) == [("gemm", 10.0, 15.5), ("Memcpy HtoD", 20.0, 21.0), ("Memset", 30.0, 31.0)]


def test_time_in_which_several_kernels_run_counts_once():
    apart, inside, across, far = (0, 1000), (200, 300), (900, 1500), (3000, 3500)
    assert busy_ms(Kernel("k", *times) for times in (far, across, apart, inside)) == 2.0
    assert busy_ms([]) == 0.0


def test_kernels_are_listed_by_all_their_time_and_attention_has_its_own():
    flash = [Kernel("void pytorch_flash::flash_fwd_kernel<128>", at, at + 400.0) for at in (0.0, 1000.0)]
    figures = summarise([Kernel("gemm", 400.0, 900.0), *flash])
    assert (figures["busy_ms"], figures["attention_ms"], figures["kernels"]) == pytest.approx((1.3, 0.8, 3))
    assert [(kernel["name"][-4:], kernel["count"], kernel["ms"]) for kernel in figures["longest"]] == [
        ("128>", 2, pytest.approx(0.8)),
        ("gemm", 1, pytest.approx(0.5)),
    ]


@pytest.mark.parametrize(
    ("name", "is_attention"),
    [
        ("void pytorch_flash::flash_bwd_convert_dq_kernel<Flash_bwd_kernel_traits<128>>", True),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", True),
        ("fmha_cutlassF_f32_aligned_64x64_rf_sm80", True),
        ("nvjet_sm90_tst_192x192_64x4_1x2_h_bz_coopB_TNT", False),
        ("kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", False),
        ("swiglu_backward_kernel", False),
    ],
)
def test_attention_is_told_by_its_names(name, is_attention):
    assert summarise([Kernel(name, 0.0, 1000.0)])["attention_ms"] == is_attention
