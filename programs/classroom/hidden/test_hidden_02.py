import pytest
import torch

from programs.classroom.hidden.helpers import as_bytes, photographs

pytestmark = pytest.mark.part(2)


@pytest.mark.points(1)
def test_sizes(du, folder):
    """Crops have the size asked for, (height, width), from photographs of both orientations."""
    photographs(folder)
    for size in ((20, 36), (36, 20), (48, 48), (1, 1)):
        data = du.NoisyBSDSDataset(folder, 'train', size)
        for noisy, clean in data:
            assert noisy.shape == clean.shape == (3, *size)


@pytest.mark.points(1)
def test_values(du, folder):
    """A crop has the pixels of one place in the photograph, as floats: black is -1, white is 1."""
    photographs(folder)
    data = du.NoisyBSDSDataset(folder, 'test', (64, 48), sigma=0, subset=[0])
    clean = data[0][1]
    assert clean.dtype == torch.float32
    assert torch.equal(as_bytes(clean), data.images[0].long())
    part = du.NoisyBSDSDataset(folder, 'train', (20, 30), sigma=0)[0][1]
    rows, columns, _ = as_bytes(part)
    assert torch.equal(rows - rows[0, 0], torch.arange(20)[:, None].expand(20, 30))
    assert torch.equal(columns - columns[0, 0], torch.arange(30).expand(20, 30))


@pytest.mark.points(1)
def test_places(du, folder):
    """All places where the crop fits are reached, the first and the last row and column too."""
    photographs(folder)
    data = du.NoisyBSDSDataset(folder, 'train', (40, 40), sigma=0, subset=[0])
    torch.manual_seed(0)
    corners = [tuple(as_bytes(data[0][1])[:2, 0, 0].tolist()) for _ in range(600)]
    tops, lefts = zip(*corners)
    assert set(tops) == set(range(64 - 40 + 1))
    assert set(lefts) == set(range(48 - 40 + 1))
    assert len(set(corners)) > 150  # of 225: rows and columns are drawn each for itself


@pytest.mark.points(1)
def test_another_size(du, folder):
    """`_crop` takes another size than that of the data set, and its random numbers from the
    generator that it is given."""
    data = du.NoisyBSDSDataset(photographs(folder), 'train', (40, 40), sigma=0)
    crops = [data._crop(data.images[0], torch.Generator().manual_seed(3), (10, 12))
             for _ in range(2)]
    assert crops[0].shape == (3, 10, 12)
    assert torch.equal(*crops)
    assert data._crop(data.images[0], None).shape == (3, 40, 40)


@pytest.mark.points(1)
def test_noise(du, folder):
    """The noise is Gaussian and white, has the standard deviation asked for, and isn't clipped."""
    photographs(folder)
    data = du.NoisyBSDSDataset(folder, 'test', (48, 48), sigma=50)
    noise = torch.stack([noisy - clean for noisy, clean in data])
    assert abs(noise.std() / (2 * 50 / 255) - 1) < 0.03
    assert abs(noise.mean()) < 0.02
    assert abs(noise.pow(4).mean() / noise.var() ** 2 - 3) < 0.3
    assert max(noisy.abs().max() for noisy, _ in data) > 1.5
    for shifted in (noise.roll(1, 0), noise.roll(1, 1), noise.roll(1, 2), noise.roll(1, 3)):
        assert abs((noise * shifted).mean() / noise.var()) < 0.05
    noisy, clean = du.NoisyBSDSDataset(folder, 'train', (48, 48), sigma=0)[0]
    assert torch.equal(noisy, clean)


@pytest.mark.points(1)
def test_what_is_fixed(du, folder):
    """Samples of the test set are the same at each access, those for training never; a seed
    decides."""
    photographs(folder)
    test, train = (du.NoisyBSDSDataset(folder, mode, (32, 32)) for mode in ('test', 'train'))
    again = du.NoisyBSDSDataset(folder, 'test', (32, 32))
    other = du.NoisyBSDSDataset(folder, 'test', (32, 32), seed=1)
    first = test[1]
    assert all(torch.equal(a, b) for a, b in zip(first, test[1]))
    assert all(torch.equal(a, b) for a, b in zip(first, again[1]))
    assert not torch.equal(first[0] - first[1], test[0][0] - test[0][1])
    assert not torch.equal(first[0] - first[1], other[1][0] - other[1][1])
    pairs = [train[1] for _ in range(2)]
    assert not torch.equal(pairs[0][0] - pairs[0][1], pairs[1][0] - pairs[1][1])


@pytest.mark.points(1)
def test_indices(du, folder):
    """An index counts as in a list, and with ``crops`` each photograph comes several times."""
    photographs(folder)
    data = du.NoisyBSDSDataset(folder, 'test', (64, 48), sigma=0, subset=[0], crops=3)
    assert len(list(data)) == 3
    data = du.NoisyBSDSDataset(folder, 'test', (32, 32), crops=2)
    assert torch.equal(data[-1][0], data[3][0])
    for wrong in (4, -5):
        with pytest.raises(IndexError):
            data[wrong]
    seen = [as_bytes(clean)[2].sum().item() for _, clean in data]
    assert len(set(seen)) == 4


@pytest.mark.points(1)
def test_flips(du, folder):
    """With ``augment``, square crops come in all orientations; without it in one."""
    photographs(folder)
    for augment, orientations in ((True, 8), (False, 1)):
        data = du.NoisyBSDSDataset(folder, 'train', (40, 40), sigma=0, augment=augment)
        torch.manual_seed(0)
        seen = set()
        for k in range(240):
            rows, columns, _ = as_bytes(data[k % 2][1])
            steps = (rows[1, 0] - rows[0, 0], rows[0, 1] - rows[0, 0],
                     columns[1, 0] - columns[0, 0], columns[0, 1] - columns[0, 0])
            seen.add(tuple(int(step) for step in steps))
        assert len(seen) == orientations
