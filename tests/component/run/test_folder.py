"""The folder of a run, and checkpoints in it."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from component.run import folder as folder_room
from component.run import manifest
from component.run.errors import CheckpointError, StorageError
from component.run.folder import ASIDE, RunFolder, foresee_start
from component.run.manifest import MANIFEST, Damaged, verify
from component.run.resume import FINAL, Start, differences, find_checkpoints

IDENTITY = {"settings": {"seed": 1, "learning_rate": 0.1}, "data": "abc", "world_size": 1}
OTHER = {"settings": {"seed": 2, "learning_rate": 0.1}, "data": "abc", "world_size": 1}
NAMES = ("adapter_model.safetensors", "adapter_config.json", "trainer_state.json", "optimizer.pt")


def write(folder: RunFolder, name: str, step: int = 0) -> Path:
    """A whole checkpoint, as a run writes it."""
    temporary = folder.begin(name)
    for file in NAMES:
        (temporary / file).write_text(f"{file} of {name}" * 10)
    return folder.finish(name, folder.describe(name, step, world_size=1))


@pytest.fixture
def make_folder(tmp_path):
    """An opened folder with whole checkpoints of these steps; it is left at the end."""
    opened = []

    def make(*steps: int, identity: dict = IDENTITY) -> RunFolder:
        for folder in opened:
            folder.lock.release()
        folder = RunFolder(tmp_path / "run", identity)
        opened.append(folder)
        folder.open()
        for step in steps:
            write(folder, f"checkpoint-{step}", step)
        return folder

    yield make
    for folder in opened:
        folder.lock.release()


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def moved(folder: RunFolder) -> set[str]:
    return {path.name.rpartition(".")[0] for path in (folder.path / ASIDE).glob("*")}


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_what_was_sealed_verifies_and_says_what_it_is(make_folder):
    folder = make_folder()
    folder.plan = {"tokens": 64, "checkpointing": "none"}
    manifest = verify(write(folder, "checkpoint-3", 3))
    assert (manifest["step"], manifest["world_size"], manifest["plan"]) == (3, 1, folder.plan)
    assert manifest["run"] == IDENTITY
    assert manifest["files"].keys() == set(NAMES)
    assert contents(folder.path) == {"checkpoint-3"}


@pytest.mark.parametrize("name", [*NAMES, MANIFEST])
@pytest.mark.parametrize("harm", [halve, flip, Path.unlink])
def test_any_harm_to_any_file_is_seen_and_the_run_falls_back(make_folder, log, name, harm):
    folder = make_folder(5, 10)
    harm(folder.path / "checkpoint-10" / name)
    with pytest.raises(Damaged, match=name if harm is not Path.unlink or name != MANIFEST else "no manifest"):
        verify(folder.path / "checkpoint-10")
    start = folder.take_start("auto", despite_changes=False)
    assert start.checkpoint == str(folder.path / "checkpoint-5")
    assert moved(folder) == {"checkpoint-10"}
    assert any("checkpoint-10" in line and "WARNING" in line for line in log)


@pytest.mark.parametrize("text", ["[]", "{}", '{"checksum": 1}', "[" * 100_000, "nul", "\ufeff{}"])
def test_a_manifest_of_another_make_is_damage_and_no_crash(make_folder, text):
    folder = make_folder(5)
    (folder.path / "checkpoint-5" / MANIFEST).write_text(text)
    with pytest.raises(Damaged, match="is damaged"):
        verify(folder.path / "checkpoint-5")


def test_where_nothing_verifies_all_stays_as_it_is(make_folder):
    folder = make_folder(5, 10)
    for step in (5, 10):
        halve(folder.path / f"checkpoint-{step}" / "optimizer.pt")
    with pytest.raises(StorageError, match=r"checkpoint-10: optimizer.pt has 145 bytes, not 290[\s\S]*checkpoint-5"):
        folder.take_start("auto", despite_changes=False)
    assert contents(folder.path) == {"checkpoint-5", "checkpoint-10"}


def test_on_request_a_damaged_checkpoint_is_continued_from(make_folder, log):
    folder = make_folder(5, 10)
    given = folder.path / "checkpoint-10"
    (given / "optimizer.pt").unlink()
    with pytest.raises(StorageError, match=r"optimizer.pt is missing"):
        folder.take_start(str(given), despite_changes=False)
    assert folder.take_start(str(given), despite_changes=True).checkpoint == str(given)
    assert any("is not exact" in line and "optimizer.pt is missing" in line for line in log)
    (given / "adapter_model.safetensors").unlink()
    with pytest.raises(StorageError, match=r"adapter_model.safetensors is missing; nothing can go on"):
        folder.take_start(str(given), despite_changes=True)


def test_a_run_of_other_settings_is_refused_with_the_difference(make_folder, log):
    make_folder(5)
    other = RunFolder(make_folder().path, OTHER)
    for resume in ("auto", True, str(other.path / "checkpoint-5")):
        with pytest.raises(CheckpointError, match=r"  seed: 1 then, 2 now\n[\s\S]*: resume_despite_changes=true"):
            other.take_start(resume, despite_changes=False)
    assert contents(other.path) == {"checkpoint-5"}
    assert other.take_start("auto", despite_changes=True).checkpoint == str(other.path / "checkpoint-5")
    assert any("not exact" in line and "  seed: 1 then" in line for line in log)


def test_other_versions_are_named_and_no_reason_to_stop(make_folder, log, monkeypatch):
    folder = make_folder(5)
    monkeypatch.setattr("component.run.resume.versions", lambda: dict.fromkeys(manifest.LIBRARIES, "0.1"))
    assert folder.take_start("auto", despite_changes=False).checkpoint
    assert any('torch: "2.' in line and '"0.1" now' in line for line in log)


@pytest.mark.parametrize(("noted", "now", "told"), [(None, "3.6", True), ("3.6", "3.6", False), ("3.6", "3.7", True)])
def test_libraries_of_a_card_are_compared_also_with_runs_that_did_not_note_them(
    noted, now, told, make_folder, log, monkeypatch
):
    was = {} if noted is None else dict.fromkeys(manifest.ON_CARDS, noted)
    monkeypatch.setattr("component.run.folder.versions", lambda: was, raising=False)
    monkeypatch.setattr("component.run.manifest.versions", lambda: was)
    folder = make_folder(5)
    monkeypatch.setattr("component.run.resume.versions", lambda: dict.fromkeys(manifest.ON_CARDS, now))
    assert folder.take_start("auto", despite_changes=False).checkpoint
    assert any("not exact" in line and "nvidia-cudnn-frontend" in line and "triton" in line for line in log) == told


def test_a_library_that_is_recorded_no_more_is_no_difference(make_folder, log, monkeypatch):
    folder = make_folder(5)
    monkeypatch.setattr("component.run.manifest.LIBRARIES", ("torch", "transformers"))
    assert folder.take_start("auto", despite_changes=False).checkpoint
    assert not [line for line in log if "not exact" in line]


def test_a_folder_of_something_else_is_refused_and_not_touched(tmp_path):
    for name in ("checkpoint-999", FINAL):
        (tmp_path / name).mkdir()
    folder = RunFolder(tmp_path, IDENTITY)
    with folder, pytest.raises(CheckpointError, match=r"checkpoint-999: it has no manifest.json[\s\S]*of this program"):
        folder.open()
    assert contents(tmp_path) == {"checkpoint-999", FINAL}


def test_a_finished_run_is_done_and_of_other_settings_refused(make_folder):
    write(make_folder(5), FINAL)
    assert make_folder().take_start("auto", despite_changes=False).is_done
    other = RunFolder(make_folder().path, OTHER)
    with pytest.raises(CheckpointError, match=r"final belongs to another run; what differs:"):
        other.take_start("auto", despite_changes=False)
    assert other.take_start("auto", despite_changes=True).checkpoint == str(other.path / "checkpoint-5")
    assert moved(other) == {FINAL}


def test_a_run_that_goes_on_from_an_earlier_checkpoint_moves_the_later_aside(make_folder):
    folder = make_folder(5, 10, 15)
    write(folder, FINAL)
    assert folder.take_start(str(folder.path / "checkpoint-5"), despite_changes=False).checkpoint
    assert moved(folder) == {"checkpoint-10", "checkpoint-15", FINAL}


def test_checkpoints_of_other_folders_are_not_opened(make_folder, tmp_path):
    folder = make_folder(5)
    (tmp_path / "checkpoint-7").mkdir()
    for path in (tmp_path / "checkpoint-7", folder.path / ".." / "checkpoint-7", folder.path / FINAL):
        with pytest.raises(CheckpointError, match="is not a checkpoint of output_dir"):
            folder.take_start(str(path), despite_changes=True)


def test_what_a_killed_save_left_is_cleared_and_links_are_not_followed(make_folder, tmp_path):
    folder = make_folder(5)
    (folder.path / ".tmp-checkpoint-10").mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (folder.path / ".tmp-checkpoint-20").symlink_to(tmp_path / "precious")
    folder = make_folder()
    assert contents(folder.path) == {"checkpoint-5"}
    (folder.path / ".tmp-checkpoint-20").symlink_to(tmp_path / "precious")
    write(folder, "checkpoint-20", 20)
    assert [path.name for path in (tmp_path / "precious").iterdir()] == ["file"]
    assert not (folder.path / "checkpoint-20").is_symlink()


def test_what_others_left_is_not_cleared_and_nothing_is_where_a_folder_is_refused(make_folder):
    folder = make_folder(5)
    for name in (".tmp-thesis", ".tmp-checkpoint-x", ".tmp-checkpoint-10", ".tmp-final"):
        (folder.path / name).mkdir()
    before = contents(folder.path)
    with pytest.raises(CheckpointError, match=r"  seed: 1 then"):
        make_folder(identity=OTHER)
    assert contents(folder.path) == before
    make_folder()
    assert contents(folder.path) == {"checkpoint-5", ".tmp-thesis", ".tmp-checkpoint-x"}


@pytest.mark.parametrize("name", ["checkpoint-9", FINAL])
@pytest.mark.parametrize("how", [shutil.copytree, lambda source, target: target.symlink_to(source)])
def test_a_copy_under_another_name_is_no_checkpoint(make_folder, name, how):
    folder = make_folder(3, 6)
    how(folder.path / "checkpoint-6", folder.path / name)
    assert folder.take_start("auto", despite_changes=False).checkpoint == str(folder.path / "checkpoint-6")
    assert moved(folder) == {name}


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_whose_lock_is_taken_away_writes_no_more(make_folder, replaced):
    folder = make_folder(5)
    (folder.path / ".lock").unlink()
    if replaced:
        (folder.path / ".lock").touch()
    with pytest.raises(StorageError, match="removed while this run worked"):
        write(folder, "checkpoint-10", 10)
    assert contents(folder.path) == {"checkpoint-5"}


def test_a_given_checkpoint_is_gone_on_from_once_and_the_same_command_continues(make_folder):
    folder = make_folder(5, 10)
    assert folder.take_start("checkpoint-5", despite_changes=False).checkpoint == str(folder.path / "checkpoint-5")
    assert moved(folder) == {"checkpoint-10"}
    write(folder, "checkpoint-15", 15)
    again = RunFolder(folder.path, IDENTITY)
    start = again.take_start(str(folder.path / "checkpoint-5"), despite_changes=False)
    assert start.checkpoint == str(folder.path / "checkpoint-15")
    shutil.rmtree(folder.path / "checkpoint-5")
    write(again, "checkpoint-20", 20)
    write(again, FINAL)
    assert RunFolder(folder.path, IDENTITY).take_start("checkpoint-5", despite_changes=False).is_done
    other = RunFolder(folder.path, OTHER).take_start("checkpoint-15", despite_changes=True)
    assert other.checkpoint == str(folder.path / "checkpoint-15")


def test_rotation_follows_a_run_that_goes_on_as_another(make_folder):
    make_folder(5, 10)
    other = RunFolder(make_folder().path, OTHER)
    other.take_start("auto", despite_changes=True)
    write(other, "checkpoint-15", 15)
    other.rotate(2)
    assert contents(other.path) == {"checkpoint-10", "checkpoint-15"}


def test_a_link_in_place_of_the_lock_harms_nothing(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    folder = RunFolder(tmp_path / "run", IDENTITY)
    with folder, pytest.raises(StorageError, match="cannot be written to"):
        folder.open()
    assert (tmp_path / "precious").read_text() == "kept"


def test_rotation_keeps_the_newest_two_at_least_and_the_best(make_folder):
    folder = make_folder(5, 10, 15, 20)
    folder.rotate(None)
    assert len(find_checkpoints(folder.path)) == 4
    folder.rotate(1, keep=[folder.path / "checkpoint-5"])
    assert contents(folder.path) == {"checkpoint-5", "checkpoint-15", "checkpoint-20"}


def test_rotation_touches_nothing_of_others_and_counts_nothing_broken(make_folder):
    folder = make_folder(10, 15)
    write(RunFolder(folder.path, OTHER), "checkpoint-5", 5)
    (folder.path / "checkpoint-999").mkdir()
    halve(write(folder, "checkpoint-20", 20) / "optimizer.pt")
    write(folder, "checkpoint-25", 25)
    folder.rotate(2)
    assert contents(folder.path) == {
        "checkpoint-5",
        "checkpoint-15",
        "checkpoint-20",
        "checkpoint-25",
        "checkpoint-999",
    }


def test_a_partial_checkpoint_is_neither_kept_as_a_good_one_nor_deleted(make_folder):
    folder = make_folder(10)
    (folder.path / "checkpoint-20").mkdir()
    assert folder.take_start("auto", despite_changes=False).checkpoint == str(folder.path / "checkpoint-10")
    write(folder, "checkpoint-15", 15)
    folder.rotate(2)
    assert contents(folder.path) == {"checkpoint-10", "checkpoint-15", ASIDE}
    assert moved(folder) == {"checkpoint-20"}


def test_one_folder_has_one_run_and_a_killed_one_lets_go(tmp_path):
    program = (
        "import sys, time; from component.run.folder import RunFolder\n"
        "folder = RunFolder(sys.argv[1], {}); folder.open(); print('open', flush=True); time.sleep(60)"
    )
    root = Path(__file__).parents[3]
    holder = subprocess.Popen([sys.executable, "-c", program, tmp_path], cwd=root, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"open\n"
    folder = RunFolder(tmp_path, {})
    started = time.monotonic()
    with folder, pytest.raises(CheckpointError, match="another run is writing here"):
        folder.open()
    assert time.monotonic() - started < 1
    holder.kill()
    holder.wait()
    with folder:
        assert folder.open().checkpoint is None


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file/run cannot be written to"):
        RunFolder(tmp_path / "file" / "run", IDENTITY).open()


def test_a_folder_that_holds_a_run_is_moved_aside_whole_on_request(make_folder, tmp_path):
    folder = make_folder(5)
    with pytest.raises(CheckpointError, match=r"holds a run already \(checkpoint-5\)"):
        folder.open(resume=False)
    assert folder.open(overwrite=True).checkpoint == str(folder.path / "checkpoint-5"), "it is this run, unfinished"
    assert folder.open(resume=False, overwrite=True).checkpoint is None
    (aside,) = tmp_path.glob("run.2*")
    assert verify(aside / "checkpoint-5")
    assert not contents(folder.path)
    other = RunFolder(folder.path, IDENTITY)
    with pytest.raises(CheckpointError, match="another run is writing here"):
        other.open()


@pytest.mark.parametrize("name", [FINAL, "checkpoint-5"])
def test_another_run_or_a_finished_one_is_moved_aside_on_request(make_folder, tmp_path, name):
    folder = make_folder(identity=IDENTITY if name == FINAL else OTHER)
    write(folder, name, 5)
    folder.lock.release(force=True)
    with RunFolder(folder.path, IDENTITY) as own:
        assert own.open(overwrite=True) == Start()
    (aside,) = tmp_path.glob("run.2*")
    assert verify(aside / name)


def test_what_is_kept_of_an_adapter_cannot_become_another(make_folder):
    folder = make_folder(identity={"settings": {"lora_rank": 4, "packing_length": None}})
    folder.plan = {"tokens": 64, "checkpointing": "none"}
    write(folder, "checkpoint-5", 5)
    wider = RunFolder(folder.path, {"settings": {"lora_rank": 8, "packing_length": None}})
    with pytest.raises(CheckpointError, match="lora_rank: 4 then, 8 now") as refused:
        wider.take_start("auto", despite_changes=True)
    assert "resume_despite_changes" not in str(refused.value), "no way on that would be refused too"
    longer = RunFolder(folder.path, {"settings": {"lora_rank": 4, "packing_length": 128}})
    assert longer.take_start("auto", despite_changes=True).plan is None
    assert folder.take_start("auto", despite_changes=False).plan == folder.plan


@pytest.mark.parametrize(
    "changed",
    [
        {"settings": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}},
        {"settings": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}},
        {"world_size": 2},
    ],
)
def test_rows_are_laid_out_anew_where_an_update_has_other_samples(make_folder, changed):
    identity = {
        "settings": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1.0},
        "world_size": 1,
    }
    folder = make_folder(identity=identity)
    folder.plan = {"tokens": 64, "checkpointing": "none"}
    write(folder, "checkpoint-5", 5)
    same = RunFolder(folder.path, identity | {"settings": identity["settings"] | {"learning_rate": 2.0}})
    assert same.take_start("auto", despite_changes=True).plan == folder.plan
    assert RunFolder(folder.path, identity | changed).take_start("auto", despite_changes=True).plan is None


def test_a_final_that_leads_nowhere_is_set_aside(make_folder, tmp_path):
    folder = make_folder(5)
    (folder.path / FINAL).symlink_to(tmp_path / "nowhere")
    assert folder.take_start("auto", despite_changes=False).checkpoint == str(folder.path / "checkpoint-5")
    assert moved(folder) == {FINAL}


def test_a_folder_that_cannot_be_moved_is_named(make_folder, monkeypatch):
    folder = make_folder(5)

    def busy(self, target):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(StorageError, match=r"run cannot be moved to .*resource busy"):
        folder.open(resume=False, overwrite=True)
    folder.rotate(0)
    write(folder, "checkpoint-6", 6), write(folder, "checkpoint-7", 7)
    folder.rotate(2)  # says so, and goes on
    assert (folder.path / "checkpoint-5").exists()


def test_resuming_asks_for_a_checkpoint_and_starting_does_not(make_folder):
    folder = make_folder()
    with pytest.raises(CheckpointError, match=r"is true, but .* holds no checkpoint"):
        folder.open(resume=True)
    assert folder.open() == folder.open(resume=False) == Start()


def test_room_for_two_checkpoints_is_asked_for(make_folder, monkeypatch):
    folder = make_folder()
    monkeypatch.setattr(folder_room.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    folder.check_room(2**19)
    with pytest.raises(StorageError, match=r"two checkpoints need 1.50 GiB, and 1.00 MiB are free"):
        folder.check_room(3 * 2**28)


def test_a_save_that_failed_leaves_no_remains_and_says_what_there_was(make_folder):
    folder = make_folder(5)
    (folder.begin("checkpoint-10") / "optimizer.pt").write_bytes(bytes(2**20))
    error = folder.failed("checkpoint-10", OSError(28, "No space left on device"))
    assert isinstance(error, StorageError)
    assert "checkpoint-10 could not be written beyond 1.00 MiB (OSError: [Errno 28] No space left" in str(error)
    assert "checkpoint-5 is untouched" in str(error)
    assert contents(folder.path) == {"checkpoint-5"}


def test_what_is_sealed_may_be_read_by_whom_the_umask_lets(make_folder):
    folder = make_folder()
    (folder.begin("checkpoint-1") / "weights").touch(0o600)
    sealed = folder.finish("checkpoint-1", {})
    assert (sealed / "weights").stat().st_mode == (sealed / MANIFEST).stat().st_mode


def test_differences_are_lines_a_person_can_act_on():
    was = {"settings": {"b": 1, "c": None, "k": {"x": 1}}, "d": [1], "data": [["0" * 32, 0.5]], "base_model": "0" * 32}
    now = {"settings": {"b": 2, "c": None, "k": {"x": 1, "y": 2}, "z": 0}, "d": [1], "e": "x"}
    now |= {"data": [["1" * 32, 0.5]], "base_model": "1" * 32}
    lines = ["model_name_or_path, weights or config.json: contents have changed", "train_file: contents have changed"]
    lines += ["b: 1 then, 2 now", 'k: {"x": 1} then, {"x": 1, "y": 2} now']
    assert differences(was, now) == lines, "a setting of one alone is of another version"
    assert differences(was, json.loads(json.dumps(was))) == []


def foresee(
    folder: Path, identity: dict = IDENTITY, resume=None, overwrite: bool = False, despite: bool = False
) -> str:
    before = sorted(folder.parent.rglob("*"))
    told = foresee_start(folder, lambda: identity, dict, resume, overwrite, despite)
    assert sorted(folder.parent.rglob("*")) == before, "nothing is made or moved"
    return told


def test_what_a_run_would_do_in_a_folder_is_foreseen_without_touching_it(make_folder, tmp_path):
    path = tmp_path / "run"
    assert foresee(path) == f"would begin in {path}"
    assert "would be refused: resume_from_checkpoint is true, but" in foresee(path, resume=True)
    assert 'resume_from_checkpoint is "Runs/CheckPoint-5", but' in foresee(path, resume="Runs/CheckPoint-5")
    folder = make_folder(5)
    assert foresee(path) == f"would be refused now: another run is writing to {path}"
    folder.lock.release()
    assert foresee(path) == f"would go on from {path}/checkpoint-5"
    assert "would be refused: " in (told := foresee(path, OTHER)) and "seed: 1 then, 2 now" in told
    assert "checkpoint-5\ngoing on from checkpoint-5 is not exact" in foresee(path, OTHER, despite=True)
    assert foresee(path, OTHER, overwrite=True) == f"would move {path} aside and begin there anew"
    write(make_folder(), FINAL)
    folder.lock.release()
    make_folder().lock.release()
    assert foresee(path).startswith(f"would do nothing: it is done, {path}/final")
    (tmp_path / "file").touch()
    assert "cannot be written to" in foresee(tmp_path / "file/run")


def test_a_refused_run_leaves_no_lock_and_no_folder_behind(tmp_path):
    for path in (tmp_path / "new/run", tmp_path):
        with pytest.raises(CheckpointError), RunFolder(path, IDENTITY) as folder:
            folder.open(resume=True)
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "kept").mkdir()
    with pytest.raises(ValueError), RunFolder(tmp_path / "kept/run", IDENTITY) as folder:
        folder.open()
        (folder.path / "rejected.jsonl").touch()
        raise ValueError
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        *("kept", "kept/run", "kept/run/rejected.jsonl"),
    ]
    with pytest.raises(ValueError), RunFolder(tmp_path / "kept/run", IDENTITY) as folder:
        folder.open()
        write(folder, "checkpoint-5", 5)
        raise ValueError
    assert (tmp_path / "kept/run/.lock").exists(), "a run that saved something keeps its lock"
