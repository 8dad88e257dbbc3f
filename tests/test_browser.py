"""The notebook in a real JupyterLab in a real browser: headless Chromium, driven by Playwright.

BROWSER_FULL=1 also restarts the kernel and runs the whole notebook there (minutes).
"""
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

HERE = Path(__file__).resolve().parents[1]
NOTEBOOK = HERE / os.environ.get('NOTEBOOK', 'Assignment4.ipynb')
CHROMIUM = os.environ.get('CHROMIUM') or shutil.which('chromium') or shutil.which(
    'chromium-browser') or shutil.which('google-chrome')
ARGUMENTS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
             '--disable-background-networking', '--disable-component-update', '--disable-sync']

sync_api = pytest.importorskip('playwright.sync_api', reason='Playwright is not installed')
pytestmark = [
    pytest.mark.skipif(
        not CHROMIUM,
        reason='no Chromium here (Debian: apt install chromium; or set CHROMIUM)'),
    pytest.mark.skipif(not NOTEBOOK.is_file(), reason=f'there is no {NOTEBOOK.name}')]


def copy_of_the_project(folder, live_only):
    """Notebook, modules and networks in a folder of their own; perhaps only the live cells.

    Returns how many code cells the notebook there has."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    if live_only:
        trains = [k for k, cell in enumerate(code) if 'live.run(' in cell.source]
        assert trains, 'no cell of the notebook trains live: none contains live.run('
        before = code[:trains[0]]
        tagged = [cell for cell in before if 'live' in cell.metadata.get('tags', [])]
        code = [*(tagged or before), code[trains[0]]]
        notebook.cells = code
    for cell in code:
        cell.outputs = []
        cell.execution_count = None
    nbformat.write(notebook, folder / NOTEBOOK.name)
    for module in ('nntools.py', 'denoising_utils.py'):
        shutil.copy(HERE / module, folder)
    shutil.copytree(HERE / 'checkpoints', folder / 'checkpoints')
    return len(code)


class Lab:
    """A notebook that is open in JupyterLab, as its reader sees it."""

    def __init__(self, page, folder):
        self.page, self.folder = page, folder

    def wait(self, condition, seconds, what):
        """Until ``condition()`` is true. Dialogs ("Select Kernel", restart) are accepted."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            accept = self.page.locator('.jp-Dialog button.jp-mod-accept')
            if accept.count():
                accept.first.click()
            value = condition()
            if value:
                return value
            self.page.wait_for_timeout(200)
        picture = self.folder / 'failed.png'
        self.page.screenshot(path=picture)
        raise AssertionError(f'waited {seconds} s in vain for {what}; see {picture}')

    def idle(self):
        return self.page.locator('.jp-Notebook-ExecutionIndicator[data-status=idle]').count()

    def cell(self, k):
        return self.page.locator('.jp-Notebook .jp-CodeCell').nth(k)

    def run(self, k):
        """Starts the k-th code cell: a click into it, and Ctrl-Enter; again if nothing happened."""
        before = self.prompt(k)
        for _ in range(5):
            self.cell(k).locator('.cm-content').click()
            self.page.keyboard.press('Control+Enter')
            for _ in range(50):
                if self.prompt(k) != before:
                    return
                self.page.wait_for_timeout(200)
        raise AssertionError(f'code cell {k + 1} does not start')

    def prompt(self, k):
        return self.cell(k).locator('.jp-InputPrompt').first.inner_text().strip()

    def done(self, k):
        """Whether the k-th code cell has an execution number, neither ``[ ]`` nor ``[*]``."""
        return re.fullmatch(r'\[\d+\]:?', self.prompt(k))

    def text(self, k):
        return self.cell(k).locator('.jp-Cell-outputArea').inner_text()

    def picture(self, k):
        """The ``src`` of the last picture below the k-th code cell, or None."""
        pictures = self.cell(k).locator('.jp-OutputArea-output img')
        return pictures.last.get_attribute('src') if pictures.count() else None

    def menu(self, name, item):
        self.page.locator('.lm-MenuBar-itemLabel', has_text=re.compile(f'^{name}$')).click()
        self.page.locator('.lm-Menu-itemLabel', has_text=re.compile(f'^{item}')).first.click()

    def saved(self):
        """The notebook as it lies on disk after File > Save."""
        file = self.folder / NOTEBOOK.name
        before = file.stat().st_mtime_ns
        self.page.keyboard.press('Control+s')
        self.wait(lambda: file.stat().st_mtime_ns != before, 30, 'the file to be saved')
        return nbformat.read(file, as_version=4)


def write_settings(folder):
    """JupyterLab's settings: cells out of sight are in the page too, and it asks for no news."""
    settings = {
        'notebook-extension/tracker': {'windowingMode': 'none'},
        'apputils-extension/notification': {'fetchNews': 'false', 'checkForUpdates': False}}
    for plugin, setting in settings.items():
        file = folder / '@jupyterlab' / f'{plugin}.jupyterlab-settings'
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(setting))


def environment_of_a_reader(folder):
    """The environment, but without what was set for tests, and with JupyterLab's files here."""
    ours = ('CI', 'TQDM_DISABLE', 'MPLBACKEND')
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {
        'JUPYTER_PREFER_ENV_PATH': '1',
        'JUPYTERLAB_SETTINGS_DIR': str(folder / 'settings'),
        'JUPYTER_CONFIG_DIR': str(folder / 'config'),
        'JUPYTERLAB_WORKSPACES_DIR': str(folder / 'workspaces')}
    photographs = os.environ.get('BSDS300') or HERE / 'BSDS300' / 'images'
    if os.path.isdir(photographs):
        environment['BSDS300'] = os.path.abspath(photographs)
    return environment


def free_port():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def jupyterlab(folder):
    """Runs JupyterLab in folder/project. Gives its address, once it answers."""
    write_settings(folder / 'settings')
    port = free_port()
    address = f'http://127.0.0.1:{port}'
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root',
               '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0',
               '--IdentityProvider.token=']
    with open(folder / 'jupyterlab.log', 'w') as log:
        server = subprocess.Popen(command, cwd=folder / 'project', stdout=log, stderr=log,
                                  env=environment_of_a_reader(folder))
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f'{address}/api', timeout=5).close()
                    break
                except OSError:
                    said = (folder / 'jupyterlab.log').read_text()
                    assert server.poll() is None, said[-2000:]
                    time.sleep(0.25)
            yield address
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


@pytest.fixture
def open_notebook(tmp_path):
    """A function that starts JupyterLab on a copy of the project and opens the notebook in it."""
    with contextlib.ExitStack() as stack:
        def open_it(live_only):
            (tmp_path / 'project').mkdir()
            cells = copy_of_the_project(tmp_path / 'project', live_only)
            address = stack.enter_context(jupyterlab(tmp_path))
            playwright = stack.enter_context(sync_api.sync_playwright())
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
            page = browser.new_page(viewport={'width': 1200, 'height': 1400})
            page.goto(f'{address}/lab/tree/{NOTEBOOK.name}?reset')
            lab = Lab(page, tmp_path / 'project')
            shown = page.locator('.jp-Notebook .jp-CodeCell')
            lab.wait(lambda: shown.count() == cells, 90, 'the notebook')
            for _ in range(5):  # it may say idle for a moment before it is connected
                lab.wait(lab.idle, 60, 'the kernel')
                page.wait_for_timeout(400)
            return lab, cells

        yield open_it


def test_live_plot_interrupt_and_resume(open_notebook):
    lab, cells = open_notebook(live_only=True)
    live = cells - 1
    for k in range(live):
        lab.run(k)
        lab.wait(lambda: lab.done(k), 240, f'code cell {k + 1}')  # noqa: B023 (called at once)
        assert 'Traceback' not in lab.text(k), lab.text(k)

    lab.run(live)
    pictures = []

    def changed():
        picture = lab.picture(live)
        if picture and picture not in pictures:
            pictures.append(picture)
        return len(pictures) >= 4
    lab.wait(changed, 240, 'a figure that changes three times while training')
    assert not lab.done(live), 'the figure changed only when the training was over'

    # In mid-epoch: half an epoch after the figure of the last one was drawn.
    seconds = float(re.findall(r'Epoch \d+/\d+: .*\(([\d.]+) s\)', lab.text(live))[-1])
    lab.page.wait_for_timeout(500 * seconds)
    lab.menu('Kernel', 'Interrupt Kernel')
    lab.wait(lambda: lab.done(live), 60, 'the interrupt')
    text = lab.text(live)
    assert 'KeyboardInterrupt' in text, text
    assert 'Traceback (most recent call' in text, text
    saved = int(re.search(r'back to epoch (\d+)', text)[1])
    assert saved >= 3, text

    pictures.clear()
    lab.run(live)
    resumed = f'training from epoch {saved}\n'
    lab.wait(lambda: resumed in lab.text(live) + '\n', 120, f'a resume at epoch {saved}')
    lab.wait(lambda: f'Epoch {saved + 1}/' in lab.text(live), 240, f'epoch {saved + 1}')
    lab.wait(lambda: lab.done(live) or changed(), 240, 'a figure that changes again')
    lab.page.screenshot(path=lab.folder / 'live.png')
    assert len(pictures) >= 2 and 'Traceback' not in lab.text(live), lab.text(live)
    lab.menu('Kernel', 'Interrupt Kernel')


@pytest.mark.skipif(not os.environ.get('BROWSER_FULL'), reason='takes minutes: set BROWSER_FULL=1')
def test_whole_notebook_after_a_restart(open_notebook):
    lab, cells = open_notebook(live_only=False)
    lab.menu('Run', 'Restart Kernel and Run All Cells')
    dialog = lab.page.locator('.jp-Dialog')
    lab.wait(lambda: dialog.count() == 0 and not lab.done(cells - 1), 60, 'the restart')
    errors = lab.page.locator('.jp-Notebook .jp-OutputArea-output',
                              has_text='Traceback (most recent call')
    lab.wait(lambda: lab.done(cells - 1) or errors.count(), 1800, 'the last cell')
    for cell in lab.saved().cells:
        for output in cell.get('outputs', []):
            assert output.output_type != 'error', f'{output.ename}: {output.evalue}\n{cell.source}'
        assert cell.cell_type != 'code' or cell.execution_count, f'not run:\n{cell.source}'
