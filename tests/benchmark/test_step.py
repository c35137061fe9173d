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

from benchmark import common, step
from benchmark.variants import VARIANTS

CPU = torch.device("cpu")
TINY = ["tiny-chatglm", "tiny-glm", "tiny-llama"]


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

    def start(task, shape, cli, folder):
        if task == "plain":
            return {"error": "OutOfMemoryError: 80 GiB", "log": ""}
        if task == step.CEILING:
            return {"ceiling_flops": 1e12}
        return VARIANTS[task][1](run_of(task, folder, shape))

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
        assert len(result["losses"]) == 2 and len(result["update_seconds"]) == 1
        assert result["losses"][-1] < result["losses"][0]


def test_a_task_that_fails_in_a_process_of_its_own_leaves_its_error_and_its_log(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["step.py", "--updates", "1"])
    result = step.start("nonsense", "tiny-chatglm", step.parse_command_line(), tmp_path)
    assert result["error"] == "KeyError: 'nonsense'" and "Traceback" in result["log"]


def test_the_ceiling_is_measured():
    assert common.matmul_ceiling(CPU) > 0


def test_a_saved_checkpoint_loads_as_the_model_it_was(tmp_path):
    run = run_of("checkpoint", tmp_path, "tiny-llama")
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
    shape = "tiny-glm" if variant == "trl-glm" else "tiny-llama"
    if package == "unsloth":
        assert "error" not in step.start(step.CHECKPOINT, shape, cli, tmp_path)
    theirs, ours = step.start(variant, shape, cli, tmp_path), step.start("plain", shape, cli, tmp_path)
    assert theirs["learned_tokens"] == ours["learned_tokens"]
    assert theirs["losses"][0] == pytest.approx(ours["losses"][0], rel=2e-3)
