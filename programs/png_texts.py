"""The texts in a PNG file: titles, authors, anything with a name. libvips garbles most letters.

They are copied as they are, encoding and all (PNG specification, third edition, 11.3.3).
"""
import os

SIGNATURE = b'\x89PNG\r\n\x1a\n'
HEADER = len(SIGNATURE) + 25  # bytes, with the first chunk, which has the size

TEXTS = {b'tEXt', b'zTXt', b'iTXt'}
OF_EXIV2 = b'Description\0', b'Raw profile type ', b'XML:com.adobe.xmp\0'  # it knows these names


def read(file):
    """The bytes of the chunks with texts in a file; none if it is no PNG."""
    found = b''
    with open(file, 'rb') as stream:
        if stream.read(len(SIGNATURE)) != SIGNATURE:
            return found
        while head := stream.read(8):
            length, kind = int.from_bytes(head[:4], 'big'), head[4:]
            if kind not in TEXTS:
                stream.seek(length + 4, os.SEEK_CUR)
                continue
            text = stream.read(length + 4)  # with its checksum
            if not text.startswith(OF_EXIV2):
                found += head + text
    return found
