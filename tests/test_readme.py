"""The README's programs run, and what it names is there."""
import re
import sys
import types
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent.parent
README = (HERE / 'README.md').read_text(encoding='utf-8')


def test_the_programs_run(tmp_path, monkeypatch, capsys):
    logged = []
    tensorboard = types.ModuleType('torch.utils.tensorboard')  # so that the test needs no TensorBoard
    tensorboard.SummaryWriter = lambda folder: types.SimpleNamespace(add_scalar=lambda *scalar: logged.append(scalar))
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', tensorboard)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster for networks this small when the machine has other work
    first, *others = re.findall(r'^```python\n(.*?)^```', README, flags=re.MULTILINE | re.DOTALL)

    names = {'__name__': 'digits'}
    exec(compile(first, 'README.md', 'exec'), names)
    assert names['exp'].evaluate()['accuracy'] > 0.85
    said = capsys.readouterr().out
    assert 'training from epoch 0\n' in said and 'Epoch 20/20' in said

    again = {'__name__': 'digits'}
    exec(compile(first, 'README.md', 'exec'), again)
    assert 'Epoch' not in capsys.readouterr().out, 'the second run should find its checkpoint'
    assert again['exp'].evaluate() == names['exp'].evaluate()

    for program in others:
        exec(compile(program, 'README.md', 'exec'), names)
    torch.set_num_threads(threads)
    assert {'loss', 'epoch'} <= {name for name, *_ in logged}


def test_what_the_readme_names_is_there():
    makefile = (HERE / 'Makefile').read_text()
    targets = set(re.findall(r'^(?:    |.*`)(?:RETRAIN=1 )?make ([a-z]+)', README, flags=re.MULTILINE))
    assert len(targets) > 5
    assert [target for target in targets if not re.search(rf'^{target}:', makefile, re.MULTILINE)] == []
    links = [link for link in re.findall(r'\]\(([^)]+)\)', README) if '://' not in link]
    anchors = {re.sub(r'[^\w -]', '', text.lower()).replace(' ', '-')
               for text in re.findall(r'^#+ (.*)$', README, flags=re.MULTILINE)}
    assert [link for link in links if link.startswith('#') and link[1:] not in anchors] == []
    files = {link for link in links if not link.startswith('#')}
    files |= set(re.findall(r'`((?:tests/|\.ci/)?[\w.]+\.(?:py|ipynb|txt|toml|cfg))`', README)) - {'digits.py'}
    assert [file for file in files if not (HERE / file).exists()] == []
