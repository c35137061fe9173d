"""What ranks tell one another; several machines are in tests/test_several_machines.py."""

import errno
import pickle
import time
from threading import Timer

import pytest
import torch.distributed as dist

from component.run import ranks
from component.run.errors import ArgumentError, DataError, RankLost

GLOO = "[…/gloo/transport/tcp/pair.cc:537] Read error [10.0.0.1]:8584: Connection reset by peer. This is\nmore"


@pytest.fixture
def store(monkeypatch) -> dist.Store:
    monkeypatch.setattr(ranks, "BEAT", 0.1)
    monkeypatch.setattr(ranks, "SILENCE", 0.5)
    return dist.HashStore()


def test_a_rank_that_gives_signs_of_life_is_waited_for(store):
    Timer(1, lambda: store.set("work/1", pickle.dumps("done"))).start()
    with ranks.signs_of_life(store, "sign"):
        assert ranks.read(store, "work/1", "sign") == "done"


def test_a_rank_that_gives_none_any_more_is_lost(store):
    with ranks.signs_of_life(store, "sign"):
        time.sleep(0.2)
    with pytest.raises(RankLost, match="hears nothing from rank 1; look at the output of its machine"):
        ranks.read(store, "work/1", "sign")


def test_a_rank_that_never_comes_is_lost(store):
    with pytest.raises(RankLost, match="hears nothing from rank 3"):
        ranks.read(store, "work/3", seconds=0.1)


def test_a_fault_of_one_rank_says_where_and_one_of_all_does_not():
    with pytest.raises(DataError, match=r"^rank 1 on b: no such file$"):
        ranks.raise_first([None, (DataError("no such file"), "rank 1 on b")])
    with pytest.raises(DataError, match=r"^no such file$"):
        ranks.raise_first([(DataError("no such file"), f"rank {n} on {n}") for n in range(2)])
    with pytest.raises(OSError, match="No space left, rank 1 on b") as raised:
        ranks.raise_first([None, (OSError(errno.ENOSPC, "No space left"), "rank 1 on b")])
    assert raised.value.errno == errno.ENOSPC
    ranks.raise_first([None, None])


def test_a_lost_connection_is_a_fault_and_other_errors_are_not():
    lost = ranks.fault_of(RuntimeError(GLOO))
    assert isinstance(lost, RankLost) and lost.exit_code == 5
    assert str(lost).endswith("Connection reset by peer. This is)")
    assert isinstance(ranks.fault_of(dist.DistNetworkError("gone")), RankLost)
    assert ranks.fault_of(RuntimeError("a mistake")) is None
    assert isinstance(ranks.fault_of(ArgumentError("x")), ArgumentError)


def test_differences_between_machines_are_shown_where_they_can_be_compared():
    shown = ranks.describe_difference("lora_rank", 64, "rank 0 on a", 8, "rank 1 on b")
    assert shown == "lora_rank: 8 on rank 1 on b, 64 on rank 0 on a"
    shown = ranks.describe_difference("weights", "0" * 32, "rank 0 on a", "1" * 32, "rank 1 on b")
    assert shown == "weights: other contents on rank 1 on b than on rank 0 on a"


def test_a_machine_whose_name_leads_nowhere_is_said(monkeypatch):
    here = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "29500"}
    for name, value in here.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "ARRIVAL", 1)
    with pytest.raises(RankLost, match=r"rank 1 on .* cannot reach rank 0's machine at nowhere\.invalid:29500"):
        ranks.on_every_rank(lambda: None)
