"""The arithmetic of a measurement, against numbers worked out by hand."""

import random

import numpy as np
import pytest

from trtllm_cli.bench.metrics import (
    Distribution,
    RequestRecord,
    average_concurrency,
    percentile,
    performance,
    streaming,
)

# Two requests. A: 10 prompt tokens, tokens at 1.0, 1.5, 2.5 (TTFT 1, E2E 2.5, TPOT 0.75, ITL 0.5 and 1).
#               B: 20 prompt tokens, arrives at 1.0, one token at 4.0 (TTFT = E2E = 3, no TPOT).
A = RequestRecord(task_id=0, input_tokens=10, arrival=0.0, token_times=[1.0, 1.5, 2.5])
B = RequestRecord(task_id=1, input_tokens=20, arrival=1.0, token_times=[4.0])


def test_one_request():
    assert (A.ttft, A.e2e, A.tpot, A.itl) == (1.0, 2.5, 0.75, [0.5, 1.0])
    assert (B.ttft, B.e2e, B.tpot, B.itl) == (3.0, 3.0, None, [])


def test_performance_by_hand():
    p = performance([A, B], world_size=2)
    assert p.total_latency_ms == 4000
    assert p.avg_request_latency_ms == 2750
    assert p.request_throughput_req_s == 0.5
    assert p.system_output_throughput_tok_s == 1.0
    assert p.system_total_throughput_tok_s == 8.5  # (30 + 4) / 4
    assert p.output_throughput_per_user_tok_s == pytest.approx((3 / 2.5 + 1 / 3) / 2)
    assert p.output_throughput_per_gpu_tok_s == 0.5
    assert p.request_latency_percentiles_ms.p50 == 2750
    assert average_concurrency([A, B]) == 5.5 / 4


def test_streaming_by_hand():
    s = streaming([A, B])
    assert s.avg_ttft_ms == 2000
    assert s.avg_tpot_ms == 750  # of A alone
    assert s.token_output_speed_tok_s == pytest.approx(1 / 0.75)
    assert s.avg_itl_ms == 750
    assert s.itl_percentiles_ms is not None
    assert (s.itl_percentiles_ms.minimum, s.itl_percentiles_ms.maximum) == (500, 1000)


def test_one_token_each_has_no_tpot():
    s = streaming([B])
    assert (s.avg_tpot_ms, s.avg_itl_ms, s.token_output_speed_tok_s) == (None, None, None)
    assert s.tpot_percentiles_ms is None


def test_percentiles_are_numpys():
    rng = random.Random(0)
    for n in (1, 2, 3, 10, 101):
        values = sorted(rng.random() for _ in range(n))
        for q in (0, 50, 90, 95, 99, 100):
            assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)))


def test_distribution():
    d = Distribution.of([3.0, 1.0, 2.0])
    assert d is not None
    assert (d.minimum, d.maximum, d.average, d.p50) == (1, 3, 2, 2)
    assert d.p90 == pytest.approx(2.8)
    assert Distribution.of([]) is None
