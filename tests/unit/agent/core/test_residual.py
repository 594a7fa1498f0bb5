from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vram_agent.core.residual import MemorySamples, ProcessSample, compute_memory_report
from vram_agent.protocol import MemoryClasses, ResidualSource

PROCESS = ProcessSample(
    device_bytes=1000,
    model_bytes=600,
    live_tensor_bytes=50,
    allocator_cache_bytes=100,
    runtime_arena_bytes=30,
    context_bytes=150,
)


@pytest.mark.parametrize(
    ("samples", "used", "residual", "classes"),
    [
        pytest.param(
            MemorySamples(source=ResidualSource.PROCESS, processes=[PROCESS]),
            1000,
            400,
            MemoryClasses(
                live_tensors=50,
                allocator_cache=100,
                runtime_arena=30,
                context_and_libraries=150,
                unattributed=70,
            ),
            id="Process counts the processes as measured",
        ),
        pytest.param(
            MemorySamples(
                source=ResidualSource.EXCLUSIVE,
                device_used_bytes=1500,
                baseline_bytes=200,
                processes=[PROCESS],
            ),
            1300,
            700,
            MemoryClasses(
                live_tensors=50,
                allocator_cache=100,
                runtime_arena=30,
                context_and_libraries=150,
                other_processes=300,
                unattributed=70,
            ),
            id="Exclusive counts the device above its baseline and names strangers",
        ),
        pytest.param(
            MemorySamples(
                source=ResidualSource.SELF,
                device_used_bytes=9000,
                processes=[
                    ProcessSample(
                        device_bytes=None,
                        model_bytes=600,
                        allocator_cache_bytes=100,
                        context_bytes=150,
                    )
                ],
            ),
            850,
            250,
            MemoryClasses(allocator_cache=100, context_and_libraries=150),
            id="Self counts the processes' own account and nobody else",
        ),
        pytest.param(
            MemorySamples(
                source=ResidualSource.EXCLUSIVE,
                device_used_bytes=500,
                baseline_bytes=600,
                processes=[PROCESS],
            ),
            0,
            0,
            MemoryClasses(),
            id="a residual is never negative",
        ),
        pytest.param(
            MemorySamples(source=ResidualSource.UNKNOWN),
            0,
            0,
            MemoryClasses(),
            id="without processes there is nothing",
        ),
    ],
)
def test_memory_report(
    samples: MemorySamples, used: int, residual: int, classes: MemoryClasses
) -> None:
    report = compute_memory_report(samples)
    assert (report.used_bytes, report.residual_bytes, report.classes) == (used, residual, classes)


sizes = st.integers(0, 1 << 40)
samples = st.builds(
    MemorySamples,
    source=st.sampled_from(ResidualSource),
    device_used_bytes=sizes,
    baseline_bytes=sizes,
    processes=st.lists(
        st.builds(
            ProcessSample,
            device_bytes=st.none() | sizes,
            model_bytes=sizes,
            live_tensor_bytes=sizes,
            allocator_cache_bytes=sizes,
            runtime_arena_bytes=sizes,
            context_bytes=sizes,
        ),
        max_size=4,
    ),
)


@given(samples)
def test_the_classes_sum_to_the_residual_and_none_is_negative(samples: MemorySamples) -> None:
    report = compute_memory_report(samples)
    classes = [getattr(report.classes, name) for name in MemoryClasses.__struct_fields__]
    assert min(classes) >= 0
    assert sum(classes) == report.residual_bytes
    assert report.residual_bytes == max(0, report.used_bytes - report.model_bytes)
