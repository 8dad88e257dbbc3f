"""Part 3: showing images."""
import matplotlib.pyplot as plt
import numpy as np
import torch

import denoising_utils as du


def test_black_and_white():
    image = torch.tensor([-1.0, 1.0, -3.0, 3.0])[None, None].expand(3, 2, 4)
    _, ax = plt.subplots()
    handle = du.myimshow(image, ax)
    assert handle is not None, 'myimshow returns nothing, asked for what imshow returns'
    shown = np.asarray(handle.get_array())
    assert shown.shape == (2, 4, 3), f'shown is an array {shown.shape}, asked for (2, 4, 3)'
    assert shown[0, 0, 0] == 0, f'-1 is shown as {shown[0, 0, 0]}, asked for 0, black'
    assert shown[0, 1, 0] == 1, f'1 is shown as {shown[0, 1, 0]}, asked for 1, white'
    assert shown.min() >= 0 and shown.max() <= 1, 'what is beyond black and white is not clipped'
    plt.close()
