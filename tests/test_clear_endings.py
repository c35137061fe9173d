"""Whatever settings, rows and folders hold, the command ends well or with a message and an exit code of its own."""

import json
import sys

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments

import train_qlora
from component.settings.legacy import RENAMED_KEYS
from component.settings.schema import QLoRAArguments

from .runs import ROWS

pytestmark = pytest.mark.slow

CODES = (0, 2, 3, 4)
KEYS = sorted({*QLoRAArguments.__dataclass_fields__, *TrainingArguments.__dataclass_fields__, *RENAMED_KEYS})
KEPT = ("model_name_or_path", "train_file", "output_dir", "cache_dir", "preprocessing_workers")
KEPT += ("ddp_backend", "tpu_metrics_debug", "tpu_num_cores", "local_rank", "use_cpu")  # of this machine
KEPT += ("max_steps", "per_device_train_batch_size", "num_train_epochs", "push_to_hub", "dataloader_num_workers")
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.sampled_from([10**400, 2**63, 0.5, 1e-9, -1e308, "", "steps", "epoch", "no", "auto", "all", "linear", "cosine"]),
    st.sampled_from(["chatglm2", "firefly", "chat_template", "a\u0000b", "\ud800", "~", "/", "*", "[", "data"]),
    st.text(max_size=5),
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=2), st.dictionaries(st.text(max_size=3), SCALARS, max_size=2))
ROW_KEYS = "conversations conversation messages role content human assistant from value tools name parameters tool loss"
ROW_KEYS += " weight instruction output input history chat system observation tool_calls function"
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt"])
CONTENTS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(ROW_KEYS.split()), inner | ROLES, max_size=4),
    ),
    max_leaves=12,
)
SEARCH = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture
def ending(checkpoint, tmp_path, monkeypatch):
    """Runs the command in this process and returns its exit code; anything else that it raises fails the test."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def run(text: str | None = None, dry_run: bool = True, **changes) -> int:
        base = {"model_name_or_path": str(checkpoint), "train_file": "rows.jsonl", "output_dir": "run", "lora_rank": 2}
        base |= {"max_steps": 1, "save_strategy": "no", "disable_tqdm": True, "preprocessing_workers": 1}
        (tmp_path / "settings.json").write_text(json.dumps(base | changes) if text is None else text)
        options = ["train_qlora.py", "--train_args_file", "settings.json"] + ["--dry_run"] * dry_run
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", options)
            try:
                train_qlora.main()
            except SystemExit as stop:
                return stop.code
            return 0

    return run


@SEARCH
@given(changes=st.dictionaries(st.sampled_from([key for key in KEYS if key not in KEPT]), VALUES, max_size=2))
def test_any_setting_of_any_value_ends_a_dry_run_clearly(ending, changes):
    assert ending(**changes) in CODES


@SEARCH
@given(key=st.sampled_from(KEPT[:3]), value=VALUES)
@example(key="model_name_or_path", value="x" * 300)
@example(key="output_dir", value="a\0b")
def test_any_path_ends_a_dry_run_clearly(ending, key, value):
    assert ending(**{key: value}) in CODES


@SEARCH
@given(rows=st.lists(CONTENTS, max_size=4), data_format=st.sampled_from([None, "chatglm2", "firefly"]))
def test_any_rows_end_a_dry_run_clearly(ending, tmp_path, rows, data_format):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ending(data_format=data_format, on_bad_row="skip", max_bad_share=1.0) in CODES


@SEARCH
@given(data=st.binary(max_size=60), suffix=st.sampled_from([".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".parquet"]))
@example(data=b"", suffix=".json")
def test_any_file_of_data_ends_a_dry_run_clearly(ending, tmp_path, data, suffix):
    (tmp_path / f"data{suffix}").write_bytes(data)
    assert ending(train_file=f"data{suffix}") in CODES


@SEARCH
@given(text=st.one_of(st.text(max_size=30), CONTENTS.map(json.dumps)))
def test_any_file_of_settings_ends_a_dry_run_clearly(ending, text):
    assert ending(text=text.encode(errors="replace").decode()) in CODES


MODEL_FILES = ("config.json", "tokenizer_config.json", "tokenizer.model", "generation_config.json")
MODEL_KEYS = "model_type num_layers hidden_size padded_vocab_size num_attention_heads kv_channels architectures"
MODEL_KEYS += " torch_dtype dtype tokenizer_class auto_map chat_template quantization_config multi_query_group_num"


@SEARCH
@given(
    file=st.sampled_from(MODEL_FILES),
    content=st.one_of(st.none(), st.binary(max_size=30), st.dictionaries(st.sampled_from(MODEL_KEYS.split()), VALUES)),
    dry_run=st.booleans(),
)
def test_any_damage_of_a_models_folder_ends_clearly(ending, checkpoint, tmp_path, file, content, dry_run):
    folder = tmp_path / "chatglm3-damaged"
    folder.mkdir(exist_ok=True)
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    if content is None:
        (folder / file).unlink(missing_ok=True)
    elif isinstance(content, bytes):
        (folder / file).write_bytes(content)
    elif file.endswith(".json") and (folder / file).exists():
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | content))
    assert ending(model_name_or_path=str(folder), dry_run=dry_run, overwrite_output_dir=True) in CODES
