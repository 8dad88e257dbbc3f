"""nntools: bfloat16, and float16 with its loss scaling."""

import torch

import nntools as nt
from tests.helpers import Data, Net, OneLayer, end, make, same


def test_bfloat16_in_training_and_float32_in_evaluation(tmp_path):
    kinds = []

    class Spy(Net):
        def criterion(self, y, d):
            kinds.append((self.training, y.dtype))
            return super().criterion(y.float(), d)

    exp = make(tmp_path, Spy(), precision='bfloat16', perform_validation_during_training=True)
    exp.run(2)
    assert set(kinds) == {(True, torch.bfloat16), (False, torch.float32)}
    assert all(p.dtype == torch.float32 for p in exp.net.parameters())
    assert exp.history[1][0]['loss'] < exp.history[0][0]['loss']


def test_loss_scaling_is_kept_in_the_checkpoint(tmp_path):
    """As on CUDA, with torch's scaler for the CPU."""
    def build(name):
        return make(tmp_path / name, precision='float16', grad_clip=0.5)

    whole = build('whole')
    whole.run(3)
    build('parts').run(2)
    parts = build('parts')
    assert parts.state_dict()['Scaler']['_growth_tracker'] > 0
    parts.run(3)
    assert same(end(whole), end(parts)) and whole.state_dict()['Scaler']['_growth_tracker'] >= 10
    assert whole.history[2]['loss'] < whole.history[0]['loss']


class Adds(nt.Experiment):
    """Two updates a step, each with the weights that the first has left."""
    def step(self, batch):
        x, d = batch
        for _ in range(2):
            y = self.net(x)
            self.seen.append(y.detach().float().clone())
            loss = self.net.criterion(y.float(), d)
            self.update(loss)
        return loss, x, y, d


def test_each_update_sees_the_weights_of_the_one_before(tmp_path):
    """Autocast keeps weights that it has cast; not beyond an update."""
    net = OneLayer()
    exp = Adds(
        net, Data(), Data(7), torch.optim.SGD(net.parameters(), lr=0.5), nt.StatsManager(),
        str(tmp_path), 4, seed=0, precision='bfloat16')
    exp.seen = []
    exp.run(1)
    assert all(not torch.equal(a, b) for a, b in zip(exp.seen[::2], exp.seen[1::2]))
