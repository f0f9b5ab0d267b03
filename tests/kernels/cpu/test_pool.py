import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from harness import address, rows_batch, run

from trtllm_cli.errors import EngineError, ResourceError
from trtllm_cli.kernels.cpu import library, row_steps


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
def test_steps_see_what_the_steps_before_them_wrote(kernels, num_threads):
    x, one = np.zeros((16, 512), np.float32), np.ones((16, 512), np.float32)
    small, step = np.zeros((16, 4), np.float32), row_steps.add_step
    wide = [step(address(x), address(one), address(x), width=512)] * 5
    narrow = [step(address(small), address(one), address(small), width=4)] * 2
    with kernels.pool(num_threads) as pool:
        for _ in range(200):
            run(pool, wide + narrow + wide, rows_batch(16))
    assert (x == 2000).all()
    assert (small == 400).all()


def test_threads_that_sleep_wake_up(kernels):
    x = np.zeros((64, 512), np.float32)
    one = np.ones_like(x)
    with kernels.pool(3) as pool:
        for _ in range(20):
            time.sleep(0.003)
            run(pool, [row_steps.add_step(address(x), address(one), address(x), width=512)] * 3, rows_batch(64))
    assert (x == 60).all()


def test_two_pools_at_once(kernels):
    def work(x, one):
        with kernels.pool(2) as pool:
            for _ in range(100):
                run(pool, [row_steps.add_step(address(x), address(one), address(x), width=512)] * 4, rows_batch(32))

    arrays = [np.zeros((32, 512), np.float32) for _ in range(2)]
    threads = [threading.Thread(target=work, args=(x, np.ones_like(x))) for x in arrays]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all((x == 400).all() for x in arrays)


def test_a_pool_needs_a_thread(kernels):
    with pytest.raises(ResourceError, match="cannot start"):
        kernels.pool(0)


def test_nothing_to_run(kernels):
    with kernels.pool(2) as pool:
        run(pool, [], rows_batch(1))


def test_closing_twice_is_fine(kernels):
    pool = kernels.pool(2)
    pool.close()
    pool.close()


def test_what_is_no_library_is_refused():
    with pytest.raises(EngineError, match="cannot be loaded"):
        library.Library.load(b"no library")


def test_running_needs_no_torch():
    code = "import sys, trtllm_cli.kernels.cpu.library; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
