"""What the network takes from pictures that have no noise, and how it is kept from doing so.

    python -m programs.without_noise      # a few minutes; needs Chromium for the screenshots

Nothing here is a test photograph: the rule (`programs.inference.trust`) was chosen by this table.
"""
import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import denoising_utils as du
from programs import run
from programs.inference import find_noise, fold, trust
from programs.kinds import CAMERA, pairs_of
from programs.tables import line, table

SIZE = (480, 320)  # of drawings and screenshots, in pixels
HELD_OUT = {'mode': 'train', 'subset': du.HELD_OUT}


def draw_lines(number, random):
    """Lines, shapes and words on paper: a tensor of bytes (3, height, width)."""
    width, height = SIZE
    image = Image.new('RGB', SIZE, 'white')
    draw = ImageDraw.Draw(image)
    for _ in range(number):
        ends = random.integers(0, (width, height, width, height)).tolist()
        colour = tuple(random.integers(0, 200, 3).tolist())
        draw.line(ends, colour, int(random.integers(1, 4)))
        x, y = random.integers(0, (width - 60, height - 60)).tolist()
        shape = draw.ellipse if random.integers(2) else draw.rectangle
        shape((x, y, x + 60, y + 40), outline='black')
        draw.text((y, x % height), 'Lorem ipsum dolor sit amet', 'black')
    return to_bytes(image)


def screenshots():
    """Of the notebook, as a browser shows it: two where its figures are, two of code and text."""
    from nbconvert import HTMLExporter
    from playwright.sync_api import sync_playwright

    page, _ = HTMLExporter().from_filename(du.HERE / 'Assignment4.ipynb')
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder) / 'notebook.html'
        file.write_text(page, encoding='utf-8')
        options = {'executable_path': shutil.which('chromium'), 'args': ['--no-sandbox']}
        browser = playwright.chromium.launch(**options)
        tab = browser.new_page(viewport=dict(zip(('width', 'height'), (900, 600))))
        tab.goto(file.as_uri())
        for name in ('table', 'pre', '.jp-OutputArea-output img', 'h2'):
            tab.locator(name).nth(3).scroll_into_view_if_needed()
            tab.screenshot(path=f'{folder}/page.png')
            yield to_bytes(Image.open(f'{folder}/page.png').convert('RGB'))
        browser.close()


def to_bytes(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def pictures():
    """Pairs (picture, clean one or None) by kind; bytes (3, height, width)."""
    random = np.random.default_rng(0)
    photographs = du.find_photographs()
    yield 'drawings, few lines', [(draw_lines(5, random), None) for _ in range(5)]
    yield 'drawings, many lines', [(draw_lines(25, random), None) for _ in range(5)]
    yield 'screenshots', [(image, None) for image in screenshots()]
    clean = du.NoisyBSDSDataset(photographs, 'train', 320, 0, subset=du.HELD_OUT, seed=0)
    yield 'photographs, clean', [(du.to_integers(image), None) for image, _ in clean]
    for kind in ('white, 5', 'white, 10', CAMERA, 'shared, 15'):
        pairs = pairs_of(kind, photographs, HELD_OUT)
        yield f'photographs, {kind}', [(du.to_integers(noisy[0]), clean) for noisy, clean in pairs]


def scores(net, picture, clean):
    """The level found, and the PSNR without the rule and with it: to the clean one if there is one,
    or to the picture itself."""
    level = find_noise(net, picture)
    noisy = du.to_floats(picture)[None]
    clean = noisy if clean is None else clean
    with torch.inference_mode():
        denoised = net(noisy)
    both = []
    for strength in (1, trust(level)):
        result = du.to_floats(du.to_integers(noisy.lerp(denoised, strength)))
        both.append(du.psnr(result, clean).item())
    return level, *both


def main(words=None):
    parser = argparse.ArgumentParser(
        prog='python -m programs.without_noise', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--net', default='dudncnn_photo', help='which (default: %(default)s)')
    net = fold(du.load_network(parser.parse_args(words).net)[0])
    print(*table(['pictures', 'number', 'level found, lowest', 'median', 'highest',
                  'lowest PSNR without the rule (dB)', 'with it', 'mean without', 'with it']),
          sep='\n')
    for kind, pairs in pictures():
        levels, without, ruled = np.array([scores(net, *pair) for pair in pairs]).T
        figures = [levels.min(), np.median(levels), levels.max(), without.min(), ruled.min(),
                   without.mean(), ruled.mean()]
        cells = [f'{value:.2f}'.replace('inf', '∞') for value in figures]
        print(line([kind, len(pairs), *cells]), flush=True)


if __name__ == '__main__':
    run(main)
