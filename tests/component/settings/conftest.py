import json

import pytest

from component.settings.load import load_arguments


@pytest.fixture
def load(tmp_path):
    """Loads settings of keywords, or of a file's text, with overrides."""
    (tmp_path / "rows.jsonl").touch()

    def load(*overrides: str, text: str | None = None, **changes):
        settings = {"output_dir": str(tmp_path / "out"), "model_name_or_path": "THUDM/chatglm3-6b"}
        settings |= {"train_file": str(tmp_path / "rows.jsonl"), **changes}
        settings = {key: value for key, value in settings.items() if value is not None}
        file = tmp_path / "args.json"
        file.write_text(json.dumps(settings) if text is None else text, encoding="utf-8")
        return load_arguments(file, overrides)

    return load
