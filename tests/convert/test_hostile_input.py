"""Mutated files: every reader takes them, or refuses them with one clear error, and leaves nothing behind."""

import pytest

from tests.fuzzing import READERS, run

COUNT = 150


@pytest.mark.parametrize("reader", READERS, ids=lambda r: r.name)
def test_mutated_input(tmp_path, reader):
    outcome = run(reader, COUNT, tmp_path)
    assert outcome.accepted + outcome.refused == COUNT
    assert outcome.refused  # or nothing was mutated
