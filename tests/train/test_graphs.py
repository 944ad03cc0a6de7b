"""What surrounds a captured step and can be seen without a GPU; tests/cuda/test_graphs.py has the rest."""

from types import SimpleNamespace

import pytest
import torch

from regard.core.errors import RegardError
from regard.kernels import device
from regard.measure.tasks.task import build
from regard.train import graphs
from regard.train.data import TaskRows
from regard.train.loop import train
from regard.train.settings import Settings
from train.toys import llama

CPU = torch.device("cpu")


class Pretended(graphs.Replay):
    """Replays by calling, over the tensors that a graph would read and fill."""

    def _watched(self, *inputs):
        return self.work(*inputs)

    def _captured(self, *inputs):
        self.inputs = [x.clone() for x in inputs]
        self.out = torch.full((2,), torch.nan)
        return SimpleNamespace(replay=lambda: self.out.copy_(self.work(*self.inputs)))


@pytest.fixture
def pretended(monkeypatch):
    monkeypatch.setattr(graphs, "refuses", lambda device: None)
    return lambda work, wanted=None: Pretended(work, CPU, wanted)


def test_a_replay_reads_what_it_is_given_and_gives_memory_of_its_own(pretended):
    taken = pretended(lambda x, y: torch.stack((x.sum(), y.sum())))
    given = [(torch.full((3,), float(i)), torch.full((2,), -float(i))) for i in range(8)]
    found = [taken(x, y) for x, y in given]
    assert [x.tolist() for x in found] == [[3.0 * i, -2.0 * i] for i in range(8)]
    assert taken.graph is not None
    assert [x.shape for x in taken.inputs] == [(3,), (2,)]
    assert all(x.data_ptr() != y.data_ptr() for x, y in zip(taken.inputs, given[graphs.WARM], strict=True))


def test_other_shapes_are_launched_from_then_on_or_refused(pretended):
    for wanted in (None, True):
        taken = pretended(lambda x: x.sum().expand(2), wanted)
        for _ in range(graphs.WARM + 2):
            taken(torch.ones(3))
        assert taken.why == ""
        if wanted:
            with pytest.raises(RegardError, match=r"refuses: rows of \[\[4\]\] came after rows of \[\[3\]\]"):
                taken(torch.ones(4))
            continue
        assert taken(torch.ones(4)).tolist() == [4.0, 4.0]
        assert "came after" in taken.why
        assert taken(torch.full((3,), 2.0)).tolist() == [6.0, 6.0]


def test_a_cpu_launches_every_step_and_says_so():
    wanted = {"task": "copy", "length": 16, "task_settings": {"lag": 2, "vocabulary": 16}, "batch": 2, "steps": 6}
    losses = {}
    for asked in (None, False):
        settings = Settings(**wanted, graphs=asked)
        torch.manual_seed(0)
        told = train(llama(vocabulary=16), TaskRows(build("copy", length=16, lag=2, vocabulary=16), settings), settings)
        losses[asked] = told.losses
        assert told.eager == ("graphs are off" if asked is False else "graphs are captured on CUDA devices, not on cpu")
    assert losses[None] == losses[False]
    settings = Settings(**wanted, graphs=True)
    source = TaskRows(build("copy", length=16, lag=2, vocabulary=16), settings)
    with pytest.raises(RegardError, match="graphs=True refuses: graphs are captured on CUDA devices, not on cpu"):
        train(llama(vocabulary=16), source, settings)
    with pytest.raises(RegardError, match=r"setting graphs .* must be bool, not 'yes'"):
        Settings(**wanted, graphs="yes")


def test_tables_that_a_graph_read_outlive_their_cache(monkeypatch):
    pytest.importorskip("triton")
    from regard.kernels.states.segments import cut

    def ends():
        return [cut(((0, 0, length),), 16, None, CPU).table[0, 2] for length in range(1, 4)]

    monkeypatch.setattr(device, "_kept", {})
    ends()
    assert not device._kept
    monkeypatch.setattr(device, "capturing", lambda where: True)
    ends()
    assert [int(x.table[0, 2]) for x in device._kept.values()] == [1, 2, 3]
