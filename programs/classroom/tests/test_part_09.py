"""Part 9: statistics."""
import torch

import denoising_utils as du


def test_psnr():
    d = torch.zeros(2, 3, 4, 4)
    value = du.psnr(d + 0.2, d)
    assert value.shape == (2,), f'of two images its shape is {tuple(value.shape)}, asked for (2,)'
    assert abs(value[0].item() - 20) < 0.01, (
        f'for errors of 0.2, a tenth of the range, it is {value[0]:.2f} dB, asked for 20')


def summary(errors, batch):
    stats = du.DenoisingStatsManager()
    stats.init()
    for part in torch.tensor(errors).split(batch):
        y = part[:, None, None, None].expand(-1, 3, 4, 4)
        d = torch.zeros_like(y)
        stats.accumulate(((y - d) ** 2).mean().item(), y, y, d)
    return stats.summarize()


def test_the_summary():
    result = summary([0.2, 0.2], 1)
    assert isinstance(result, dict) and set(result) == {'loss', 'PSNR'}, (
        f'the summary is {result!r}, asked for a dict with loss and PSNR')
    assert abs(result['loss'] - 0.04) < 1e-6, f'the loss is {result["loss"]:g}, asked for 0.04'


def test_the_size_of_batches_does_not_matter():
    errors = [0.02, 0.2, 0.5, 0.1, 0.3]
    values = {batch: summary(errors, batch)['PSNR'] for batch in (1, 2, 5)}
    assert max(values.values()) - min(values.values()) < 0.01, (
        'the PSNR depends on the batch size: ' + ', '.join(
            f'{value:.2f} dB in batches of {batch}' for batch, value in values.items()))
