"""The pixels of an image that may be larger than memory: they lie in a file of bare values."""
import numpy as np
import pyvips
import torch


class Pixels:
    """Has the shape and the type of a tensor (1 or 3 channels, height, width), and its slices.

    `denoise_image` and `noise_level` need no more. Transparency is not among the channels.
    """

    def __init__(self, file, image):
        """Pixels of the kind of a `pyvips.Image` of 8 or 16 bits, in ``file``, which is empty."""
        self.file = file
        self.bands = image.bands  # the channels, and one more for transparency
        self.shape = (1 if image.bands < 3 else 3, image.height, image.width)
        self.interpretation = image.interpretation
        self.format = image.format
        self.dtype = {'uchar': torch.uint8, 'ushort': torch.uint16}[image.format]
        self.numpy_type = {'uchar': np.uint8, 'ushort': np.uint16}[image.format]
        file.touch()

    def __getitem__(self, part):
        """The pixels of a slice of channels, rows and columns: a tensor."""
        channels, height, width = self.shape
        values = np.memmap(self.file, self.numpy_type, 'r', shape=(height, width, self.bands))
        values = values[..., :channels].transpose(2, 0, 1)
        return torch.from_numpy(np.array(values[part]))

    def __setitem__(self, part, values):
        """Writes ``values``, all the channels there are, from the first row and column of a slice.

        Not by np.memmap: where the disk is full, that would end the process.
        """
        _, rows, columns = part
        lines = values.permute(1, 2, 0).numpy()  # (rows, columns, channels)
        with open(self.file, 'r+b') as stream:
            for row, line in enumerate(lines, rows.start):
                first = (row * self.shape[2] + columns.start) * self.bands
                stream.seek(first * lines.itemsize)
                stream.write(line.tobytes())

    def to_vips(self):
        """The image that the file holds. What uses it reads a few rows at a time."""
        _, height, width = self.shape
        return pyvips.Image.rawload(str(self.file), width, height, self.bands, format=self.format,
                                    interpretation=self.interpretation)
