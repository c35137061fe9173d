import pytest

from component.checkpoint import CheckpointError, find_checkpoints, find_resume_point, prepare_output_dir


def make_checkpoint(folder, step):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in ("adapter_model.safetensors", "trainer_state.json", "optimizer.pt"):
        (path / name).touch()
    return path


def test_the_newest_checkpoint_is_that_of_the_highest_step(tmp_path):
    newest = make_checkpoint(tmp_path, 100)
    make_checkpoint(tmp_path, 20)
    (tmp_path / "checkpoint-old").mkdir()
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-20", "checkpoint-100"]
    assert find_resume_point(tmp_path, True) == str(newest)
    assert find_resume_point(tmp_path, str(tmp_path / "checkpoint-20")) == str(tmp_path / "checkpoint-20")
    assert find_resume_point(tmp_path, None) is find_resume_point(tmp_path, False) is None


def test_what_cannot_be_resumed_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint; start without it"):
        find_resume_point(tmp_path, True)
    (make_checkpoint(tmp_path, 5) / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.pt is missing; choose another checkpoint"):
        find_resume_point(tmp_path, True)


@pytest.mark.parametrize("held", ["final", "checkpoint-5"])
def test_a_folder_that_holds_a_run_is_refused_or_moved_aside_whole(tmp_path, held):
    run = tmp_path / "run"
    (run / held).mkdir(parents=True)
    (run / held / "kept").touch()
    with pytest.raises(CheckpointError, match="holds a run already"):
        prepare_output_dir(run, resuming=False, overwrite=False)
    prepare_output_dir(run, resuming=True, overwrite=False)
    assert (run / held / "kept").exists()
    prepare_output_dir(run, resuming=False, overwrite=True)
    assert not list(run.iterdir())
    (aside,) = tmp_path.glob("run.*")
    assert (aside / held / "kept").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written to"):
        prepare_output_dir(tmp_path / "file" / "run", resuming=False, overwrite=False)
