"""The benchmark of the training step on tiny shapes: what it measures is what it says."""

import importlib.util
import json
import math
import sys

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM

from benchmark import common, step, variants
from benchmark.kernels import Kernel
from benchmark.variants import VARIANTS

CPU = torch.device("cpu")
TINY = ["tiny-chatglm", "tiny-glm", "tiny-llama", "tiny-qwen"]


def run_of(variant: str, folder, shape: str = "tiny-chatglm") -> common.Run:
    return common.Run(variant, shape, updates=1, folder=folder, device=CPU)


def test_samples_are_64_of_mean_456_of_which_the_last_60_percent_are_learned():
    samples = common.make_samples(65024)
    lengths = [len(sample["input_ids"]) for sample in samples]
    useful, learned = common.count(samples)
    assert (len(lengths), round(sum(lengths) / 64), min(lengths) >= 16, max(lengths)) == (64, 456, True, 1024)
    assert useful == sum(lengths) and learned == pytest.approx(0.6 * useful, rel=0.001)
    for sample in samples:
        assert sample["target_mask"] == sorted(sample["target_mask"]) and sample["target_mask"][0] == 0
        assert max(sample["input_ids"]) < 65024


def test_samples_are_the_same_every_time_and_as_long_for_any_vocabulary():
    assert common.make_samples(65024) == common.make_samples(65024)
    assert [len(sample["input_ids"]) for sample in common.make_samples(128_256)] == [
        len(sample["input_ids"]) for sample in common.make_samples(65024)
    ]


def test_samples_of_one_length_are_as_many_and_as_long_as_asked_for(tmp_path):
    run = common.Run("luciole", "tiny-chatglm", 1, tmp_path, length=500, count=3, device=CPU)
    assert [len(sample["input_ids"]) for sample in run.samples()] == [500, 500, 500] and run.longest == 500
    assert common.count(run.samples()) == (1500, 900)
    assert len({tuple(sample["input_ids"]) for sample in run.samples()}) == 3


def test_every_update_of_the_epoch_has_the_same_samples_in_an_order_of_its_own(tmp_path):
    run = common.Run("luciole", "tiny-chatglm", 2, tmp_path, device=CPU)  # two updates of warm-up
    updates = list(zip(*[iter(run.epoch())] * 64, strict=True))
    ids = [[tuple(sample["input_ids"]) for sample in update] for update in updates]
    assert list(map(sorted, ids)) == [sorted(tuple(sample["input_ids"]) for sample in run.samples())] * 4
    assert len(set(map(tuple, ids))) == 4 and run.epoch() == run.epoch()


@pytest.mark.parametrize(("count", "batch", "batches"), [(1, 1, 1), (3, 3, 1), (12, 6, 2), (13, 1, 13), (24, 8, 3)])
def test_batches_of_one_size_make_an_update_of_samples_of_one_length(count, batch, batches, tmp_path):
    run = common.Run("plain", "tiny-chatglm", 1, tmp_path, length=20, count=count, device=CPU)
    settings = variants.trainer_settings(run)
    assert (settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"]) == (batch, batches)


@pytest.mark.parametrize(("variant", "updates"), [("luciole", 3), ("plain", 3), ("seed", 3), ("seed-grouped", 1)])
def test_all_updates_are_one_epoch_unless_that_mixes_their_samples(variant, updates, monkeypatch, tmp_path):
    monkeypatch.setattr(variants, "measure", lambda run, trainer, *_: {"samples": len(trainer.train_dataset)})
    run = run_of(variant, tmp_path)
    assert run.steps == 3
    assert VARIANTS[variant][1](run)["samples"] == 64 * updates


@pytest.mark.parametrize(("shape", "weights"), [("qwen-0.5b", 494_032_768), ("smollm2-135m", 134_515_008)])
def test_a_small_shape_has_as_many_weights_as_the_published_model(shape, weights):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(common.SHAPES[shape][0]())
    assert model.num_parameters() == weights


def test_the_shape_of_long_contexts_is_chatglm3_6b_with_slower_angles():
    long, short = (common.SHAPES[name][0]().to_dict() for name in ("chatglm3-6b-32k", "chatglm3-6b"))
    assert {key: value for key, value in long.items() if value != short[key]} == {
        "rope_ratio": 50.0,
        "seq_length": 32_768,
    }


def test_a_tied_head_is_the_embedding_and_is_not_quantised():
    model = common.build_model("tiny-qwen", CPU, torch.float32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(common.INITIAL_STD, rel=0.05)
    assert not isinstance(model.get_output_embeddings(), Linear4bit)


@pytest.mark.parametrize("shape", TINY)
def test_a_model_made_in_place_computes_what_a_plain_one_with_its_weights_does(shape):
    """Float32, 1e-5: also the rotary frequencies are those of a model built as usual."""
    model = common.build_model(shape, CPU, torch.float32).eval()
    plain = AutoModelForCausalLM.from_config(common.SHAPES[shape][0](), dtype=torch.float32).eval()
    for name, layer in plain.named_modules():
        twin = model.get_submodule(name)
        for key, weight in layer.named_parameters(recurse=False):
            data = getattr(twin, key)
            quantised = isinstance(twin, Linear4bit) and key == "weight"
            weight.data.copy_(dequantize_4bit(data.data, data.quant_state) if quantised else data)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, rtol=0, atol=0)
    ids = torch.tensor([common.make_samples(512, longest=64)[0]["input_ids"]])
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_every_linear_layer_of_the_body_is_nf4_and_doubly_quantised():
    model = common.build_model("tiny-chatglm", CPU, torch.float32)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    plain = {name for name, layer in layers.items() if not isinstance(layer, Linear4bit)}
    states = [layer.weight.quant_state for layer in layers.values() if isinstance(layer, Linear4bit)]
    assert plain == {"transformer.output_layer"} and len(states) == 8
    assert all(state.quant_type == "nf4" and state.nested for state in states)
    plain = common.build_model("tiny-chatglm", CPU, torch.bfloat16, bits=16)
    assert not any(isinstance(layer, Linear4bit) for layer in plain.modules())
    assert {weight.dtype for weight in plain.parameters()} == {torch.bfloat16}


def test_the_floor_of_the_llama_shape_is_15_gigaflops_a_token():
    assert common.floor_flops(common.llama_config(), checkpointing=False) == pytest.approx(15.2e9, rel=0.01)
    assert common.floor_flops(common.ChatGLMConfig(), checkpointing=False) == pytest.approx(23.5e9, rel=0.01)


@pytest.fixture
def in_this_process(monkeypatch):
    """Tasks run here and not in processes of their own, which takes seconds each."""

    def start(task, cli, folder):
        if task.name == "plain":
            return {"error": "OutOfMemoryError: 80 GiB", "log": ""}
        if task.name == step.CEILING:
            return {"ceiling_flops": 1e12}
        return VARIANTS[task.name][1](run_of(task.name, folder, task.shape))

    monkeypatch.setattr(step, "start", start)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny products; threads would wait for one another
    yield
    torch.set_num_threads(threads)


def test_the_table_has_a_row_for_each_variant_also_for_one_that_fails(in_this_process, monkeypatch, tmp_path, capsys):
    report = tmp_path / "report.json"
    arguments = ["--variants", "plain,seed,seed-grouped", "--shape", "tiny-chatglm", "--updates", "1"]
    monkeypatch.setattr(sys, "argv", ["step.py", *arguments, "--json", str(report)])
    step.main()

    lines = capsys.readouterr().out.splitlines()  # the Trainer's own come first
    heading, _, *table = lines[-7:]
    assert "matrix products at 1.0 TFLOP/s" in heading and "bitsandbytes" in heading
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert tuple(rows[0]) == step.COLUMNS
    assert [row[0] for row in rows[2:]] == ["plain", "seed", "seed-grouped"]
    assert rows[2][-1] == "OutOfMemoryError: 80 GiB"

    results = json.loads(report.read_text())["results"]
    first = [result["losses"][0] for result in results[1:]]
    assert first == pytest.approx([math.log(512)] * 2, abs=0.05) and first[0] == pytest.approx(first[1], rel=1e-5)
    for result in results[1:]:
        assert (result["useful_tokens"], result["learned_tokens"]) == common.count(common.make_samples(512, longest=64))
        assert len(result["losses"]) == 3 and len(result["update_seconds"]) == 1
        assert result["losses"][-1] < result["losses"][0]


def test_a_task_that_fails_in_a_process_of_its_own_leaves_its_error_and_its_log(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["step.py", "--updates", "1"])
    result = step.start(step.Task("nonsense", "tiny-chatglm"), step.parse_command_line(), tmp_path)
    assert result["error"] == "KeyError: 'nonsense'" and "Traceback" in result["log"]


def test_a_task_that_is_stopped_has_no_figures_of_an_earlier_one(monkeypatch, tmp_path):
    (tmp_path / "luciole.json").write_text('{"losses": [1.0]}')
    monkeypatch.setattr(sys, "argv", ["step.py", "--limit", "0"])
    result = step.start(step.Task("luciole", "tiny-chatglm"), step.parse_command_line(), tmp_path)
    assert result["error"] == "took more than 0 s"


def test_every_length_and_every_row_of_this_project_has_a_task_of_its_own(monkeypatch):
    arguments = ["--variants", "luciole,plain", "--rows", "8192,auto", "--lengths", "100,200"]
    monkeypatch.setattr(sys, "argv", ["step.py", *arguments])
    assert step.list_tasks(step.parse_command_line(), {"luciole": "chatglm3-6b", "plain": "chatglm3-6b"}) == [
        ("luciole", "chatglm3-6b", 8192, 100),
        ("luciole", "chatglm3-6b", "auto", 100),
        ("luciole", "chatglm3-6b", 8192, 200),
        ("luciole", "chatglm3-6b", "auto", 200),
        ("plain", "chatglm3-6b", None, 100),
        ("plain", "chatglm3-6b", None, 200),
    ]


def test_updates_of_other_learned_tokens_have_no_figures(monkeypatch, tmp_path):
    monkeypatch.setattr(common.Run, "epoch", lambda run: run.samples()[1:] * run.steps)
    with pytest.raises(ValueError, match="tokens are learned, not the"):
        VARIANTS["luciole"][1](run_of("luciole", tmp_path))


@pytest.mark.parametrize(("rows", "tokens"), [(None, 8192), (96, 96), (32, 64), ("auto", 8192)])
def test_rows_are_as_long_as_asked_for_and_hold_the_longest_sample(rows, tokens, monkeypatch, tmp_path):
    monkeypatch.setattr(variants, "measure", lambda run, trainer, *_: {"layout": trainer.data_collator.tokens})
    run = run_of("luciole", tmp_path)
    run.rows = rows
    figures = VARIANTS["luciole"][1](run)
    assert (figures["layout"], figures["rows"], figures["kept"]) == (tokens, tokens, "none")
    assert 0 < figures["estimate_gib"] < 1


def test_kernels_are_recorded_in_one_update_after_the_timed_ones(monkeypatch, tmp_path):
    monkeypatch.setattr(common.Run, "is_recorded", True)
    seconds = iter(range(100))
    monkeypatch.setattr(
        common.Instant, "__init__", lambda self, device: vars(self).update(time=next(seconds), event=None)
    )
    clock = common.Clock(common.Run("plain", "tiny-chatglm", 8, tmp_path, device=CPU))
    seen = []

    class Recorder:
        def start(self):
            seen.append(("start", len(clock.times) - 1))

        def stop(self):
            seen.append(("stop", len(clock.times) - 1))
            return [Kernel("gemm", 0.0, 2000.0)]

    clock.recorder = Recorder()
    for _ in range(clock.run.steps):
        clock.on_step_end(None, None, None)
    figures = clock.figures()
    assert seen == [("start", 10), ("stop", 11)]
    assert figures["warmup_seconds"] == 1.0 and figures["update_seconds"] == [1.0] * 8
    assert (figures["recorded"]["busy_ms"], figures["recorded"]["kernels"]) == (2.0, 1)


def test_the_first_update_is_never_timed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["step.py", "--warm-up", "0"])
    with pytest.raises(SystemExit):
        step.parse_command_line()
    assert "--warm-up: the first update compiles kernels" in capsys.readouterr().err


def test_the_cells_of_a_card_say_how_much_longer_an_update_takes_than_it_is_busy():
    recorded = {"busy_ms": 200.0, "attention_ms": 50.0, "kernels": 3911}
    assert step.describe_card(290.4, recorded) == ["290", "200", "1.45", "3,911", "25.0%"]
    assert step.describe_card(290.4, None) == ["290", "-", "-", "-", "-"]


def test_the_ceiling_is_measured():
    assert common.matmul_ceiling(CPU) > 0


@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-qwen"])
def test_a_saved_checkpoint_loads_as_the_model_it_was(shape, tmp_path):
    run = run_of("checkpoint", tmp_path, shape)
    common.save_checkpoint(run, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    ids = torch.tensor([run.samples()[0]["input_ids"]])
    assert torch.equal(loaded(input_ids=ids).logits, run.model().eval()(input_ids=ids).logits)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith(("trl", "unsloth"))])
def test_others_learn_the_same_tokens_and_begin_at_the_same_loss(variant, monkeypatch, tmp_path):
    package = variant.partition("-")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    monkeypatch.setattr(sys, "argv", ["step.py", "--updates", "1"])
    cli = step.parse_command_line()
    shape = {"trl-glm": "tiny-glm"}.get(variant, "tiny-qwen" if "qwen" in variant else "tiny-llama")
    if package == "unsloth":
        assert "error" not in step.start(step.Task(step.CHECKPOINT, shape), cli, tmp_path)
    theirs, ours = (step.start(step.Task(name, shape), cli, tmp_path) for name in (variant, "plain"))
    assert theirs["learned_tokens"] == ours["learned_tokens"]
    assert theirs["losses"][0] == pytest.approx(ours["losses"][0], rel=2e-3)


@pytest.mark.gpu
def test_a_card_is_busy_for_a_part_of_an_update_and_attention_for_a_part_of_that(tmp_path):
    run = common.Run("luciole", "demo", updates=3, folder=tmp_path)
    figures = VARIANTS["luciole"][1](run)
    recorded = figures["recorded"]
    assert 0 < recorded["attention_ms"] < recorded["busy_ms"] < 1000 * max(figures["update_seconds"])
    assert recorded["kernels"] >= sum(kernel["count"] for kernel in recorded["longest"]) > 100
    assert len(figures["losses"]) == 6 and len(figures["update_seconds"]) == 3
    assert not any("Optimizer.step#" in kernel["name"] for kernel in recorded["longest"])
