import asyncio
import gc
import threading
import time

import pytest

from tests.fake_runner import FakeRunner, expected_tokens
from tests.run.tiny import byte_level, fake_runners, write_engine  # noqa: F401
from trtllm_cli.errors import EngineError, RequestError, ResourceError, UsageError
from trtllm_cli.run import kv_budget
from trtllm_cli.run.llm import LLM, AsyncLLM
from trtllm_cli.run.request import SamplingParams

VOCAB = 300
pytestmark = pytest.mark.usefixtures("fake_runners")
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture
def engine(tmp_path):
    return write_engine(tmp_path / "engine", byte_level())


@pytest.fixture
def llm(engine):
    with LLM(engine) as llm:
        yield llm


def wanted(prompt_ids, count=12):
    return expected_tokens(prompt_ids, count, VOCAB)


def test_answers_come_in_the_order_of_the_prompts_whatever_their_kind(llm):
    chat = [{"role": "user", "content": "hello"}]
    outputs = llm.generate(["hello world", [1, 2, 3], chat], GREEDY)
    chat_ids = llm.tokenizer.encode("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    assert [o.prompt_token_ids for o in outputs] == [llm.tokenizer.encode("hello world"), [1, 2, 3], chat_ids]
    for output in outputs:
        assert output.finished
        assert output.outputs[0].token_ids == wanted(output.prompt_token_ids)
        assert output.outputs[0].text == llm.tokenizer.decode(output.outputs[0].token_ids)
        assert output.outputs[0].finish_reason == "length"
        assert output.times.arrival < output.times.first_token <= output.times.last_token
    assert outputs[1].prompt is None


def test_one_prompt_needs_no_list(llm):
    for prompt in ("hello", [5, 6], [{"role": "user", "content": "x"}]):
        [output] = llm.generate(prompt, GREEDY)
        assert output.outputs[0].token_ids == wanted(llm.tokenize(prompt))
    assert llm.generate([], GREEDY) == []
    assert llm.chat([{"role": "user", "content": "x"}], GREEDY)[0].outputs[0].token_ids


def test_more_prompts_than_the_batch_holds(llm):
    prompts = [[i, i + 1] for i in range(30)]
    for prompt, output in zip(prompts, llm.generate(prompts, GREEDY), strict=True):
        assert output.outputs[0].token_ids == wanted(prompt)


def test_the_end_token_ends_and_is_no_text(llm):
    [full] = llm.generate([[7, 8]], SamplingParams(max_tokens=30, ignore_eos=True))
    ids = full.outputs[0].token_ids
    [output] = llm.generate([[7, 8]], SamplingParams(max_tokens=30, ignore_eos=True, stop_token_ids=(ids[4],)))
    first = ids.index(ids[4])
    assert output.outputs[0].token_ids == ids[: first + 1]
    assert output.outputs[0].text == llm.tokenizer.decode(ids[:first])
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", ids[4])


def test_a_stop_string_ends_the_text_before_it_and_frees_the_sequence(llm):
    [full] = llm.generate([[7, 8]], SamplingParams(max_tokens=30, ignore_eos=True))
    text = full.outputs[0].text
    stop = text[8:11]
    for include in (False, True):
        params = SamplingParams(max_tokens=30, ignore_eos=True, stop=(stop,), include_stop_str_in_output=include)
        [output] = llm.generate([[7, 8]], params)
        end = text.index(stop)
        assert output.outputs[0].text == text[: end + len(stop) * include]
        assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
        assert len(output.outputs[0].token_ids) < 30
    assert llm.stats.num_running == 0


def test_several_answers_and_logprobs(llm):
    params = SamplingParams(max_tokens=5, n=3, temperature=1.0, seed=3, logprobs=2, ignore_eos=True)
    [output] = llm.generate("hello", params)
    assert len({tuple(one.token_ids) for one in output.outputs}) == 3
    for one in output.outputs:
        assert len(one.logprobs) == len(one.token_ids) == 5
        assert [entry[0].token_id for entry in one.logprobs] == one.token_ids
        assert all(e.token == llm.tokenizer.decode([e.token_id], skip_special_tokens=False) for e in one.logprobs[0])
    assert llm.generate("hello", params)[0].outputs[1].token_ids == output.outputs[1].token_ids


def test_params_of_each_prompt(llm):
    outputs = llm.generate(["hello", "hello"], [SamplingParams(max_tokens=2), SamplingParams(max_tokens=4)])
    assert [len(o.outputs[0].token_ids) for o in outputs] == [2, 4]
    with pytest.raises(UsageError, match="1 sampling params for 2 prompts"):
        llm.generate(["a", "b"], [SamplingParams()])


def test_deltas_add_up_and_the_last_says_so(llm):
    stream = llm.stream(["hello world", [3, 4]], GREEDY)
    text, ids, done = ["", ""], [[], []], []
    for delta in stream:
        i = stream.index(delta)
        text[i] += delta.outputs[0].text
        ids[i] += delta.outputs[0].token_ids
        done += [i] if delta.finished else []
    assert sorted(done) == [0, 1]
    assert ids == [wanted(llm.tokenize("hello world")), wanted([3, 4])]
    assert text == [llm.tokenizer.decode(i) for i in ids]


def test_streams_side_by_side_in_one_thread(llm):
    a, b = llm.stream([[1, 2]], GREEDY), llm.stream([[3, 4]], GREEDY)
    next(a)
    assert [i for d in b for i in d.outputs[0].token_ids] == wanted([3, 4])
    assert len([i for d in a for i in d.outputs[0].token_ids]) == 11


def test_threads_share_the_engine(llm):
    results = {}

    def ask(i):
        results[i] = llm.generate([[i, i + 1], [i, i + 2]], GREEDY)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, outputs in results.items():
        assert [o.outputs[0].token_ids for o in outputs] == [wanted([i, i + 1]), wanted([i, i + 2])]


def test_the_prefix_cache_is_reported(engine):
    prompt = list(range(20))
    with LLM(engine) as llm:
        llm.generate([prompt], GREEDY)
        assert llm.generate([prompt], GREEDY)[0].cached_tokens >= 16
    with LLM(engine, enable_prefix_cache=False) as llm:
        llm.generate([prompt], GREEDY)
        assert llm.generate([prompt], GREEDY)[0].cached_tokens == 0


def test_closing_or_dropping_a_stream_cancels_it(llm):
    stream = llm.stream([[1, 2]], SamplingParams(max_tokens=60, ignore_eos=True))
    next(stream)
    stream.close()
    assert list(stream) == []
    next(llm.stream([[1, 3]], SamplingParams(max_tokens=60, ignore_eos=True)))
    gc.collect()
    llm.generate([[1]], GREEDY)
    assert llm.stats.num_running == 0


def test_a_prompt_that_cannot_be_served_stops_all_before_they_begin(llm):
    with pytest.raises(RequestError, match="prompt 1: the prompt has 65 tokens"):
        llm.generate([[1], [1] * 65, [2]], GREEDY)
    assert llm.generate([[1]], GREEDY)[0].finished
    for bad in ([300], [-1], []):
        with pytest.raises(RequestError):
            llm.generate([bad], GREEDY)


@pytest.mark.parametrize("prompt", [5, b"x", [1, "a"], [[1.5]], None, [{"role": "user"}, 1], {"a": 1}, [True, False]])
def test_what_is_no_prompt(llm, prompt):
    with pytest.raises(UsageError):
        llm.generate(prompt, GREEDY)


def test_without_a_tokenizer_token_ids_work(tmp_path):
    with LLM(write_engine(tmp_path / "engine", None)) as llm:
        [output] = llm.generate([[1, 2]], GREEDY)
        assert output.outputs[0].token_ids == wanted([1, 2])
        assert output.outputs[0].text == ""
        with pytest.raises(EngineError, match=r"carries no tokenizer.*token ids"):
            llm.generate("hello")
        with pytest.raises(EngineError, match="stop strings"):
            llm.generate([[1]], SamplingParams(stop=("x",)))


def test_another_tokenizer(tmp_path):
    bare, other = write_engine(tmp_path / "a", None), write_engine(tmp_path / "b", byte_level())
    with LLM(bare, tokenizer_dir=other / "tokenizer") as llm:
        assert llm.generate("hello", GREEDY)[0].outputs[0].text


def test_a_tokenizer_that_is_too_large(tmp_path, fake_runners):  # noqa: F811
    with pytest.raises(EngineError, match="wrong tokenizer"):
        LLM(write_engine(tmp_path / "engine", byte_level(), vocab_size=100))
    assert all(runner.closed for runner in fake_runners)


def test_an_altered_engine_gives_no_result(engine, fake_runners):  # noqa: F811
    data = bytearray((engine / "rank0.engine").read_bytes())
    data[100] ^= 1
    (engine / "rank0.engine").write_bytes(data)
    with LLM(engine) as llm:
        for _ in range(2):
            with pytest.raises(EngineError, match="was altered"):
                llm.generate([[1, 2]], GREEDY)


def test_a_failing_step_fails_what_is_under_way_and_what_comes(engine, monkeypatch, fake_runners):  # noqa: F811
    def forward(self, inputs):
        raise RuntimeError("the kernel fell over")

    monkeypatch.setattr(FakeRunner, "forward", forward)
    with LLM(engine) as llm:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="fell over"):
                llm.generate([[1], [2]], GREEDY)
    assert fake_runners[0].closed


def test_closing_frees_the_runner_and_ends_what_waits(engine, fake_runners):  # noqa: F811
    llm = LLM(engine)
    stream = llm.stream([[1]], SamplingParams(max_tokens=60, ignore_eos=True))
    llm.close()
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(stream)
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate([[1]])
    assert fake_runners[0].closed


def test_what_was_loaded_holds_up_no_steps(engine):
    """A full collection of garbage looks at what came after, until the engine is closed."""
    gc.unfreeze()
    with LLM(engine) as llm:
        frozen = gc.get_freeze_count()
        assert frozen > 10_000
        assert len(gc.get_objects()) < frozen / 5
        llm.generate([[1]], GREEDY)
        assert gc.get_freeze_count() > 0.9 * frozen
    assert gc.get_freeze_count() == 0


def test_an_llm_that_is_dropped_closes(engine, fake_runners):  # noqa: F811
    llm = LLM(engine)
    llm.generate([[1]], GREEDY)
    del llm
    gc.collect()
    assert fake_runners[0].closed


def test_several_ranks_are_refused(tmp_path):
    import json

    from trtllm_cli.engine import config_digest

    engine = write_engine(tmp_path / "engine", None)
    config = json.loads((engine / "config.json").read_text())
    del config["sha256"]
    config["pretrained_config"] |= {"mapping": {"world_size": 2, "tp_size": 2}, "num_attention_heads": 2}
    (engine / "rank1.engine").write_bytes(b"w")
    config["rank_files"].append({**config["rank_files"][0], "name": "rank1.engine", "size": 1})
    (engine / "config.json").write_text(json.dumps({**config, "sha256": config_digest(config)}))
    with pytest.raises(UsageError, match="split over 2 ranks"):
        LLM(engine)


@pytest.mark.parametrize("options", [{"num_threads": 0}, {"kv_cache_memory": "lots"}, {"max_num_blocks": 0}])
def test_options_out_of_range(engine, options):
    with pytest.raises(UsageError):
        LLM(engine, **options)


def test_the_cache_is_as_large_as_asked_for(engine, fake_runners):  # noqa: F811
    with LLM(engine) as llm:
        assert llm.num_blocks == 4 * 64 // 4
    with LLM(engine, max_num_blocks=17) as llm:
        assert llm.num_blocks == fake_runners[-1].num_blocks == 17
    with LLM(engine, kv_cache_memory="1KiB") as llm:
        assert llm.num_blocks == 1024 // 32
        assert llm.kv_cache_bytes == 1024
    with pytest.raises(ResourceError, match=r"one request of max_seq_len 64 takes 16 blocks .512 B., 500 B .*holds 15"):
        LLM(engine, kv_cache_memory=500)


def test_the_default_cache_takes_at_most_half_of_what_is_free(tmp_path):
    import json

    from trtllm_cli.engine import BuildConfig

    engine = write_engine(tmp_path / "engine", None)
    config = BuildConfig.model_validate(json.loads((engine / "config.json").read_text())["build_config"])
    count = {"memory": None, "max_blocks": None}
    assert kv_budget.num_blocks(config, 1000, available=None, **count) == 64
    assert kv_budget.num_blocks(config, 1000, available=80_000, **count) == 40
    with pytest.raises(ResourceError, match=r"half of the 29\.3 KiB of free memory holds 15"):
        kv_budget.num_blocks(config, 1000, available=30_000, **count)
    with pytest.raises(ResourceError, match="does not fit"):
        kv_budget.num_blocks(config, 1000, memory=10**6, max_blocks=None, available=10**5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2GiB", 2 << 30), ("512MB", 512 * 10**6), ("1.5g", 1_500_000_000), (12345, 12345), ("3 KiB", 3072), ("7B", 7)],
)
def test_amounts_of_memory(text, expected):
    assert kv_budget.parse_bytes(text, "--x") == expected


def test_free_memory_is_known_here():
    assert kv_budget.available_memory() > 1 << 20


def test_async_generate_and_stream(engine):
    async def main():
        async with AsyncLLM(engine) as llm:
            outputs = await asyncio.gather(*(llm.generate([i, i + 1], GREEDY) for i in range(10)))
            deltas = [delta async for delta in llm.stream("hello", GREEDY)]
            return outputs, deltas, llm.tokenize("hello")

    outputs, deltas, prompt = asyncio.run(main())
    assert [o.outputs[0].token_ids for o in outputs] == [wanted([i, i + 1]) for i in range(10)]
    assert [i for d in deltas for i in d.outputs[0].token_ids] == wanted(prompt)
    assert deltas[-1].finished


def test_async_errors_reach_the_caller(engine):
    async def main():
        async with AsyncLLM(engine) as llm:
            with pytest.raises(RequestError):
                await llm.generate([1] * 65)
            with pytest.raises(UsageError):
                await llm.generate(5)
            return await llm.generate([1], GREEDY)

    assert asyncio.run(main()).finished


def test_a_cancelled_task_cancels_its_request(engine, monkeypatch):
    forward = FakeRunner.forward
    monkeypatch.setattr(FakeRunner, "forward", lambda self, inputs: (time.sleep(0.005), forward(self, inputs))[1])

    async def main():
        async with AsyncLLM(engine) as llm:
            started = asyncio.Event()

            async def ask():
                async for _ in llm.stream([1], SamplingParams(max_tokens=60, ignore_eos=True)):
                    started.set()

            task = asyncio.create_task(ask())
            await started.wait()
            assert llm.stats.num_running == 1
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await llm.generate([2], SamplingParams(max_tokens=2, ignore_eos=True))
            return llm.stats

    assert asyncio.run(main()).num_running == 0


def test_stop_strings_wait_for_min_tokens(llm):
    [full] = llm.generate([[7, 8]], SamplingParams(max_tokens=20, ignore_eos=True))
    ids = full.outputs[0].token_ids
    first = next(c for c in full.outputs[0].text if c.isprintable())
    params = SamplingParams(max_tokens=20, min_tokens=15, ignore_eos=True, stop=(first,))
    [output] = llm.generate([[7, 8]], params)
    assert output.outputs[0].token_ids[:15] == ids[:15]
