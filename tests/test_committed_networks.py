"""The trained networks in checkpoints/: they denoise, and their training goes on by its recipe."""
import shutil

import pytest

import denoising_utils as du

CHECKPOINTS = du.HERE / 'checkpoints'
NAMES = sorted(path.name for path in CHECKPOINTS.iterdir() if path.is_dir())


@pytest.mark.parametrize('name', NAMES)
def test_committed_networks_denoise(name, photographs):
    """Far better than the noisy image, on four test photographs."""
    net, history = du.load_network(name)
    assert len(history) >= 75 and isinstance(history[0][1]['PSNR'], float)
    pairs = du.benchmark_pairs(photographs, size=200, subset=range(0, 100, 25))
    least = 25 if name.startswith('pooling') else 28  # it has no skips
    assert du.benchmark(net, pairs)['psnr'].mean() > least


@pytest.mark.parametrize('name, options', [
    ('dncnn', {}), ('udncnn', {}), ('dudncnn', {}), ('dncnn_course', {'batch_norm': 'course'})])
def test_a_committed_training_goes_on_by_its_recipe(name, options, photographs, tmp_path, capsys):
    """Weights, optimizer and history are those of the checkpoint; nothing is left to train.

    Its settings are not in it: names and shapes are compared, which is said.
    """
    shutil.copytree(CHECKPOINTS / name, tmp_path / name)
    recipe = du.Recipe(net=name.split('_')[0], **options)
    exp = recipe.experiment(photographs, tmp_path / name)
    net, history = du.load_network(name)
    assert exp.epoch == recipe.epochs == 200 and exp.history == history
    weights = exp.net.state_dict()
    assert all(value.equal(weights[name]) for name, value in net.state_dict().items())
    assert len(exp.optimizer.state) == len(list(net.parameters()))
    exp.run(recipe.epochs)
    said = capsys.readouterr().out
    assert 'Epoch' not in said and 'NOTE' not in said
    assert said.count('has no settings: only names and shapes are compared\n') == 1
    with pytest.raises(ValueError, match='(?s)holds another Net: .*conv'):
        du.Recipe(net=recipe.net, D=4, **options).experiment(photographs, tmp_path / name)
