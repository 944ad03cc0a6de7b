"""What surrounds a captured step and can be seen without a GPU; tests/cuda/test_graphs.py has the rest."""

from types import SimpleNamespace

import pytest
import torch

from regard.core.errors import RegardError
from regard.kernels import device, graphs
from regard.measure.tasks.task import build
from regard.train.data import TaskRows
from regard.train.loop import paced, train
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


class Stream:
    """A stream that knows whom it waited for."""

    now = before = None

    def __init__(self, device=None):
        self.waited = []

    def wait_stream(self, other):
        self.waited.append(other)

    def __enter__(self):
        self.before, Stream.now = Stream.now, self

    def __exit__(self, *_):
        Stream.now = self.before


def test_runs_that_take_turns_stay_on_their_own_streams(monkeypatch):
    first = Stream.now = Stream()
    monkeypatch.setattr(graphs, "refuses", lambda device: None)
    for name, fake in (("Stream", Stream), ("stream", lambda x: x), ("current_stream", lambda device: Stream.now)):
        monkeypatch.setattr(torch.cuda, name, fake)
    words = {"task": "copy", "length": 16, "task_settings": {"lag": 2, "vocabulary": 16}, "batch": 2, "graphs": False}
    seen, runs, results = ([], []), [], [[], []]
    for number, steps in enumerate((2, 4)):
        settings = Settings(**words, steps=steps)
        model = llama(vocabulary=16, attention_dropout=0.0)
        model.register_forward_hook(lambda *_, number=number: seen[number].append(Stream.now))
        source = TaskRows(build("copy", length=16, lag=2, vocabulary=16), settings)
        runs.append(paced(model, source, settings))
    while runs[0] or runs[1]:
        for number in (0, 1):
            found = next(runs[number], None) if runs[number] else None
            assert Stream.now is first
            if found is None:
                runs[number] = None
            else:
                results[number].append(found.step)
    assert results == [[1, 2, 2], [1, 2, 3, 4, 4]]
    assert [len(set(x)) for x in seen] == [1, 1]
    streams = [x[0] for x in seen]
    assert first not in streams
    assert streams[0] is not streams[1]
    assert [x.waited for x in streams] == [[first], [first]]
    assert first.waited == streams


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
