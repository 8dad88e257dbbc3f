"""Puts the cells of issue 11 into the notebook: python /tmp/cells.py NOTEBOOK. Can be repeated."""
import json, sys
path = sys.argv[1]
nb = json.load(open(path))
LEVELS = r'''levels = (3, 10, 15, 20, 25, 30, 35, 40, 50)
blind = du.load_network('dudncnn_blind', device=device)[0]
ten = range(0, len(test_set), max(1, len(test_set) // 10))
by_level = {name: [] for name in ('noisy', *nets, 'DUDnCNN, scaled', 'DUDnCNN, blind')}
for sigma in levels:
    crops = [[middle(image, 160)[None] for image in pair] for pair in fixed_test(ten, sigma)]
    others = {'DUDnCNN, scaled': du.for_level(nets['DUDnCNN'], sigma), 'DUDnCNN, blind': blind}
    for name in by_level:
        denoise = torch.clone if name == 'noisy' else denoiser((nets | others)[name])
        by_level[name].append(du.benchmark(denoise, crops)['psnr'].mean())
fig, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout='constrained', sharey=True)
STYLE = {'noisy': '.:', 'DUDnCNN, scaled': '.--', 'DUDnCNN, blind': '.-'}
for name, values in by_level.items():
    axes[0].plot(levels, values, STYLE.get(name, '.-'), color=COLOUR.get(name, {'noisy': '0.5', 'DUDnCNN, scaled': 'tab:green'}.get(name, 'tab:red')), label=name)
axes[0].set(xlabel='Noise level σ (0 to 255)', ylabel='PSNR (dB)', title=f'{len(ten)} photographs, the middle 160×160')
stored = du.HERE / 'checkpoints' / 'levels.csv'
for name, label, colour in (('noisy', 'noisy', '0.5'), ('dudncnn', 'DUDnCNN', 'tab:green'), ('dudncnn_blind', 'DUDnCNN, blind', 'tab:red')):
    scores = [du.read_scores(stored, f'sigma {sigma}')[name].mean() for sigma in du.LEVELS]
    axes[1].plot(du.LEVELS, scores, '.:' if name == 'noisy' else '.-', color=colour)
marks = {int(which.split()[1]): value for which, value in du.FFDNET.items() if '8 bits' not in which}
axes[1].plot(marks.keys(), marks.values(), 'kx', label='FFDNet, told the level (measured elsewhere)')
axes[1].set(xlabel='Noise level σ (0 to 255)', title='Stored scores: 100 photographs of BSDS300, 320×320')
for ax in axes:
    ax.axvline(30, color='0.7', lw=1)
    ax.legend()
plt.show()
print(f'mean PSNR (dB) of {len(ten)} test photographs, the middle 160x160 pixels')
table(['σ', *map(str, levels)],
      [[name, *(f'{value:.2f}' for value in values)] for name, values in by_level.items()])'''
INTRO = '''## Your own photograph

Put the name of any image file in the next cell. It is denoised by a fourth network, `dudncnn_blind`: DUDnCNN(6) again, but trained on all levels of noise from 0 to 55, half of its crops clipped and rounded to 8 bits as files have them, and half of the photographs changed in size and colour. It needs no level from you. The photograph goes through it in tiles with margins as wide as the receptive field asks for, so that memory stays bounded and the tiles leave no seams. On the command line: `python -m denoising_utils denoise IN OUT`.

With `None`, a test photograph with noise of σ = 30 is taken, in a PNG file.'''
OWN = r'''YOUR_PHOTOGRAPH = None  # for instance 'holiday.jpg'

clean = None
if YOUR_PHOTOGRAPH:
    source = Path(YOUR_PHOTOGRAPH)
    target = source.with_name(source.stem + '_denoised.png')
    print('The result is in', target)
else:
    clean = du.to_floats(du.read_image(test_set.files[2]).pixels)
    source, target = (Path(tempfile.mkdtemp()) / name for name in ('noisy.png', 'denoised.png'))
    torch.manual_seed(0)
    du.write_image(du.ImageFile(du.to_integers(clean + 2 * 30 / 255 * torch.randn(clean.shape))), source)
level_before, level_after = du.denoise_file(blind, source, target, force=True)

before, after = (du.to_floats(du.read_image(file).pixels) for file in (source, target))
height, width = before.shape[1:]
fig, ax = plt.subplots(figsize=(10, 10 * height / width), layout='constrained')
du.myimshow(after, ax=ax)
ax.set_title('The whole photograph, denoised')
plt.show()
show_images([('Its middle, before', middle(before, min(320, height, width))),
             ('after', middle(after, min(320, height, width)))], zoom=1, heading='One pixel to one pixel')
print(f'estimated noise level: {level_before:.1f} before, {level_after:.1f} after')
if clean is not None:
    print(f'before: {dB(before, clean)} (a PNG file clips the noise), after: {dB(after, clean)}')'''
LIMITS_TEXT = '''### What this noise is not

The network has seen white Gaussian noise, the same everywhere. Real files have others: neighbouring pixels of cameras' own JPEGs share their noise, JPEG compresses it, and light makes more of it where it is bright. Each is tried here at the same standard deviation as white noise of σ = 30, in 8 bits.'''
LIMITS = r'''def kinds_of_noise(clean):
    """8-bit images with noise of the same standard deviation and of several kinds."""
    white = 60 / 255 * torch.randn(clean.shape)
    smooth = torch.nn.functional.avg_pool2d(white, 3, 1, 1, count_include_pad=False)
    bright = white * ((clean + 1) / 2).sqrt()
    noisy = {'white': clean + white, 'correlated (mean of 3x3)': clean + smooth * white.std() / smooth.std(),
             'growing with brightness': clean + bright * white.std() / bright.std()}
    noisy = {name: du.to_integers(image) for name, image in noisy.items()}
    buffer = io.BytesIO()
    Image.fromarray(noisy['white'].permute(1, 2, 0).numpy()).save(buffer, 'JPEG', quality=75)
    noisy['white, then JPEG of quality 75'] = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)
    return {name: du.to_floats(image) for name, image in noisy.items()}


torch.manual_seed(0)
gains, shown = {}, []
for noisy, clean_crop in fixed_test(ten):
    clean_crop = middle(clean_crop, 160)
    shown = []
    for name, image in kinds_of_noise(clean_crop).items():
        result = denoised_by(blind, image)
        gains.setdefault(name, []).append([du.psnr(x[None], clean_crop[None]).item() for x in (image, result)])
        shown.append(((name, image), ('denoised', result)))
show_images(*zip(*shown), zoom=1)
table(['noise', 'before (dB)', 'denoised (dB)'],
      [[name, *(f'{value:.2f}' for value in np.mean(values, axis=0))] for name, values in gains.items()])'''
EXERCISE = '1. Train the network of *Your own photograph* for the noise that it fails on (above): draw correlated noise for half of the crops. What does that cost on white noise?'
by_id = {c.get('id'): k for k, c in enumerate(nb['cells'])}
def put(id_, text): nb['cells'][by_id[id_]]['source'] = text.splitlines(keepends=True)
put('cell-094', LEVELS); put('cell-099', INTRO); put('cell-100', OWN)
if 'own-limits' not in by_id:
    new = [dict(cell_type='markdown', id='own-limits-text', metadata={}, source=LIMITS_TEXT.splitlines(keepends=True)),
           dict(cell_type='code', id='own-limits', metadata={}, execution_count=None, outputs=[], source=LIMITS.splitlines(keepends=True)),
           dict(cell_type='markdown', id='own-limits-answer', metadata={}, source=[])]
    nb['cells'][by_id['cell-100'] + 1:by_id['cell-100'] + 1] = new
by_id = {c.get('id'): k for k, c in enumerate(nb['cells'])}
put('own-limits-text', LIMITS_TEXT); put('own-limits', LIMITS)
put('own-limits-answer', sys.argv[2] if len(sys.argv) > 2 else '**Answer.** The gains are in the table: what the network does not know, it takes for the photograph.')
for c in nb['cells']:
    s = ''.join(c['source'])
    if s.startswith('## Exercises'):
        lines = s.split('\n')
        c['source'] = '\n'.join(EXERCISE if l.startswith('1. ') else l for l in lines).splitlines(keepends=True)
json.dump(nb, open(path, 'w'), indent=1, ensure_ascii=False); open(path, 'a').write('\n')
