from trtllm_cli.run.request import SamplingParams
from trtllm_cli.run.scheduler import Batch
from trtllm_cli.run.sequence import Request, Sequence
from trtllm_cli.run.step_inputs import InputBuilder
from trtllm_cli.run.step_plan import plan_step


def sequence(token_ids: list[int], num_computed: int, blocks: list[int], row: int) -> Sequence:
    request = Request(0, 0, SamplingParams(), len(token_ids), 100, 0, frozenset(), frozenset())
    return Sequence(request, 0, token_ids, num_computed=num_computed, blocks=blocks, row=row)


def test_a_decode_and_a_chunk():
    builder = InputBuilder(3, 10, 2)
    batch = Batch()
    batch.add(sequence([10, 11, 12], 2, [7, 3], row=2), 1)
    batch.add(sequence([20, 21, 22, 23, 24], 1, [5, 9, 4], row=0), 3)
    inputs = builder.build(plan_step(batch))
    assert {name: array.tolist() for name, array in vars(inputs).items()} == {
        "input_ids": [12, 21, 22, 23],
        "positions": [2, 1, 2, 3],
        "slot_mapping": [6, 11, 18, 19],
        "block_tables": [[7, 3], [5, 9]],
        "query_start": [0, 1, 4],
        "seq_lens": [3, 4],
        "logits_indices": [0],
    }


def test_only_new_blocks_are_written_and_old_rows_are_cleared():
    builder = InputBuilder(1, 4, 1)

    def tables(seq: Sequence) -> list[list[int]]:
        batch = Batch()
        batch.add(seq, 1)
        return builder.build(plan_step(batch)).block_tables.tolist()

    seq = sequence([1, 2], 1, [6, 7], row=0)
    assert tables(seq) == [[6, 7]]
    seq.token_ids.append(3)
    seq.blocks.append(8)
    seq.num_computed = 2
    assert tables(seq) == [[6, 7, 8]]
    assert tables(sequence([4], 0, [2], row=0)) == [[2]]
    assert builder._tables.tolist() == [[2, 0, 0, 0]]


def test_a_step_of_a_token_each_is_told_as_any_other():
    def batch(*more: Sequence) -> Batch:
        batch = Batch()
        for row, (tokens, computed, blocks) in enumerate([([1, 2, -3], 2, [4, 8]), ([5, 6, 7], 1, [2, 6])]):
            batch.add(sequence(tokens, computed, blocks, row), 1)  # of the second the last token is left for later
        for seq in more:
            batch.add(seq, 2)
        return batch

    ones = vars(InputBuilder(3, 10, 2).build(plan_step(batch())))
    mixed = vars(InputBuilder(3, 10, 2).build(plan_step(batch(sequence([8, 9], 0, [0], row=2)))))
    assert ones["input_ids"].tolist() == [-3, 6]
    assert ones["logits_indices"].tolist() == [0]
    assert ones["query_start"].tolist() == mixed["query_start"].tolist()[:3]
    for name in ("positions", "slot_mapping", "block_tables", "seq_lens"):
        assert ones[name].tolist() == mixed[name].tolist()[:2]
        assert ones[name].dtype == mixed[name].dtype
        assert ones[name].flags.c_contiguous
