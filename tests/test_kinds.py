"""Kinds of noise that networks are compared on: each is what its name says, and stays the same."""
import numpy as np
import pytest
import torch
from PIL import Image

import denoising_utils as du
from programs import kinds
from programs.kinds import KINDS, pairs_of


@pytest.fixture
def grey(folder):
    for file in (folder / 'test').glob('*.png'):
        Image.fromarray(np.full((200, 190, 3), 128, np.uint8)).save(file)
    return folder


@pytest.mark.parametrize('name', KINDS)
def test_what_the_noise_is(grey, name):
    pairs, again = ([*pairs_of(name, grey, {})] for _ in range(2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(pairs, again))
    noise = torch.cat([noisy - clean for noisy, clean in pairs]) * 127.5
    assert (noise - noise.round()).abs().max() < 1e-3  # 8 bits
    share = ((noise[..., 1:] * noise[..., :-1]).mean() / noise.square().mean()).item()
    kind = KINDS[name]
    if kind is None:
        assert share > 0.2 and noise.std() > 1
    elif kind.level == 0:
        assert not noise.any()
    elif kind.quality is None:
        assert noise.std() == pytest.approx(kind.level, rel=0.06)
        assert share == pytest.approx(2 / 3 if kind.shared else 0, abs=0.05)


def test_the_table(grey, monkeypatch, capsys):
    net = du.make_network('dncnn', 1, C=2, zero_last=True)
    monkeypatch.setattr(du, 'load_network', lambda name: (net, []))
    kinds.main(['dncnn', '--data', str(grey)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(KINDS)
    for line in lines[2:]:  # the network returns its input
        _, _, noisy, denoised, _ = line.split('|')
        assert noisy == denoised
